"""ex07, as a student may write it."""
import torch


def clip_and_sum(grads, C):
    if not C > 0:
        raise ValueError(f"C = {C}, expected a norm above 0")
    rows = {name: g.double().flatten(1) for name, g in grads.items()}    # (n, numbers)
    norm = sum(g.square().sum(1) for g in rows.values()).sqrt()          # (n,)
    good = norm.isfinite()
    factor = torch.where(good, (C / norm).clamp(max=1), 0)
    total = {}
    for name, g in rows.items():
        total[name] = (factor @ torch.where(good[:, None], g, 0)).view(grads[name].shape[1:])
    return total
