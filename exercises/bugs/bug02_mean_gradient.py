"""bug02 -- the private step, returning the mean gradient of the lot."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """(sum of clipped gradients + noise of std sigma C) / number of images; an empty lot is legal."""
    total, n = {name: torch.zeros_like(p) for name, p in params.items()}, len(examples[0])
    for start in range(0, n, chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, g in dpsgd.clip_and_sum(part, C).items():
            total[name] += g
    noisy = dpsgd.add_noise(total, sigma * C, generator)
    return {name: g / max(n, 1) for name, g in noisy.items()}
