"""inputs.py -- numbers for the cases: fixed ones, and new ones in each run of a grader."""
import random
import secrets

import torch
from torch import Tensor

AFRESH = "numbers drawn afresh"                      # the title of a case that no table of answers passes
CHANCE = random.SystemRandom()


def seeded(seed: int | None = None) -> torch.Generator:
    return torch.Generator().manual_seed(secrets.randbelow(2**40) if seed is None else seed)


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def new(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded())


def whole(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=seeded())
