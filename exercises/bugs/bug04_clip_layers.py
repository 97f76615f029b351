"""bug04 -- clipping layer by layer, so that a layer with large gradients does not starve the others."""
import torch

STANDS_IN_FOR = "dpsgd.clip_and_sum"


def clip_and_sum(grads, C):
    """sum_i g_i min(1, C / ||g_i||), tensor by tensor; a NaN example counts as zero."""
    if not C > 0:
        raise ValueError(f"C = {C}, expected a norm bound > 0")
    total = {}
    for name, g in grads.items():
        rows = g.flatten(1)                                              # (n, numbers)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
        total[name] = ((C / rows.norm(dim=1)).clamp(max=1) @ rows).view(g.shape[1:])
    return total
