"""ex08 -- one private step: clip, sum, noise once, divide by a public number.  [DP-SGD Alg. 1; 30 minutes]

    g = (1/B) ( sum_{i in lot} clip_C(g_i) + N(0, (sigma C)^2 I) )

Published code has fallen into each of three traps. The lot, the random batch of the step, may be EMPTY: the
noise is added all the same, since a result without noise says that nobody was sampled. B is the DECLARED
batch size, because the true one is private. Memory makes us cut the lot into chunks, but the noise belongs to
the step and not to the chunk.
Make the noise from `normals`, which holds one draw of N(0, 1) for each weight. The caller draws them from a
secret key, new ones for each step. Do not draw your own: torch's generator can be predicted.
Look at:  `python dpsgd.py` and `python -m machinery.secret`
Hint:     start from float64 zeros in the shapes of params. `examples` is a tuple of tensors, each with one
          row for each image: a loop over range(0, len(examples[0]), chunk) does nothing for an empty lot.
          normals.split(sizes) cuts the normals into one piece for each tensor, and .view(shape) shapes it.
          Add up in float64, and round once, at the end, to the precision of params
Grade:    python -m pytest exercises -k ex08
"""
from typing import Callable

import torch                                                             # noqa: F401
from torch import Tensor

from dpsgd import clip_and_sum                                 # noqa: F401   (what you wrote in ex07)

Params = dict[str, Tensor]


def private_gradient(per_sample: Callable, params: Params, examples: tuple[Tensor, ...], *, C: float,
                     sigma: float, B: float, normals: Tensor, chunk: int = 256) -> Params:
    """One step's private gradient: (sum of clipped per-example gradients + noise of std sigma C) / B.

    per_sample(params, *part) -> dict of (n, *shape) for a part of n examples; call it with n <= chunk and
    never with n = 0.
    Shapes:    examples: tensors (m, ...), the lot; normals (number of weights,), float64, tensor after tensor
               in the order of params; returns dict of (*shape), in the precision of params
    Units:     C gradient norm, sigma no unit (noise multiplier), B the DECLARED batch size, the same in every
               step
    Guarantee: one example moves the sum by at most C, and the noise is added once: a Gaussian mechanism of
               multiplier sigma
    Errors:    chunk < 1 or B <= 0 -> ValueError
    Example:   one weight, an empty lot, C = 10, sigma = 2, B = 4, normals (0.5,) -> 2 * 10 * 0.5 / 4 = 2.5
    """
    raise NotImplementedError                                            # about 11 lines
