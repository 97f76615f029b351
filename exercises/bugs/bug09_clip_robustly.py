"""bug09 -- An example without a finite norm gets the weight 0 when gradients are clipped."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.clip_and_count"


def clip_and_count(grads, C):
    """sum_i g_i min(1, C / ||g_i||) in whole multiples of unit(C); the factor of a NaN example is 0."""
    if not C > 0:
        raise ValueError(f"C = {C}, expected a norm bound > 0")
    norm = dpsgd.norms(grads)
    factor = torch.where(norm.isfinite(), (C / norm).clamp(max=1), 0) / dpsgd.unit(C)    # (n,)
    total = {}
    for name, g in grads.items():
        rows = factor[:, None] * g.flatten(1).to(norm.dtype)             # (n, numbers)
        total[name] = rows.trunc().sum(0).view(g.shape[1:])
    return total
