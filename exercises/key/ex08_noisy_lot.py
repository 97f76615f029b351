"""ex08, as a student may write it."""
import torch

from dpsgd import clip_and_sum


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    if chunk < 1 or B <= 0:
        raise ValueError(f"chunk = {chunk}, B = {B}, expected positive numbers")
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = (e[start:start + chunk] for e in examples)
        for name, g in clip_and_sum(per_sample(params, *part), C).items():
            total[name] += g
    for name, g in total.items():
        noise = torch.randn(g.shape, dtype=torch.float64, generator=generator)
        total[name] = (g + sigma * C * noise) / B
    return {name: g.to(params[name].dtype) for name, g in total.items()}
