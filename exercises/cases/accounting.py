"""accounting.py -- the cases of ex09 to ex12: RDP, its conversion to epsilon, and the noise for a budget."""
import functools
import math

from grade import Case, on, plain, show
import accountant
from cases.inputs import AFRESH, CHANCE


def gaussian_rdp(sigma: float, order: float) -> float:
    return float(accountant.rdp(1, sigma, order))


def gaussians():
    say = functools.partial(on, gaussian_rdp)
    yield say("sigma = 1, order 2", "the formula is a / (2 sigma^2).", 1.0, 2.0)
    yield say("sigma = 2, order 8", "the formula has the square of sigma: twice the noise costs a quarter.",
              2.0, 8.0)
    yield say("no noise", "without noise one look tells all, so the answer is infinity and not an error.",
              0.0, 2.0)
    for order in (1.0, 0.5):
        yield say(f"order {order:g}", "an order has to be above 1, so a ValueError is expected. (At order 1 "
                  "the divergence would be that of Kullback and Leibler.)", 1.0, order)
    for most in (1, 20):
        yield say(AFRESH, "the formula is a / (2 sigma^2).", CHANCE.uniform(0.2, most),
                  CHANCE.uniform(1.01, 900))


def rdp(q: float, sigma: float, order: float) -> float:
    return float(accountant.rdp(q, sigma, order))


def integrals():
    def say(title, means, *args):
        return Case(title, means, dict(zip(("q", "sigma", "order"), args)), lambda f: f(*args), (1e-5, 1e-10))
    yield say("q = 1", "everybody takes part, so the answer is that of ex09.", 1.0, 2.0, 8.0)
    yield say("q = 0", "nobody is ever sampled, so the answer is 0. The logarithm of q must not be taken "
              "here.", 0.0, 1.0, 2.0)
    yield say("no noise", "the answer is infinity.", 0.1, 0.0, 2.0)
    yield say("q = 1/2, order 2", "the answer is log(1 + q^2 (e^(1/sigma^2) - 1)). If yours is q^2 a / (2 "
              "sigma^2), it is smaller than the true value, and an epsilon that is computed from it is a "
              "promise that does not hold.", 0.5, 1.0, 2.0)
    yield say("a real order", "orders are real numbers. The best one is rarely whole, and a binomial sum "
              "covers only whole ones.", 0.3, 0.5, 1.5)
    yield say("little noise, a high order", "exp overflows, so keep the logarithm of the integrand and add "
              "up with logsumexp. The grid has to reach z = a + 14 sigma, since most of the integral lies "
              "near z = a.", 0.3, 0.5, 64.0)
    yield say("sigma = 0.2", "the integrand has features of width sigma^2. Steps of sigma / 25 are fine "
              "enough, but steps that do not follow sigma (1/2, say) are too coarse here.", 0.04, 0.2, 4.3)
    yield say("much noise", "a large sigma needs a wide grid, whose ends are 14 SIGMA away.", 0.4, 12.0, 59.1)
    for _ in range(2):
        yield say(AFRESH, "the integral holds for all q, sigma and orders.", CHANCE.uniform(0.01, 0.9),
                  CHANCE.uniform(0.5, 6), CHANCE.uniform(1.3, 40))
    for wrong in ((1.5, 1.0, 2.0), (-0.1, 1.0, 2.0), (0.5, -1.0, 2.0), (0.5, 1.0, 1.0), (0.5, 1.0, 0.5)):
        yield say("settings without meaning", "q is outside [0, 1], sigma is negative, or the order is not "
                  "above 1, so a ValueError is expected.", *wrong)


def conversions():
    say = functools.partial(on, accountant.to_epsilon)
    yield say("one order", "this is the formula itself. If yours is RDP - log(delta) / (a - 1), it is the "
              "older conversion (Mironov 2017). That is valid, but its epsilon is a fifth larger here.",
              [1.0], [8.0], 1e-5)
    yield say("two orders", "each order proves an epsilon and all of them hold, so return the smallest.",
              [0.5, 2.0], [4.0, 16.0], 1e-5)
    yield say("almost nothing spent, a large delta", "the formula goes below 0 here, but epsilon does not.",
              [0.001], [2.0], 0.9)
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    yield say("2250 steps of q = 0.04, sigma = 1.5", "the known value is 7.3291, at order 3.9.",
              2250 * accountant.rdp(0.04, 1.5, orders), orders, 1e-5)
    yield say(AFRESH, "return the smallest epsilon of the five orders.",
              [CHANCE.uniform(0, 3) for _ in range(5)], [CHANCE.uniform(1.1, 40) for _ in range(5)],
              10 ** CHANCE.uniform(-9, -3))
    for total, order, delta in (([1.0], [2.0], 0.0), ([1.0], [2.0], 1.0), ([1.0], [2.0], -1e-5),
                                ([1.0], [2.0], 2.0), ([1.0], [1.0], 1e-5), ([1.0], [0.5], 1e-5),
                                ([-1.0], [2.0], 1e-5), ([math.nan], [2.0], 1e-5)):
        yield say("numbers without meaning", "delta is outside (0, 1), the order is not above 1, or the RDP "
                  "is negative or NaN. A ValueError is expected, not a number that looks like a guarantee.",
                  total, order, delta)


KEEPS = "keeps the budget, wastes at most 1%"


def calibrations():
    budgets = [("a single Gaussian", (1.0, 1e-5, 1.0, 1)),
               ("this repository's own run", (10.0, 1e-5, 512 / 60_000, 110)),
               ("a small budget", (0.1, 1e-6, 0.01, 1000)), ("a large one", (100.0, 1e-5, 0.01, 10))]
    budgets += [(f"a single Gaussian, epsilon = {e}", (e, 1e-5, 1.0, 1))
                for e in (0.3, 0.5, 0.7, 2.0, 3.0, 5.0, 7.0, 10.0)]
    budgets += [(AFRESH, (CHANCE.uniform(0.3, 8), 10 ** CHANCE.uniform(-8, -4), 1.0, CHANCE.randint(1, 50)))
                for _ in range(3)]
    for title, args in budgets:
        def verdict(f, args=args):
            target, delta, q, steps = args
            sigma = plain(f(*args))
            if not isinstance(sigma, (int, float)):
                raise TypeError(f"the result is {show(sigma)}, expected one number")
            spent = accountant.epsilon(q, float(sigma), steps, delta)[0]
            if spent > target:
                return f"sigma = {sigma:.8g} spends epsilon = {spent:.8g}: over the budget"
            wasted = sigma / accountant.calibrate(*args) - 1
            return f"{wasted:.1%} more noise than needed" if wasted > 0.01 else KEEPS
        yield Case(title, "return the end of the bracket that was CHECKED to keep the budget, and do not "
                   "round it. Spending more than was promised breaks the promise, however little it is. More "
                   "noise than needed costs quality; up to 1% more is accepted.",
                   dict(zip(("epsilon", "delta", "q", "steps"), args)), verdict, expected=KEEPS)
    say = functools.partial(on, accountant.calibrate)
    yield say("no steps", "nothing is released, so no noise is needed and the answer is 0.", 1.0, 1e-5, 0.1,
              0)
    yield say("epsilon = 0", "no amount of noise is enough for epsilon = 0, so a ValueError is expected and "
              "not an endless loop.", 0.0, 1e-5, 0.1, 10)
