"""bug02 -- The private step returns the mean gradient of the lot."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, normals=None, chunk=256):
    """(sum of clipped gradients + noise of std sigma C) / number of images; an empty lot is legal."""
    if chunk < 1 or not B > 0:
        raise ValueError(f"chunk = {chunk}, B = {B}, expected chunk >= 1 and B > 0")
    n = len(examples[0])
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for start in range(0, n, chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, g in dpsgd.clip_and_sum(part, C).items():
            total[name] += g
    noisy = dpsgd.add_noise(total, sigma * C, normals) if sigma else total
    unit = dpsgd.grid(sigma, C)                                   # as in dpsgd.py: no finer bits are released
    return {name: ((g / unit).round() * unit / max(n, 1)).to(params[name]) for name, g in noisy.items()}
