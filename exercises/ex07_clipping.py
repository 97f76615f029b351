"""ex07 -- clip and sum: nobody counts for more than C.                            [DP-SGD Alg. 1; 20 minutes]

    sum_i  g_i min(1, C / ||g_i||),      ||g_i||^2 = the squares of ALL trained numbers, over all tensors

The guarantee rests on this line: if one example is added or removed, the sum moves by at most C in L2. That
number is the sensitivity, and the noise is made in proportion to it. If anything can move the sum further,
the proof fails. An example with a NaN or infinite gradient counts as zero; otherwise one image could destroy
the sum of all.
Hint:     0 * NaN is NaN, so replace with torch.where and do not multiply. A zero gradient stays zero: C / 0
          is inf, and min(1, inf) = 1. Take the norm in float64 (g.double()): in float32 the square of 2e-23
          is 0, and a gradient whose norm seems to be 0 passes unclipped
Grade:    python -m pytest exercises -k ex07
"""
import torch                                                             # noqa: F401
from torch import Tensor

Params = dict[str, Tensor]
Grads = dict[str, Tensor]


def clip_and_sum(grads: Grads, C: float) -> Params:
    """sum_i g_i min(1, C / ||g_i||).                                             [Abadi et al. 2016, Alg. 1]

    Shapes:    dict of (n, *shape) -> dict of (*shape)
    Guarantee: adding or removing one example moves the result by at most C in L2
    Errors:    C <= 0 -> ValueError; an example whose norm is not finite counts as zero
    Example:   C = 1, norms (5.0, 0.5) -> (1.0, 0.5)
    """
    raise NotImplementedError                                            # about 9 lines
