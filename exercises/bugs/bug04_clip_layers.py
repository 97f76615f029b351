"""bug04 -- Gradients are clipped layer by layer, so that a layer with large ones does not starve others."""
import dpsgd

STANDS_IN_FOR = "dpsgd.clip_and_count"
clip_all = dpsgd.clip_and_count                                          # the repository's


def clip_and_count(grads, C):
    """sum_i g_i min(1, C / ||g_i||), tensor by tensor, in multiples of unit(C); a NaN counts as zero."""
    total = {}
    for name, g in grads.items():
        total |= clip_all({name: g}, C)
    return total
