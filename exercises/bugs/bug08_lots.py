"""bug08 -- the lot: a random one of the planned size, as a DataLoader with shuffle=True would give it."""
import torch

STANDS_IN_FOR = "dpsgd.poisson_sample"


def poisson_sample(N, q, generator=None):
    """q N of N examples, all equally likely: (m,) int64 indices."""
    if N < 0 or not 0 <= q <= 1:
        raise ValueError(f"N = {N}, q = {q}, expected N >= 0 and 0 <= q <= 1")
    return torch.randperm(N)[:round(q * N)].sort().values
