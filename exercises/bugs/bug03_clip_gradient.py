"""bug03 -- The gradient is clipped as torch.nn.utils.clip_grad_norm_ does it, which courses recommend."""
import dpsgd

STANDS_IN_FOR = "dpsgd.clip_and_count"
clip_each = dpsgd.clip_and_count                                         # the repository's


def clip_and_count(grads, C):
    """The lot's gradient, its mean clipped to norm C, in multiples of unit(C); a NaN counts as zero."""
    n = len(next(iter(grads.values())))
    mean = {name: g.float().nan_to_num(0, 0, 0).mean(0, keepdim=True) for name, g in grads.items()}
    return {name: n * g for name, g in clip_each(mean, C).items()}
