"""bug07 -- the private step, with an early return that saves time and avoids a crash of vmap."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """(sum of clipped gradients + noise of std sigma C) / B; nothing to do where there is no image."""
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    if len(examples[0]) == 0:
        return total
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, g in dpsgd.clip_and_sum(part, C).items():
            total[name] += g
    return {name: g / B for name, g in dpsgd.add_noise(total, sigma * C, generator).items()}
