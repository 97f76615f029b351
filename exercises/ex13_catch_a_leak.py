"""ex13 -- write the test that catches a leak.                       [DP-SGD Alg. 1, from outside; 45 minutes]

The guarantee of one step has two halves. Both can be tested from outside, by calling the step on a lot, the
random batch of images:

    sensitivity   || B step(lot + one image) - B step(lot) ||  <=  C   with sigma = 0, for EVERY lot and image
    noise         B step(lot) - B step(lot, sigma = 0)  ~  N(0, (sigma C)^2 I), fresh in every step, EVERY lot

The noise is fresh if the step is given new normals, of N(0, 1), each time. Your function gets a step with the
signature of dpsgd.private_gradient, and says whether it breaks one of the two halves. The grader has four
correct steps and fourteen leaking ones. The correct ones make their noise from the normals in four ways, so
do not compare bits. All look alike from outside and come in a random order.
Hint:     try gradients that are short, long in one tensor of `toy` (w or v), and long in both; no image at
          all; a NaN image; and K draws that point the same way. float32 rounds, so allow C (1 + 1e-4). For
          the noise, take some thousand numbers in each tensor, C = 10 as well as C = 0.01, an empty lot, a
          lot of several chunks, two steps in a row
Grade:    python -m pytest exercises -k ex13
"""
from typing import Callable

import torch


def toy(params: dict, x: torch.Tensor) -> dict:
    """The gradient of image i is the mean of its K rows, cut into two tensors. x (n, K, d): n images."""
    mean = x.mean(1)
    return {"w": mean[:, :1], "v": mean[:, 1:]}


def leaks(step: Callable) -> bool:
    """True if the step breaks the guarantee, False if it keeps it.

    step(per_sample, params, examples, *, C, sigma, B, normals=None, chunk=256) -> dict of (*shape)
    normals: float64, one of N(0, 1) for each weight (torch's are good enough for a test; sigma = 0: None)
    Example: step(toy, {"w": torch.zeros(1), "v": torch.zeros(2)}, (torch.ones(5, 4, 3),), C=1, sigma=0, B=5)
    """
    raise NotImplementedError                                            # about 20 lines
