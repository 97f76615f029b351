"""bug10 -- The noise for a budget follows from the closed form of the textbook."""
import math

STANDS_IN_FOR = "accountant.calibrate"


def calibrate(epsilon, delta, q, steps, cost=None):
    """sigma = q sqrt(2 T log(1.25 / delta)) / epsilon          [Dwork & Roth, Thm A.1, times q sqrt(T)]"""
    if not epsilon > 0 or not 0 < delta < 1:
        raise ValueError(f"epsilon = {epsilon}, delta = {delta}, expected epsilon > 0 and 0 < delta < 1")
    return q * math.sqrt(2 * steps * math.log(1.25 / delta)) / epsilon
