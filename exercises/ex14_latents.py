"""ex14 -- private images become latents.                            [Rombach et al. 2022, App. G; 20 minutes]

Latent diffusion noises z = E(x) in place of x. The encoder E gives each image a distribution, N(mu(x),
sigma^2(x)), and its mean is the latent. Diffusion wants numbers about as large as its noise, so mu is scaled:

    z_i = s mu(x_i),      s = 1 / (standard deviation of mu over all numbers of the PUBLIC images)

For privacy, all that matters is which images s is measured on. DP-SGD bounds what an image does to its own
gradient. If each latent depends on its own image alone, neighbouring sets of images become neighbouring sets
of latents, and that bound is enough. But a number that was measured on the private images is in everybody's
latent, so one image moves everybody's gradient. Common latent-diffusion code measures s on the first training
batch.
Look at:  the first lines of autoencoder.py
Hint:     images are uint8, and E reads floats in [-1, 1]: to_float; use the tensors' own .std()
Grade:    python -m pytest exercises -k ex14
"""
from typing import Callable

import torch                                                             # noqa: F401
from torch import Tensor

from data import to_float                                                # noqa: F401


def private_latents(encode: Callable, public: Tensor, private: Tensor) -> Tensor:
    """z = s mu(x) for each private image, s measured on the public ones.             [Rombach et al., App. G]

    encode(x (n, C, H, W) float) -> (mu, log_var), (n, c, h, w) each; it reads every image alone
    Shapes:    public (m, C, H, W), private (n, C, H, W), both uint8 -> (n, c, h, w); n may be 0
    Guarantee: latent i depends on image i and on public constants, and on nothing else
    Example:   encode returns x itself for mu; public: a pixel of 0 and one of 255 -> mu = -1, 1, s = 0.7071;
               private: a pixel of 0 -> z = -0.7071
    """
    raise NotImplementedError                                            # about 3 lines
