"""ex09 -- how much one noisy step says about one image.        [Mironov 2017, Prop. 7 (Table II); 10 minutes]

In units of C, the noisy sum is distributed as p_0 = N(0, sigma^2) without the image, and as p_1 = N(1,
sigma^2) with it. Their Rényi divergence of order a is

    RDP(a) = 1/(a - 1) log E_{z ~ N(0, sigma^2)} [ (p_1(z) / p_0(z))^a ]  =  a / (2 sigma^2)

This is the privacy that one step spends if every image takes part in it. Prove it first, from log(p_1/p_0) =
(2z - 1) / (2 sigma^2) and E[e^(s z)] = e^(s^2 sigma^2 / 2). Note the square: an image that moves the sum by K
C costs K^2 times as much.
Hint:     without noise there is no privacy: sigma = 0 -> infinity
Grade:    python -m pytest exercises -k ex09
"""
import math                                                              # noqa: F401


def gaussian_rdp(sigma: float, order: float) -> float:
    """RDP of one Gaussian step in which every example takes part: accountant.rdp with q = 1.

    Units:   sigma: noise / sensitivity, no unit. The result is in nats
    Errors:  order <= 1 -> ValueError; sigma = 0 -> inf
    Example: sigma = 2, order = 8 -> 1
    """
    raise NotImplementedError                                            # about 5 lines
