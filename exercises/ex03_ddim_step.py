"""ex03 -- one jump back: x_t -> x_{t'} with t' < t.                          [DDIM Eq. 12 and 16; 20 minutes]

The model has guessed the noise in x_t. From this guess follows the image that it sees, x0_hat. Noise this
image to level a_next:

    x0_hat = clip( (x - sqrt(1 - a) noise) / sqrt(a), -1, 1 )         no image has a pixel outside [-1, 1]
    noise' = (x - sqrt(a) x0_hat) / sqrt(1 - a)                       the noise that agrees with that image
    sigma  = eta sqrt( (1 - a_next) / (1 - a) * (1 - a / a_next) )    eta = 0: none, eta = 1: as in DDPM
    x_next = sqrt(a_next) x0_hat + sqrt(1 - a_next - sigma^2) noise' + sigma fresh

Look at:  `python ddpm.py`, then the last column of runs/ddpm.png: 50 such jumps, from pure noise
Hint:     with eta > 1 the number under the last root can fall below 0: take max(..., 0)
Grade:    python -m pytest exercises -k ex03
"""
import torch                                                             # noqa: F401
from torch import Tensor


def ddim_step(x: Tensor, noise: Tensor, a: float, a_next: float, eta: float, fresh: Tensor) -> Tensor:
    """One round of ddpm.ddim_sample's loop.                                           [DDIM Eq. 12]

    Shapes:  x (the noisy images), noise (the model's guess), fresh ~ N(0, I): (n, C, H, W) -> (n, C, H, W)
    Units:   a = alpha_bar_t, a_next = alpha_bar_{t'}: shares of signal variance, 0 < a < a_next <= 1;
             a_next = 1 in the last jump
    Example: a = 0.25, a_next = 1, x = 0.5, noise = 0 -> x0_hat = 1, which is the answer
    """
    raise NotImplementedError                                            # about 4 lines
