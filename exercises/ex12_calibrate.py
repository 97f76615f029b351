"""ex12 -- how much noise for a given epsilon?                                    [DP-LoRA Sec. 5; 20 minutes]

The user names epsilon, delta, q and the number of steps; the noise multiplier sigma follows:

    sigma = min { s : epsilon(q, s, steps, delta) <= target }

epsilon falls as sigma grows, so bisection finds it. Which END of the last bracket do you return? One of the
two has been checked to keep the budget; the other spends more than was promised, if only in the sixth digit.
A promise is a promise.
Look at:  python accountant.py --epsilon 10 --delta 1e-5 --q 0.017 --steps 200
Hint:     double an upper bound until it is private enough; bisect until high < 1.001 low;
          epsilon_of(q, sigma, steps, delta)[0]
Grade:    python -m pytest exercises -k ex12      (it accepts up to 1% too much noise, and not a hair too
          little)
"""
from accountant import epsilon as epsilon_of                             # noqa: F401


def calibrate(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The smallest sigma (here: to 1%) whose `steps` steps cost at most the given epsilon.

    Guarantee: the sigma returned was itself checked: its epsilon is <= the target, never a hair above
    Errors:    epsilon <= 0 -> ValueError; steps = 0 -> 0
    Example:   epsilon=10, delta=1e-5, q=.017, steps=200 -> 0.5466 (0.546534 to 0.552)
    """
    raise NotImplementedError                                            # about 12 lines
