"""ex08 -- one private step: clip, sum, noise once, divide by a public number.  [DP-SGD Alg. 1; 30 minutes]

    g = (1/B) ( sum_{i in lot} clip_C(g_i) + N(0, (sigma C)^2 I) )

Three traps, each of which has been shipped: the lot may be EMPTY (the noise must come all the same, or its
absence says that nobody was sampled); B is the DECLARED batch size (the realised one is private); memory
forces chunks, but the noise belongs to the step, not to the chunk.
Look at:  `python dpsgd.py`
Hint:     start from zeros of params' shapes; a loop over range(0, len(lot), chunk) does nothing for an empty
          lot. Noise: torch.randn(..., dtype=torch.float64, generator=generator), since normals of float32 lie
          on a lattice and end at 5.77 sigma; round the finished sum once, to the precision of params
Grade:    python -m pytest exercises -k ex08
"""
from typing import Callable

import torch
from torch import Tensor

from dpsgd import clip_and_sum                                 # noqa: F401   (yours from ex07, proven)

Params = dict[str, Tensor]


def private_gradient(per_sample: Callable, params: Params, examples: tuple[Tensor, ...], *, C: float,
                     sigma: float, B: float, generator: torch.Generator | None = None,
                     chunk: int = 256) -> Params:
    """One step's private gradient: (sum of clipped per-example gradients + noise of std sigma C) / B.

    per_sample(params, *part) -> dict of (part, *shape); call it on at most `chunk` examples, never on none.
    Shapes:    examples: tensors (m, ...), the lot; returns dict of (*shape), in the precision of params
    Units:     C gradient norm, sigma no unit (noise multiplier), B the DECLARED batch size, the same in every
               step
    Guarantee: one example moves the sum by at most C, and the noise is drawn once: a Gaussian mechanism of
               multiplier sigma
    Errors:    chunk < 1 or B <= 0 -> ValueError
    """
    raise NotImplementedError                                            # about 9 lines
