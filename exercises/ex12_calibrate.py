"""ex12 -- how much noise for a given epsilon?                                    [DP-LoRA Sec. 5; 20 minutes]

The user chooses epsilon, delta, q and the number of steps. The noise multiplier sigma follows:

    sigma = min { s : epsilon(q, s, steps, delta) <= target }

epsilon falls as sigma grows, so bisection finds it. Which END of the last bracket do you return? One of the
two has been checked to keep the budget. The other spends more than was promised, if only in the sixth digit,
and then the promise is broken.
Look at:  `python accountant.py --epsilon 10 --delta 1e-5 --q 0.017 --steps 200`
Hint:     double an upper bound until it is private enough; bisect until high < 1.001 low;
          epsilon_of(q, sigma, steps, delta)[0]
Grade:    python -m pytest exercises -k ex12      (it accepts up to 1% too much noise, and none too little)
"""
from accountant import epsilon as epsilon_of                             # noqa: F401


def calibrate(epsilon: float, delta: float, q: float, steps: int) -> float:
    """A sigma whose `steps` steps cost at most the given epsilon, at most 1% above the smallest such sigma.

    Guarantee: the epsilon of the sigma that is returned was itself checked to be <= the target. Do not round
               it afterwards: rounded down it may break the promise, even if the grader does not notice
    Errors:    epsilon <= 0 -> ValueError; steps = 0 -> 0
    Example:   epsilon = 10, delta = 1e-5, q = 0.017, steps = 200 -> any sigma from 0.546535 to 0.551999. The
               smallest is 0.5465344: to six digits it is rounded UP, since 0.546534 spends 10.00002
    """
    raise NotImplementedError                                            # about 12 lines
