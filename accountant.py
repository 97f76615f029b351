"""accountant.py -- from (q, sigma, steps, delta) to epsilon, and back.

The mechanism is the sampled Gaussian: each step sums over a Poisson sample with sampling rate q and adds
noise of standard deviation sigma * C. Its Rényi divergences (Mironov, Talwar, Zhang 2019) add up over the
steps, and Prop. 12 of Canonne, Kamath, Steinke 2020 converts them to epsilon. Neighbouring data sets differ
by one example, added or removed. All figures are upper bounds.

  $ python accountant.py                                                  # epsilon against steps
  $ python accountant.py --epsilon 10 --delta 1e-5 --q 0.017 --steps 200  # the noise: sigma = 0.5465344
  $ python accountant.py --sigma 0.64 --delta 1e-5 --q 0.017 --steps 200  # epsilon = 6.40872
  $ python accountant.py compose A/privacy.json B/privacy.json            # two runs on the same images
  $ python pld.py                                                         # a tighter bound beside this one
"""
import json
import math
import warnings
from typing import Callable

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp

from machinery import screen

# -----------------------------------------------------------------------------
# 0. the whole of it in its simplest correct form, to be read first; a test compares the rest with it


def epsilon_in_short(q: float, sigma: float, steps: int, delta: float) -> float:
    """Epsilon from the whole orders 2 to 256 alone, for which A_a is a finite sum.

        A_a = sum_k (a choose k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2))

    It needs 0 < q < 1 and sigma > 0.
    Source:  Mironov, Talwar, Zhang 2019, Sec. 3.3; the conversion to epsilon is that of `to_epsilon`
    Example: q=.04, sigma=1.5, steps=2250, delta=1e-5 -> 7.330, as `epsilon` to 3 digits
    """
    epsilons = []
    for a in range(2, 257):
        k = np.arange(a + 1)
        log_choose = [math.lgamma(a + 1) - math.lgamma(i + 1) - math.lgamma(a - i + 1) for i in k]
        log_A = logsumexp(log_choose + (a - k) * math.log1p(-q) + k * math.log(q)
                          + (k * k - k) / (2 * sigma**2))
        rdp_a = log_A / (a - 1)                                          # of one step; the steps add up
        epsilons.append(steps * rdp_a + math.log((a - 1) / a) - math.log(delta * a) / (a - 1))
    return min(epsilons)


# -----------------------------------------------------------------------------
# 1. one step: the Rényi divergence of the sampled Gaussian, at every real order

MAX_NODES = 2**17            # points of one integral; sigma = 0.2 would need more at orders above 1,700, and
                             # sigma = 1 above 20,000


def rdp(q: float, sigma: float, orders) -> np.ndarray:
    """RDP(a) = log(A_a) / (a - 1) of ONE step at each order a.     [Mironov, Talwar, Zhang 2019, Sec. 3.3]

        A_a = E_{z ~ N(0, sigma^2)} [ (1 + x)^a ],   1 + x = 1 - q + q exp((2z - 1) / (2 sigma^2))

    z is the noisy sum less what the other examples contribute, in units of C, along the gradient of the one
    example that differs, which is taken to have norm C. Without the example z has the density of
    N(0, sigma^2). With it, z has that of (1 - q) N(0, sigma^2) + q N(1, sigma^2), and 1 + x is the ratio of
    the second density to the first. So RDP(a) is the divergence of "with" from "without". The opposite
    divergence is not larger (ibid., Thm 5), so the result covers both.
    Shapes:    orders: array-like of reals > 1 -> array of the same shape
    Units:     q: sampling rate; sigma: noise / sensitivity; both without unit. The result is in nats
    Guarantee: n steps have RDP n * rdp(...), because composition adds up the RDP at each order
    Errors:    q outside [0, 1], sigma < 0 or an order <= 1 -> ValueError; sigma = 0 -> inf, q = 0 -> 0
    Example:   q=1, sigma=2, orders [8] -> [1.0], which is a / (2 sigma^2), the Gaussian without sampling
    """
    orders = np.asarray(orders, dtype=float)
    check(sigma=sigma)
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}, expected a sampling rate between 0 and 1")
    if not np.all((orders > 1) & np.isfinite(orders)):
        raise ValueError(f"orders = {orders}, expected finite numbers above 1")
    if q == 0:
        return np.zeros_like(orders)
    if sigma == 0:
        return np.full_like(orders, math.inf)
    if q == 1:
        return orders / (2 * sigma**2)
    return np.array([_log_A(q, sigma, a) / (a - 1) for a in orders.flat]).reshape(orders.shape)


def _log_A(q: float, sigma: float, a: float) -> float:
    """log A_a by the trapezoid rule over z in [-14 sigma, a + 14 sigma], for every real a > 1.

    E[x] = 0, so A_a - 1 = E[(1 + x)^a - 1 - a x]. By Bernoulli's inequality no value of this integrand is
    negative, so the sum cannot cancel. A tiny divergence is therefore as accurate as a large one, even when
    10^7 steps multiply it.
    The error of the rule behaves like exp(-2 pi d / step), where d = pi sigma^2 is the distance of the
    logarithm's branch point from the real axis. At a step of sigma^2 / 3 it is far below the precision of
    float64.
    """
    step = min(sigma, 2 * sigma**2) / 6
    if (a + 28 * sigma) / step > MAX_NODES:          # a large order: the Gaussian without sampling is a bound
        return (a - 1) * a / (2 * sigma**2)
    z = np.arange(-14 * sigma, a + 14 * sigma + step, step)
    u = (2 * z - 1) / (2 * sigma**2)
    x = q * np.expm1(np.minimum(u, 600))             # exp overflows at 709; log(1 + x) is linear from here on
    y = a * (np.log1p(x) + np.maximum(u - 600, 0))   # log (1 + x)^a

    # The integrand e^y - 1 - a x is computed in three ways. For a small a x it is computed by its series,
    # because the difference of nearly equal numbers loses digits. Up to y = 30 it is computed as it stands,
    # and beyond that as e^y (1 - (1 + a x) e^-y), in logarithms. np.where evaluates all three at every z, so
    # np.minimum and np.maximum keep those finite that are not used.
    small = np.abs(a * x) < 0.01
    s = np.where(small, x, 0)
    series = 1 + (a - 2) / 3 * s * (1 + (a - 3) / 4 * s * (1 + (a - 4) / 5 * s * (1 + (a - 5) / 6 * s)))
    series = a * (a - 1) / 2 * s**2 * series
    value = np.where(small, series, np.expm1(np.minimum(y, 30)) - a * x)
    log_value = np.where(y > 30, y + np.log1p(-(1 + a * x) * np.exp(-np.maximum(y, 30))),
                         np.log(np.maximum(value, 1e-300)))

    log_excess = logsumexp(log_value - z**2 / (2 * sigma**2))
    log_excess += math.log(step / (sigma * math.sqrt(2 * math.pi)))
    return float(np.logaddexp(0, log_excess)) * (1 + 1e-11)  # log(1 + (A_a - 1)), rounded up


# -----------------------------------------------------------------------------
# 2. many steps: compose, convert, search

LOG_ORDER = (math.log(1e-3), math.log(1e6))          # the range of orders to search, as log(a - 1)


def to_epsilon(rdp_total, orders, delta: float) -> tuple[float, float]:
    """(epsilon, best order): the smallest epsilon that any of the orders proves.

        epsilon = min_a RDP(a) + log((a - 1)/a) - (log(delta) + log(a)) / (a - 1)

    Source:  Canonne, Kamath, Steinke 2020, Prop. 12
    Shapes:  rdp_total: the composed RDP at orders, both (n,)
    Errors:  delta outside (0, 1), an order <= 1, a negative or NaN RDP -> ValueError
    Example: after 100 steps, to_epsilon(100 * rdp(q, sigma, orders), orders, delta)
    """
    rdp_total = np.atleast_1d(np.asarray(rdp_total, float))
    orders = np.atleast_1d(np.asarray(orders, float))
    check(delta=delta)
    if rdp_total.shape != orders.shape or not np.all(orders > 1) or not np.all(rdp_total >= 0):
        raise ValueError(f"RDP {rdp_total} at orders {orders}, expected one number >= 0 for each order > 1")
    epsilons = _convert(rdp_total, orders, delta)
    best = int(np.argmin(epsilons))
    return max(float(epsilons[best]), 0.0), float(orders[best])


def _convert(rdp_total, a, delta):
    return rdp_total + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)


def epsilon(q: float, sigma: float, steps: int, delta: float) -> tuple[float, float]:
    """(epsilon, best order), where `steps` steps of the sampled Gaussian are (epsilon, delta)-DP.

    Errors:  q outside (0, 1], sigma < 0, steps < 0 or not whole, delta outside (0, 1) -> ValueError;
             sigma = 0 -> (inf, nan); steps = 0 -> (0, nan); a best order at the range's edge -> a warning
    Example: q=.04, sigma=1.5, steps=2250, delta=1e-5 -> (7.32835, 3.94)
    """
    check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0, math.nan
    if sigma == 0:
        return math.inf, math.nan
    spent, order = _search([(q, sigma, steps)], delta)
    low, high = np.exp(LOG_ORDER)
    if spent > 0 and not 1.01 * low < order - 1 < 0.99 * high:
        warnings.warn(f"the best order, {order:.6g}, is at the edge of the range searched, so epsilon = "
                      f"{spent:.4g} is a valid but loose bound; change the noise multiplier or delta",
                      stacklevel=2)
    return spent, order


def composed_epsilon(runs: list[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of several published runs (q, sigma, steps) on the same images. RDP adds up at each order.

    Errors:  as `epsilon`; a run without noise -> inf
    Example: two runs of (.068267, .817942, 200), each 11.20 at delta=1e-5 -> 15.72
    """
    for q, sigma, steps in runs:
        check(q=q, sigma=sigma, steps=steps, delta=delta)
    return math.inf if any(sigma == 0 for _, sigma, _ in runs) else _search(runs, delta)[0]


def _search(runs, delta) -> tuple[float, float]:
    """(epsilon, best order), found by a line search over the orders.

    Every order gives a valid bound, so a search that stops early gives a loose bound and never a wrong one.
    (a - 1) times the expression in `to_epsilon` is convex in a, so the expression has one minimum.
    """
    def total(a: float) -> np.ndarray:
        return sum(steps * rdp(q, sigma, [a]) for q, sigma, steps in runs)

    def at(log_order: float) -> float:
        a = 1 + math.exp(log_order)
        return float(_convert(total(a), a, delta)[0])

    order = 1 + math.exp(minimize_scalar(at, bounds=LOG_ORDER, method="bounded", options={"xatol": 1e-3}).x)
    return to_epsilon(total(order), [order], delta)


def rdp_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """Like `epsilon`, but without the best order and without checks."""
    return _search([(q, sigma, steps)], delta)[0]


def calibrate(epsilon: float, delta: float, q: float, steps: int, cost: Callable = rdp_epsilon) -> float:
    """The smallest sigma (to 1 part in 10^5) with which `steps` steps cost at most the given epsilon.

    cost:      (q, sigma, steps, delta) -> epsilon, the bound to rely on; pld.pld_epsilon is a tighter one
    Guarantee: the epsilon of the returned sigma was computed, and it is at most the target
    Errors:    epsilon <= 0, or too small for any sigma -> ValueError; else as `epsilon`
    Example:   epsilon=10, delta=1e-5, q=.017, steps=200 -> 0.5465344
    """
    check(epsilon=epsilon, delta=delta, q=q, steps=steps)
    if steps == 0:
        return 0.0

    def gap(log_sigma: float) -> float:                                  # > 0: too little noise
        spent = cost(q, math.exp(log_sigma), steps, delta)
        return math.log(min(max(spent / epsilon, 0.01), 1e9))            # `spent` may be 0 or infinite

    low = high = 0.0                                                     # log sigma: too little, enough
    while gap(high) > 0:
        low, high = high, high + 1
        if high > 40:
            raise ValueError(f"epsilon = {epsilon} cannot be shown at delta = {delta} with any noise; "
                             f"ask for more epsilon, or for a larger delta")
    while gap(low) <= 0:
        low, high = low - 1, low
    sigma = math.exp(brentq(gap, low, high, xtol=1e-6))
    while cost(q, sigma, steps, delta) > epsilon:                        # brentq may stop on either side
        sigma *= 1 + 2e-6
    return sigma


LEAST_DELTA = 1e-300         # float64 has full precision down to 2e-308


def check(q=1.0, sigma=1.0, steps=1, delta=0.5, epsilon=1.0) -> None:
    """Raise ValueError for a number that has no meaning; NaN never has one."""
    if not 0 < q <= 1:
        raise ValueError(f"q = {q}, expected a sampling rate above 0 and at most 1")
    if not 0 <= sigma <= 1e100:                                          # its square is a float64, too
        raise ValueError(f"sigma = {sigma}, expected a noise multiplier from 0 to 1e100")
    if not (steps >= 0 and float(steps).is_integer()):
        raise ValueError(f"steps = {steps}, expected a whole number of steps >= 0")
    if not LEAST_DELTA <= delta < 1:
        raise ValueError(f"delta = {delta}, expected a probability, at least {LEAST_DELTA:g} and below 1")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon}, expected a finite number above 0")


# -----------------------------------------------------------------------------
# 3. as a program


def read_run(path: str) -> tuple[float, float, int]:
    """(q, sigma, steps) from a privacy.json, the privacy report of a run.

    Errors: another file, or a run without privacy -> ValueError
    """
    try:
        with open(path) as f:
            facts = json.load(f)
        run, private = (facts["q"], facts["sigma"], facts["steps"]), facts["private"]
        check(*run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a privacy.json ({screen.cause(error)}); expected one that "
                         f"train.py wrote") from None
    if not private:
        raise ValueError(f"{path} is of a run without privacy (--seed or --epsilon inf), so no epsilon "
                         f"covers it, alone or together with other runs; expected private runs only")
    return run


def compose(paths: list[str], delta: float) -> None:
    """Print what the runs of several privacy reports cost together."""
    runs = [read_run(path) for path in paths]
    print(f"{'run':<40} {'epsilon by RDP':>14}   at delta = {delta:g}")
    for path, run in zip(paths, runs):
        print(f"{path:<40} {screen.up(composed_epsilon([run], delta), 6):>14}")
    print(f"{'all of them, on the same images':<40} {screen.up(composed_epsilon(runs, delta), 6):>14}")
    print("python pld.py, with the same files, gives a tighter bound")


def show_table(q: float, steps: int, delta: float) -> None:
    """Print epsilon against steps, with the noise that keeps epsilon = 10 after `steps` of them."""
    sigma = calibrate(10.0, delta, q, steps)
    print(f"q = {q:.6g}, sigma = {sigma:.6g}, delta = {delta:g}: epsilon = 10 after {steps} steps. "
          f"Epsilon grows more slowly than the steps")
    print("best order: the order of the Rényi divergence whose bound on epsilon is the smallest\n")
    print(f"{'steps':>9}  {'epsilon':>9}  {'best order':>10}")
    for n in sorted({1, 10, 100, 1_000, 10_000, 100_000, steps}):
        spent, order = epsilon(q, sigma, n, delta)
        print(f"{n:>9}  {screen.up(spent, 6):>9}  {order:>10.2f}")


def main() -> None:
    parser = screen.Parser(__doc__)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--epsilon", type=float, help="the budget; prints the noise multiplier that keeps it")
    goal.add_argument("--sigma", type=float, help="the noise multiplier; prints the epsilon that it costs")
    parser.add_argument("--delta", type=float, default=1e-5, help="the delta of (epsilon, delta)")
    parser.add_argument("--q", type=float, default=512 / 60_000, help="the sampling rate B/N")
    parser.add_argument("--steps", type=int, default=110, help="the number of steps of one run")
    parser.add_argument("compose", nargs="*", metavar="compose A/privacy.json B/privacy.json",
                        help="prints what several runs on the same images cost together")
    a = parser.parse_args()
    with screen.one_line(parser.prog, "close other programs"):
        if a.compose:
            if a.compose[0] != "compose" or len(a.compose) < 2:
                raise ValueError(f"{a.compose[0]}: expected compose A/privacy.json B/privacy.json ...")
            for name in ("epsilon", "sigma", "q", "steps"):
                if getattr(a, name) != parser.get_default(name):
                    raise ValueError(f"--{name} {getattr(a, name):g}: expected it without compose, which "
                                     f"reads it from the files")
            return compose(a.compose[1:], a.delta)
        check(q=a.q, delta=a.delta, steps=a.steps)
        if a.epsilon is None and a.sigma is None:
            if a.steps < 1:
                raise ValueError(f"--steps {a.steps}: expected at least 1 for the table")
            return show_table(a.q, a.steps, a.delta)
        sigma = a.sigma if a.epsilon is None else calibrate(a.epsilon, a.delta, a.q, a.steps)
        spent, order = epsilon(a.q, sigma, a.steps, a.delta)
        print(f"q = {a.q:g}, steps = {a.steps}, delta = {a.delta:g}")
        shown = screen.up(sigma, 7) if a.sigma is None else f"{sigma:g}"         # more noise, less epsilon
        print(f"sigma = {shown}  ->  epsilon = {screen.up(spent, 6)}, proved at order {order:.4g}")


if __name__ == "__main__":
    main()
