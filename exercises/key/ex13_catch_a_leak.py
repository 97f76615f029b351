"""ex13, as a student may write it: it measures distances between neighbouring lots, and the noise."""
import math

import torch


def toy(params, x):
    mean = x.mean(1)
    return {"w": mean[:, :1], "v": mean[:, 1:]}


def moves_too_far(step):
    """Does an image move the sum by more than C? K = 4 draws: long, opposite, long in both tensors, NaN."""
    params, C, B = {"w": torch.zeros(1), "v": torch.zeros(1)}, 1.0, 5
    images = torch.tensor([[0.3, 0.0], [10.0, 0.0], [-20.0, 0.0], [9.0, 9.0], [math.nan, 1.0]])
    images = images[:, None].expand(-1, 4, 2)                            # (5, K, 2)
    sums = []
    for n in range(6):
        result = step(toy, params, (images[:n],), C=C, sigma=0.0, B=B)
        sums.append(torch.cat([result["w"], result["v"]]) * B)
    moved = [float((b - a).norm()) for a, b in zip(sums, sums[1:])]
    return not all(m <= C * (1 + 1e-4) for m in moved)                   # False for a NaN, too


def noise_is_off(step):
    """Is the noise of some lot, or at some C, not fresh noise of standard deviation sigma C?"""
    params = {"w": torch.zeros(20_000), "v": torch.zeros(20_000)}

    def nothing(params, x):
        return {name: torch.zeros(len(x), *p.shape) for name, p in params.items()}
    for n, C in ((0, 10.0), (5, 10.0), (5, 0.01)):
        generator = torch.Generator().manual_seed(n)
        first, second = (step(nothing, params, (torch.zeros(n, 4, 2),), C=C, sigma=2.0, B=5, chunk=2,
                              normals=torch.randn(40_000, dtype=torch.float64, generator=generator))
                         for _ in range(2))
        for name in params:
            for z in (first[name], (first[name] - second[name]) / math.sqrt(2)):
                if not abs(float(z.std()) * 5 / (2.0 * C) - 1) < 0.05:
                    return True
    return False


def leaks(step):
    return moves_too_far(step) or noise_is_off(step)
