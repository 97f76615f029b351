"""ex01 -- noise an image: x_0 -> x_t in one jump.                                     [DDPM Eq. 4; 5 minutes]

The forward process adds a little Gaussian noise in each step. A sum of Gaussians is Gaussian, so the t + 1
steps that lead to level t (levels count from 0) are the same as one:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,     alpha_bar_t = prod_{s <= t} (1 - beta_s)

beta_s is the variance of the noise that step s adds. alpha_bar_t is the share of the image's variance that is
left at level t. The squares of the two factors add up to 1.
Look at:  `python ddpm.py`, then runs/ddpm.png
Hint:     alpha_bar[t] has the shape of t; x_0 has three dimensions more: [..., None, None, None]
Grade:    python -m pytest exercises -k ex01
"""
import torch                                                             # noqa: F401
from torch import Tensor

from ddpm import LINEAR, Schedule


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule = LINEAR) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise: t + 1 steps at once.          [DDPM Eq. 4]

    Shapes:  x0, noise (..., C, H, W), t (...) -> (..., C, H, W); leading dimensions broadcast
    Given:   schedule.alpha_bar, (T,)
    Example: alpha_bar_t = 0.25, x_0 = 1, noise = 2 -> 0.5 + 0.866 * 2 = 2.232
    """
    raise NotImplementedError                                            # about 2 lines
