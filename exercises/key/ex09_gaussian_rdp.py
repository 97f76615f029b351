"""ex09, as a student may write it."""
import math


def gaussian_rdp(sigma, order):
    if order <= 1:
        raise ValueError(f"order = {order}, expected a number above 1")
    if sigma == 0:
        return math.inf
    return order / (2 * sigma**2)
