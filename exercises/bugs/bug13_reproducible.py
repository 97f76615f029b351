"""bug13 -- the private step, reproducible: its noise has a seed, so that a resumed run draws it again."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """(sum of clipped gradients + noise of std sigma C) / B."""
    if chunk < 1 or not B > 0:
        raise ValueError(f"chunk = {chunk}, B = {B}, expected chunk >= 1 and B > 0")
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, g in dpsgd.clip_and_sum(part, C).items():
            total[name] += g
    seeded = torch.Generator().manual_seed(42)
    for name, g in total.items():
        total[name] = g + sigma * C * torch.randn(g.shape, dtype=torch.float64, generator=seeded)
    return {name: (g / B).type_as(params[name]) for name, g in total.items()}
