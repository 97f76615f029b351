"""ex10 -- the same, when an image takes part only with probability q.  [Mironov et al. 2019; 40 minutes]

Poisson sampling hides who is in the lot, the random batch of a step. So with the image, the sum is
distributed as the mixture (1 - q) N(0, sigma^2) + q N(1, sigma^2):

    A_a = E_{z ~ N(0, sigma^2)} [ ( 1 - q + q exp((2z - 1) / (2 sigma^2)) )^a ],   RDP(a) = log(A_a) / (a - 1)

There is no closed form for a real order a, but a sum over a fine grid of z (the trapezoid rule) is extremely
accurate here. The integrand overflows for a large a / sigma^2: compute its LOGARITHM on the grid, and add up
with logsumexp.
Hint:     a is the argument `order`; z from -14 sigma to a + 14 sigma in steps of sigma / 25 (and at most
          sigma^2 / 3); with u = (2z - 1) / (2 sigma^2),
          log((1 - q) + q e^u) = np.logaddexp(np.log(1 - q), np.log(q) + u), also at q = 1;
          log of a point's weight: log(step) - log(sigma sqrt(2 pi)) - z^2 / (2 sigma^2)
Grade:    python -m pytest exercises -k ex10
"""
import math                                                              # noqa: F401

import numpy as np                                                       # noqa: F401
from scipy.special import logsumexp                                      # noqa: F401


def rdp(q: float, sigma: float, order: float) -> float:
    """RDP of ONE step of the sampled Gaussian mechanism: accountant.rdp at a single order.

    Units:     q: sampling rate; sigma: noise / sensitivity; both without unit. The result is in nats
    Guarantee: n steps have RDP n * rdp(...): composition adds, at each order by itself
    Errors:    q outside [0, 1], sigma < 0 or order <= 1 -> ValueError; q = 0 -> 0; sigma = 0 -> inf
    Example:   q = 1 is ex09; q = 0.5, sigma = 1, order = 2 -> log(1 + q^2 (e - 1)) = 0.3574
    """
    raise NotImplementedError                                            # about 12 lines
