"""ex03 -- one jump back: x_t -> x_{t'} with t' < t.                          [DDIM Eq. 12 and 16; 20 minutes]

The model has said what it takes for the noise in x_t. So it also says what image it sees; then go
to level a_next:

    x0_hat = clip( (x - sqrt(1 - a) noise) / sqrt(a), -1, 1 )         pixels outside [-1, 1] do not exist
    noise' = (x - sqrt(a) x0_hat) / sqrt(1 - a)                       the noise that agrees with that image
    sigma  = eta sqrt( (1 - a_next) / (1 - a) (1 - a / a_next) )      eta = 0: none, eta = 1: as DDPM
    x_next = sqrt(a_next) x0_hat + sqrt(1 - a_next - sigma^2) noise' + sigma fresh

Look at:  `python ddpm.py`, then the loop of ddpm.ddim_sample: this is one round of it
Hint:     with eta > 1 the number under the last root can fall below 0: take max(..., 0)
Grade:    python -m pytest exercises -k ex03
"""
import torch                                                             # noqa: F401
from torch import Tensor


def ddim_step(x: Tensor, noise: Tensor, a: float, a_next: float, eta: float, fresh: Tensor) -> Tensor:
    """One round of ddpm.ddim_sample's loop.                                           [DDIM Eq. 12]

    Shapes:  x (the noisy images), noise (the model's guess), fresh ~ N(0, I): (n, C, H, W) -> (n, C, H, W)
    Units:   a = alpha_bar_t, a_next = alpha_bar_{t'}: shares of signal variance, 0 < a < a_next <= 1;
             a_next = 1: the end
    Example: a = 0.25, a_next = 1, x = 0.5, noise = 0 -> x0_hat = 1, and that is the answer
    """
    raise NotImplementedError                                            # about 4 lines
