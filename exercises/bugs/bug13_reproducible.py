"""bug13 -- the private step, reproducible: its noise can be drawn again when a run is resumed."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """(sum of clipped gradients + noise of std sigma C) / B."""
    if chunk < 1 or not B > 0:
        raise ValueError(f"chunk = {chunk}, B = {B}, expected chunk >= 1 and B > 0")
    generator = torch.Generator().manual_seed(generator.initial_seed() if generator is not None else 0)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, g in dpsgd.clip_and_sum(part, C).items():
            total[name] += g
    noisy = dpsgd.add_noise(total, sigma * C if sigma else 0.0, generator)
    return {name: (g / B).type_as(params[name]) for name, g in noisy.items()}
