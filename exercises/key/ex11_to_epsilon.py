"""ex11, as a student may write it."""
import numpy as np


def to_epsilon(rdp_total, orders, delta):
    r, a = np.array(rdp_total, dtype=float), np.array(orders, dtype=float)
    if not 0 < delta < 1 or (a <= 1).any() or not (r >= 0).all():
        raise ValueError("delta, an order or an RDP has no meaning")
    epsilon = r + np.log((a - 1) / a) - (np.log(delta) + np.log(a)) / (a - 1)
    best = epsilon.argmin()
    return max(float(epsilon[best]), 0.0), float(a[best])
