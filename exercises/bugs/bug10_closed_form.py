"""bug10 -- the Gaussian mechanism's epsilon in closed form, as in the textbook."""
import math

STANDS_IN_FOR = "machinery.pld.gaussian_epsilon"


def gaussian_epsilon(sigma, delta):
    """sigma = sqrt(2 log(1.25 / delta)) / epsilon, solved for epsilon.        [Dwork & Roth 2014, Thm A.1]"""
    if sigma < 0 or not 0 < delta < 1:
        raise ValueError(f"sigma = {sigma}, delta = {delta}, expected sigma >= 0 and delta between 0 and 1")
    return math.sqrt(2 * math.log(1.25 / delta)) / sigma if sigma else math.inf
