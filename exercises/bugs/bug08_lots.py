"""bug08 -- The lot is random and of the planned size, as a DataLoader with shuffle=True would give it."""
import torch

STANDS_IN_FOR = "dpsgd.poisson_sample"


def poisson_sample(coins, q):
    """The q N of N examples with the smallest coins, all equally likely: (m,) int64 indices."""
    if not 0 <= q <= 1 or coins.dtype != torch.float64:
        raise ValueError(f"q = {q}, coins {coins.dtype}, expected 0 <= q <= 1 and float64")
    return coins.argsort()[:round(q * len(coins))].sort().values
