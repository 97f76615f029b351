"""bug06 -- The private step is made of micro-batches, each of which is clipped, noised and accumulated."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, normals=None, chunk=256):
    """(sum over micro-batches of (clipped gradients + noise of std sigma C)) / B."""
    if chunk < 1 or not B > 0:
        raise ValueError(f"chunk = {chunk}, B = {B}, expected chunk >= 1 and B > 0")
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        clipped = dpsgd.clip_and_sum(part, C)
        noisy = dpsgd.add_noise(clipped, sigma * C, normals) if sigma else clipped
        for name, g in noisy.items():
            total[name] += g
    if sigma and len(examples[0]) == 0:                                  # an empty lot gets its noise, too
        total = dpsgd.add_noise(total, sigma * C, normals)
    unit = dpsgd.grid(sigma, C)                                   # as in dpsgd.py: no finer bits are released
    return {name: ((g / unit).round() * unit / B).to(params[name]) for name, g in total.items()}
