"""ex10, as a student may write it."""
import math

import numpy as np
from scipy.special import logsumexp


def rdp(q, sigma, order):
    if not 0 <= q <= 1 or sigma < 0 or order <= 1:
        raise ValueError(f"q = {q}, sigma = {sigma}, order = {order}")
    if q == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    step = min(sigma / 25, sigma**2 / 3)
    z = np.arange(-14 * sigma, order + 14 * sigma, step)
    with np.errstate(divide="ignore"):                                   # log(0) = -inf at q = 1
        log_ratio = np.logaddexp(np.log(1 - q), np.log(q) + (2 * z - 1) / (2 * sigma**2))
    log_weight = math.log(step) - math.log(sigma * math.sqrt(2 * math.pi)) - z**2 / (2 * sigma**2)
    return logsumexp(order * log_ratio + log_weight) / (order - 1)
