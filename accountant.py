"""accountant.py -- (q, sigma, steps, delta) to epsilon, and back.

The sampled Gaussian mechanism: each step sums over a Poisson sample of rate q and adds noise sigma * C.
Rényi accounting (Mironov, Talwar, Zhang 2019), converted by Canonne, Kamath, Steinke 2020, Prop. 12.
Neighbours differ by one example, added or removed. All figures are upper bounds, except `gdp_epsilon`.

  $ python accountant.py                                                         # epsilon against steps
  $ python accountant.py --epsilon 10 --delta 1e-5 --q 0.017 --steps 200         # -> the noise: sigma = 0.546534
  $ python accountant.py --sigma 0.64 --delta 1e-5 --q 0.017 --steps 200         # -> epsilon = 6.40872
  $ python accountant.py --compare                                               # beside a tighter bound
  $ python accountant.py compose A/privacy.json B/privacy.json                   # two runs on the same images
"""
import argparse
import json
import math
import warnings

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr, logsumexp, ndtr

# -----------------------------------------------------------------------------
# 1. one step: the Rényi divergence of the sampled Gaussian

MAX_NODES = 2**17            # of one integral; sigma = 0.2 needs more from order 1700, sigma = 1 from order 20,000


def rdp(q: float, sigma: float, orders) -> np.ndarray:
    """RDP(a) = log(A_a) / (a - 1) of ONE step at each order a.              [Mironov, Talwar, Zhang 2019, Sec. 3.3]

        A_a = E_{z ~ N(0, sigma^2)} [ (1 + x)^a ],   1 + x = 1 - q + q exp((2z - 1) / (2 sigma^2))

    Removing the example is the worse direction (ibid., Thm 5), so this covers adding it, too.
    Shapes:    orders: array-like of reals > 1 -> array of the same shape
    Units:     q: sampling rate; sigma: noise / sensitivity; both without unit. The result is in nats
    Guarantee: n steps have RDP n * rdp(...): composition adds, at each order by itself
    Errors:    q outside [0, 1], sigma < 0 or an order <= 1 -> ValueError; sigma = 0 -> inf, q = 0 -> 0
    Example:   q=1, sigma=2, orders [8] -> [1.0], as for the Gaussian, a / (2 sigma^2)
    """
    orders = np.asarray(orders, dtype=float)
    _check(sigma=sigma)
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

    E[x] = 0, so A_a - 1 = E[(1 + x)^a - 1 - a x]. By Bernoulli's inequality no value of that is negative:
    the sum cannot cancel, and a tiny divergence is as accurate as a large one, even times 10^7 steps.
    The rule's error is like exp(-2 pi d / step), d = pi sigma^2 being the distance of the logarithm's
    branch point from the real axis: at a step of sigma^2 / 3 it is far below float64's precision.
    """
    step = min(sigma, 2 * sigma**2) / 6
    if (a + 28 * sigma) / step > MAX_NODES:          # almost no noise: the unsampled Gaussian is an upper bound
        return (a - 1) * a / (2 * sigma**2)
    z = np.arange(-14 * sigma, a + 14 * sigma + step, step)
    u = (2 * z - 1) / (2 * sigma**2)
    x = q * np.expm1(np.minimum(u, 600))             # exp overflows at 709; log(1 + x) is linear in u from here on
    y = a * (np.log1p(x) + np.maximum(u - 600, 0))   # log (1 + x)^a

    small = np.abs(a * x) < 0.01                     # here the difference cancels: its binomial series from x^2 on
    s = np.where(small, x, 0)
    series = 1 + (a - 2) / 3 * s * (1 + (a - 3) / 4 * s * (1 + (a - 4) / 5 * s * (1 + (a - 5) / 6 * s)))
    series = a * (a - 1) / 2 * s**2 * series
    value = np.where(small, series, np.expm1(np.minimum(y, 30)) - a * x)
    log_value = np.where(y > 30, y + np.log1p(-(1 + a * x) * np.exp(-np.maximum(y, 30))),
                         np.log(np.maximum(value, 1e-300)))

    log_excess = logsumexp(log_value - z**2 / (2 * sigma**2)) + math.log(step / (sigma * math.sqrt(2 * math.pi)))
    return float(np.logaddexp(0, log_excess))        # log(1 + (A_a - 1))


# -----------------------------------------------------------------------------
# 2. many steps: compose, convert, search

LOG_ORDER = (math.log(1e-3), math.log(1e6))          # the orders searched, as log(a - 1)


def to_epsilon(rdp_total, orders, delta: float) -> tuple[float, float]:
    """(epsilon, best order): the smallest epsilon that any of the orders proves.

        epsilon = min_a RDP(a) + log((a - 1)/a) - (log(delta) + log(a)) / (a - 1)      [Canonne et al. 2020, Prop. 12]

    Shapes:  rdp_total: the composed RDP at orders, both (n,)
    Errors:  delta outside (0, 1), an order <= 1, a negative or NaN RDP -> ValueError
    Example: after 100 steps, to_epsilon(100 * rdp(q, sigma, orders), orders, delta)
    """
    rdp_total, orders = np.atleast_1d(np.asarray(rdp_total, float)), np.atleast_1d(np.asarray(orders, float))
    _check(delta=delta)
    if rdp_total.shape != orders.shape or not np.all(orders > 1) or not np.all(rdp_total >= 0):
        raise ValueError(f"RDP {rdp_total} at orders {orders}, expected one number >= 0 for each order above 1")
    epsilons = _convert(rdp_total, orders, delta)
    best = int(np.argmin(epsilons))
    return max(float(epsilons[best]), 0.0), float(orders[best])


def _convert(rdp_total, a, delta):
    return rdp_total + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)


def epsilon(q: float, sigma: float, steps: int, delta: float) -> tuple[float, float]:
    """(epsilon, best order) after `steps` steps of the sampled Gaussian: (epsilon, delta)-DP.

    Errors:  q outside (0, 1], sigma < 0, steps < 0 or not whole, delta outside (0, 1) -> ValueError;
             sigma = 0 -> (inf, nan); steps = 0 -> (0, nan); a best order at the edge of the range -> a warning
    Example: q=.04, sigma=1.5, steps=2250, delta=1e-5 -> (7.32835, 3.94)
    """
    _check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0, math.nan
    if sigma == 0:
        return math.inf, math.nan
    spent, order = _search([(q, sigma, steps)], delta)
    low, high = np.exp(LOG_ORDER)
    if spent > 0 and not 1.01 * low < order - 1 < 0.99 * high:
        warnings.warn(f"the best order, {order:.6g}, is at the edge of the range searched: epsilon = {spent:.4g} "
                      "holds but is loose; take less or more noise, or another delta", stacklevel=2)
    return spent, order


def composed_epsilon(runs: list[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of several runs (q, sigma, steps) on the same images, all published: RDP adds, order by order.

    Errors:  as `epsilon`; no noise in one of them -> inf
    Example: two runs of (.068267, .817942, 200), each 11.20 at delta=1e-5 -> 15.72
    """
    for q, sigma, steps in runs:
        _check(q=q, sigma=sigma, steps=steps, delta=delta)
    return math.inf if any(sigma == 0 for _, sigma, _ in runs) else _search(runs, delta)[0]


def _search(runs, delta) -> tuple[float, float]:
    """The best order by a line search instead of a grid. Any order is valid: stopping early is loose, never unsafe.

    (a - 1) times the expression in `to_epsilon` is convex in a, so the expression has one valley.
    """
    def total(a: float) -> np.ndarray:
        return sum(steps * rdp(q, sigma, [a]) for q, sigma, steps in runs)

    def at(log_order: float) -> float:
        a = 1 + math.exp(log_order)
        return float(_convert(total(a), a, delta)[0])

    order = 1 + math.exp(minimize_scalar(at, bounds=LOG_ORDER, method="bounded", options={"xatol": 1e-3}).x)
    return to_epsilon(total(order), [order], delta)


def calibrate(epsilon: float, delta: float, q: float, steps: int, bound: str = "rdp") -> float:
    """The smallest sigma (to 1 part in 10^5) whose `steps` steps cost at most the given epsilon; bound: "rdp" or "pld".

    Guarantee: the sigma returned was itself checked: its epsilon is <= the target, never a hair above
    Errors:    epsilon <= 0, and as `epsilon` -> ValueError; an epsilon too small for any sigma -> ValueError
    Example:   epsilon=10, delta=1e-5, q=.017, steps=200 -> 0.546534
    """
    _check(epsilon=epsilon, delta=delta, q=q, steps=steps)
    if steps == 0:
        return 0.0

    def cost(sigma: float) -> float:
        if bound == "pld":
            return pld_epsilon(q, sigma, steps, delta)
        return _search([(q, sigma, steps)], delta)[0]

    def gap(log_sigma: float) -> float:                                  # > 0: over the target
        return math.log(min(max(cost(math.exp(log_sigma)) / epsilon, 0.01), 1e9))

    if bound not in ("rdp", "pld"):
        raise ValueError(f"bound = {bound!r}, expected 'rdp' or 'pld'")
    way = 1 if gap(0.0) > 0 else -1                                      # from sigma = 1 towards the target
    end = way
    while gap(end) * way > 0:
        end += way
        if end > 40:
            raise ValueError(f"epsilon = {epsilon} cannot be shown at delta = {delta} with any noise: ask for more")
    sigma = math.exp(brentq(gap, end - way, end, xtol=1e-6))
    while cost(sigma) > epsilon:                                         # brentq may stop on either side
        sigma *= 1 + 2e-6
    return sigma


LEAST_DELTA = 1e-300         # float64 has full precision down to 2e-308


def _check(**given) -> None:
    """ValueError, in plain words, for a number that has no meaning; NaN never has one."""
    rules = {
        "q": (lambda v: 0 < v <= 1, "a sampling rate above 0, at most 1"),
        "sigma": (lambda v: 0 <= v < math.inf, "a finite noise multiplier >= 0"),
        "steps": (lambda v: v >= 0 and float(v).is_integer(), "a whole number of steps >= 0"),
        "delta": (lambda v: LEAST_DELTA <= v < 1, f"a probability strictly between {LEAST_DELTA:g} and 1"),
        "epsilon": (lambda v: 0 < v < math.inf, "a finite number above 0"),
    }
    for name, value in given.items():
        valid, expected = rules[name]
        if not valid(value):
            raise ValueError(f"{name} = {value}, expected {expected}")


# -----------------------------------------------------------------------------
# 3. three second opinions

PLD_POINTS = 3**13           # grid points of the loss, 1.6 million; odd: the grid is symmetric about loss 0


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of ONE unsampled Gaussian of sensitivity 1, the floor of any bound.   [Balle & Wang 2018, Thm 8]

        delta(epsilon) = Phi(1/(2 sigma) - epsilon sigma) - e^epsilon Phi(-1/(2 sigma) - epsilon sigma)
    """
    _check(sigma=sigma, delta=delta)
    if sigma == 0:
        return math.inf

    def gap(e: float) -> float:
        log_first = log_ndtr(1 / (2 * sigma) - e * sigma)
        log_second = e + log_ndtr(-1 / (2 * sigma) - e * sigma)
        return log_first + math.log(max(-math.expm1(log_second - log_first), 1e-300)) - math.log(delta)

    high = 1.0
    while gap(high) > 0:
        high *= 2
    return 0.0 if gap(0.0) <= 0 else float(brentq(gap, 0.0, high, xtol=1e-13))


def gdp_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """The central-limit APPROXIMATION, mu = q sqrt(steps (e^(1/sigma^2) - 1)).   NOT A BOUND.   [Bu et al. 2020]

    To be looked at, never to be promised: it can lie below the true epsilon.
    """
    _check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0
    if sigma < 0.04:                                                     # e^(1/sigma^2) overflows
        return math.inf
    return gaussian_epsilon(1 / (q * math.sqrt(steps * math.expm1(1 / sigma**2))), delta)


def pld_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """A tighter epsilon: the privacy loss distribution itself, composed by FFT.   [Koskela et al. 2020; Gopi et al. 2021]

    Takes nothing from `rdp` but the width of its window and its tilt: a second opinion, not what we report.
    Guarantee: every rounding goes to the safe side, for the removed and for the added example, float64's too:
               the FFT's error is bounded and added to delta, at any delta (see _composed_epsilon)
    Errors:    as `epsilon`
    Example:   q=.04, sigma=1.5, steps=2250, delta=1e-5 -> 6.76878
    """
    _check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    return max(_removed_and_added(q, sigma, steps, delta))


def _removed_and_added(q, sigma, steps, delta) -> tuple[float, float]:
    """`pld_epsilon` for the example removed, and for the example added: both are computed, the larger counts."""
    # the window [-L, L]: by Markov's inequality the total loss exceeds L with probability below delta / 10^6
    orders = 1 + np.geomspace(1e-3, 1e6, 120)
    divergence = steps * rdp(q, sigma, orders)
    windows = divergence + math.log(1e6 / delta) / (orders - 1)
    L, far = windows.min(), orders[windows.argmin()] - 1
    half = PLD_POINTS // 2
    tilt = _tilt(orders - 1, divergence, delta, math.log(FFT_ERROR * (steps + 2) * half**0.5))
    loss = np.arange(-half, half + 1) * (L / half)

    # the loss log(1 - q + q e^u) increases with z: the cells between grid points are cells of z, two are open
    lowest = math.log1p(-q) if q < 1 else -math.inf
    z = np.full(loss.shape, -math.inf)
    l = loss[loss > lowest]
    z[loss > lowest] = sigma**2 * (l + np.log(-np.expm1(lowest - l)) - math.log(q)) + 0.5
    edges = np.r_[-math.inf, z, math.inf]
    without, error_without = _normal_mass(edges / sigma)   # under N(0, sigma^2), (PLD_POINTS + 1,)
    shifted, error_shifted = _normal_mass((edges - 1) / sigma)
    present, error_present = (1 - q) * without + q * shifted, (1 - q) * error_without + q * error_shifted
    removed = present, without, error_present, error_without
    added = without[::-1], present[::-1], error_without[::-1], error_present[::-1]   # loss -> -loss
    return tuple(_composed_epsilon(*pair, loss, steps, delta, tilt, far) for pair in (removed, added))


def _tilt(tilts, divergence, delta, log_error) -> float:
    """The smallest tilt that keeps the FFT's error below delta / 10^7 near epsilon (Chernoff's bound).

    No larger: the more tilt, the more of the mass lies beyond the window, and is counted in full.
    """
    about = np.min(divergence - math.log(delta) / tilts)                 # RDP's epsilon, or a little more
    chernoff = tilts * (divergence - about)                          # log of E[e^(tilt (total - epsilon))]
    enough = chernoff + log_error < math.log(delta) - math.log(1e7)
    return tilts[enough.argmax()] if enough.any() else tilts[chernoff.argmin()]


EPS = 2.0**-52               # float64's spacing at 1: a rounding errs by half of it at most, relatively
# relative L2 error of one transform; proved for powers of 2: 7 log2(n) EPS / 2    [Higham 2002, Thm 24.2]
FFT_ERROR = 10 * math.log2(PLD_POINTS) * EPS


def _composed_epsilon(P, Q, error_P, error_Q, loss, steps, delta, tilt, far) -> float:
    """Epsilon of `steps` steps; P, Q: the masses, cell by cell of the grid `loss`, whose loss is log(dP/dQ).

    A cell's mass moves to the two ends of the cell so that its P-mass and its Q-mass both stay: a pair that is
    never less revealing, and far closer than rounding up.                [Doroshenko et al. 2022, "connect the dots"]
    The first cell lies below the grid and is rounded up to its first point; the last lies above: loss infinity.

    What is composed is the tilted mass e^(tilt loss) mass / M, which lies nearer to epsilon: the FFT's error,
    a share of all that it transforms, becomes small beside delta, and is added to it. In L2, f = FFT_ERROR:
        |error of the total|  <=  f (steps |tilted| + |total|)  <=  f (steps + 1) |tilted|
    """
    inner, step = P[1:-1], min(loss[1] - loss[0], 700)
    growth = np.exp(np.minimum(loss[1:], 700))
    rounding = error_Q[1:-1] * growth + error_P[1:-1]                    # goes to the upper end, to be safe
    lower = (Q[1:-1] * growth - inner - rounding) / math.expm1(step)
    lower = np.clip(lower, 0, inner)                                     # the share of the lower end
    mass = np.r_[P[0] + lower[0], inner[:-1] - lower[:-1] + lower[1:], inner[-1] - lower[-1]]

    # what the grid cannot show counts in full: a step of infinite loss, a total beyond the last point (Markov again)
    log_mass = np.log(np.maximum(mass, 1e-300))
    log_moment = logsumexp(far * loss + log_mass)
    lost = -math.expm1(steps * math.log1p(-P[-1])) + math.exp(min(steps * log_moment - far * loss[-1], 0))

    log_M = logsumexp(tilt * loss + log_mass)
    tilted = np.exp(tilt * loss + log_mass - log_M)
    spectrum = np.fft.rfft(np.fft.ifftshift(tilted))
    total = np.fft.fftshift(np.fft.irfft(spectrum ** float(steps), len(loss))).clip(min=0)
    error = FFT_ERROR * (steps + 2) * float(np.linalg.norm(tilted))      # + 1: of the power
    untilted = total * np.exp(np.minimum(steps * log_M - tilt * loss, 30))    # delta > 1: no matter

    def gap(e: float) -> float:                                          # log of delta(e) / delta: almost a line
        above = np.searchsorted(loss, e)                                 # delta(e) = E_P[(1 - exp(e - loss))_+]
        seen = float(untilted[above:] @ -np.expm1(e - loss[above:]))
        cells = min(-1 / math.expm1(-2 * tilt * step), len(loss) / 2)    # sum of e^(-2 tilt (loss - e))
        weight = math.exp(min(steps * log_M - tilt * e, 30)) * math.sqrt(cells)
        rounded = 1 + 100 * EPS * steps                                  # of the masses and of M
        return math.log(lost + (seen + error * weight) * rounded) - math.log(delta)

    if not gap(loss[-1]) <= 0:
        return math.inf
    if gap(0.0) <= 0:
        return 0.0
    return float(brentq(gap, 0.0, loss[-1], xtol=1e-11, rtol=1e-11)) * (1 + 2e-11) + 2e-11


def _normal_mass(edges):
    """Phi(b) - Phi(a) for edges a <= b, taken in the tail where both are small; and its rounding error."""
    a, b = edges[:-1], edges[1:]
    high, low = np.where(a > 0, ndtr(-a), ndtr(b)), np.where(a > 0, ndtr(-b), ndtr(a))
    return np.maximum(high - low, 0), 4 * EPS * high


# -----------------------------------------------------------------------------
# 4. what the noise's own arithmetic adds to delta


REACH = math.sqrt(2 * 53 * math.log(2))          # 8.57 sigma: Box-Muller's longest pair, uniforms of 53 bits


def tail(q: float, sigma: float, steps: int, reach: float = REACH) -> float:
    """What no epsilon covers, to be added to delta: a bound on P(the noise had to reach beyond its reach).

    A release further from the other images' sum than reach * sigma * C shows, beyond doubt, that the image
    was in the lot. The image moves a pair of coordinates by 1 / sigma at most, in a step with probability q,
    so the pair itself must exceed reach - 1 / sigma; a pair of normals has P(length > r) = exp(-r^2 / 2).
    Example: q=1, sigma=0.4526, one step -> 1.7e-9; with float32's 24 bits, reach 5.768 -> 1.8e-3
    """
    _check(q=q, sigma=sigma, steps=steps)
    room = max(reach - 1 / sigma, 0.0) if sigma > 0 else 0.0
    return min(steps * q * math.exp(-room**2 / 2), 1.0)


# -----------------------------------------------------------------------------
# 5. as a program


def compose(paths: list[str], delta: float) -> None:
    """Print what several privacy.json cost together."""
    runs = []
    print(f"{'run':<40} {'epsilon by RDP':>14}   at delta = {delta:g}")
    for path in paths:
        try:
            with open(path) as f:
                facts = json.load(f)
            runs.append((facts["q"], facts["sigma"], facts["steps"]))
            one = composed_epsilon(runs[-1:], delta)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a privacy.json ({type(error).__name__}); expected one that "
                             f"train.py wrote") from None
        print(f"{path:<40} {one:>14.4f}")
    print(f"{'all of them, on the same images':<40} {composed_epsilon(runs, delta):>14.4f}")
    if len(set(runs)) == 1:
        q, sigma, steps = runs[0]
        print(f"{'the same, tighter (PLD)':<40} {pld_epsilon(q, sigma, len(runs) * steps, delta):>14.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="(q, sigma, steps, delta) to epsilon, and back.")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--epsilon", type=float, help="the budget: prints the noise multiplier that keeps it")
    goal.add_argument("--sigma", type=float, help="the noise multiplier: prints the epsilon it costs")
    parser.add_argument("--delta", type=float, default=1e-5, help="default 1e-5")
    parser.add_argument("--q", type=float, default=0.017, help="sampling rate, lot size / data size; default 0.017")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--compare", action="store_true", help="print a tighter bound and an approximation, too")
    parser.error = lambda message: parser.exit(2, f"accountant.py: {message}\n")      # one line, exit code 2
    parser.add_argument("compose", nargs="*", metavar="compose A/privacy.json B/privacy.json",
                        help="what several runs on the same images cost together")
    args = parser.parse_args()
    try:
        if args.compose:
            if args.compose[0] != "compose" or len(args.compose) < 2:
                raise ValueError(f"{args.compose[0]}: expected compose A/privacy.json B/privacy.json ...")
            return compose(args.compose[1:], args.delta)
        _check(q=args.q, delta=args.delta, steps=args.steps)
        sigma = args.sigma if args.epsilon is None else calibrate(args.epsilon, args.delta, args.q, args.steps)
        if sigma is not None:
            spent, order = epsilon(args.q, sigma, args.steps, args.delta)
            print(f"q = {args.q:g}, steps = {args.steps}, delta = {args.delta:g}")
            print(f"sigma = {sigma:.6g}  ->  epsilon = {spent:.6g}, proved at order {order:.4g}")
        if args.compare:
            show_comparison(SETTINGS if sigma is None else [(args.q, sigma, args.steps, args.delta)])
        elif sigma is None:
            show_table(args.q, 1.0, args.delta)
    except ValueError as error:
        parser.error(str(error))


def show_table(q: float, sigma: float, delta: float) -> None:
    print(f"q = {q:g}, sigma = {sigma:g}, delta = {delta:g}: epsilon grows more slowly than the steps, "
          "and the order that proves it falls\n")
    print(f"{'steps':>9}  {'epsilon':>9}  {'best order':>10}")
    for steps in (1, 10, 100, 1_000, 10_000, 100_000):
        spent, order = epsilon(q, sigma, steps, delta)
        print(f"{steps:>9}  {spent:>9.4f}  {order:>10.2f}")


SETTINGS = [(0.017, 0.64, 200, 1e-5), (0.034, 1.7, 93, 1e-5), (0.04, 1.5, 2250, 1e-5), (0.004, 0.8, 5000, 1e-5),
            (0.05, 20.0, 1000, 1e-6)]


def show_comparison(settings) -> None:
    print("      q    sigma   steps   delta   RDP (ours) tight (PLD)  CLT, not a bound")
    for q, sigma, steps, delta in settings:
        print(f"{q:>7g} {sigma:>8.4g} {steps:>7} {delta:>7g}   {epsilon(q, sigma, steps, delta)[0]:>10.4f} "
              f"{pld_epsilon(q, sigma, steps, delta):>11.4f} {gdp_epsilon(q, sigma, steps, delta):>17.4f}")


if __name__ == "__main__":
    main()
