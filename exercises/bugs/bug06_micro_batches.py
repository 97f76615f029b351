"""bug06 -- the private step, made of micro-batches: each is clipped, noised and accumulated, as in ordinary training."""
import torch

import dpsgd

STANDS_IN_FOR = "dpsgd.private_gradient"


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """(sum over micro-batches of (clipped gradients + noise of std sigma C)) / B."""
    accumulated = {name: torch.zeros_like(p) for name, p in params.items()}
    for start in range(0, max(len(examples[0]), 1), chunk):              # once for an empty lot
        part = [e[start:start + chunk] for e in examples]
        total = dpsgd.clip_and_sum(per_sample(params, *part), C)
        for name, g in dpsgd.add_noise(total, sigma * C, generator).items():
            accumulated[name] += g
    return {name: g / B for name, g in accumulated.items()}
