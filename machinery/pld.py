"""pld.py -- second opinions on epsilon: a tighter bound, the exact Gaussian, an approximation.

No run relies on them unless it is told to (--accountant pld); accountant.py is what is promised by default.

  $ python -m machinery.pld                                                # five settings, three answers each
  $ python -m machinery.pld --q 0.017 --sigma 0.64 --steps 200 --delta 1e-5
"""
import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr

import accountant
from accountant import check
from machinery import screen

PLD_POINTS = 3**13           # grid points of the loss, 1.6 million; odd: the grid is symmetric about loss 0


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of ONE unsampled Gaussian of sensitivity 1.               [Balle & Wang 2018, Thm 8]

        delta(epsilon) = Phi(1/(2 sigma) - epsilon sigma) - e^epsilon Phi(-1/(2 sigma) - epsilon sigma)
    """
    check(sigma=sigma, delta=delta)
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
    """The central-limit APPROXIMATION, mu = q sqrt(steps (e^(1/sigma^2) - 1)). NOT A BOUND.  [Bu et al. 2020]

    To be looked at, never to be promised: it can lie below the true epsilon.
    """
    check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0
    if sigma < 0.04:                                                     # e^(1/sigma^2) overflows
        return math.inf
    return gaussian_epsilon(1 / (q * math.sqrt(steps * math.expm1(1 / sigma**2))), delta)


def pld_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """A tighter epsilon: the privacy loss distribution itself, composed by FFT.

    Takes nothing from `rdp` but the width of its window and its tilt: a second opinion, not what we report.
    Source:    Koskela et al. 2020; Gopi et al. 2021
    Guarantee: every rounding goes to the safe side, for the removed and for the added example, float64's too:
               the FFT's error is bounded and added to delta, at any delta (see _composed_epsilon)
    Errors:    as `epsilon`
    Example:   q=.04, sigma=1.5, steps=2250, delta=1e-5 -> 6.76878
    """
    check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    return max(_removed_and_added(q, sigma, steps, delta))


def _removed_and_added(q, sigma, steps, delta) -> tuple[float, float]:
    """`pld_epsilon` for the example removed, and for the example added: the larger counts."""
    # the window [-L, L]: by Markov's inequality the total loss exceeds L with probability below delta / 10^6
    orders = 1 + np.geomspace(1e-3, 1e6, 120)
    divergence = steps * accountant.rdp(q, sigma, orders)
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

    A cell's mass moves to the two ends of the cell so that its P-mass and its Q-mass both stay: a pair that
    is never less revealing, and far closer than rounding up.     [Doroshenko et al. 2022, "connect the dots"]
    The first cell lies below the grid and is rounded up to its first point; the last lies above: its loss is
    infinity.

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

    # what the grid cannot show counts in full: a step of infinite loss, a total beyond its end (Markov)
    log_mass = np.log(np.maximum(mass, 1e-300))
    log_moment = logsumexp(far * loss + log_mass)
    lost = -math.expm1(steps * math.log1p(-P[-1])) + math.exp(min(steps * log_moment - far * loss[-1], 0))

    log_M = logsumexp(tilt * loss + log_mass)
    tilted = np.exp(tilt * loss + log_mass - log_M)
    spectrum = np.fft.rfft(np.fft.ifftshift(tilted))
    total = np.fft.fftshift(np.fft.irfft(spectrum ** float(steps), len(loss))).clip(min=0)
    error = FFT_ERROR * (steps + 2) * float(np.linalg.norm(tilted))      # + 1: of the power
    untilted = total * np.exp(np.minimum(steps * log_M - tilt * loss, 30))    # delta > 1: no matter

    def gap(e: float) -> float:                                      # log of delta(e) / delta: almost a line
        above = np.searchsorted(loss, e)                             # delta(e) = E_P[(1 - exp(e - loss))_+]
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


SETTINGS = [(0.017, 0.64, 200, 1e-5), (0.034, 1.7, 93, 1e-5), (0.04, 1.5, 2250, 1e-5),
            (0.004, 0.8, 5000, 1e-5), (0.05, 20.0, 1000, 1e-6)]


def show_comparison(settings) -> None:
    """RDP beside PLD and the approximation."""
    print("      q    sigma   steps   delta   RDP (ours) tight (PLD)  CLT, not a bound")
    for q, sigma, steps, delta in settings:
        print(f"{q:>7g} {sigma:>8.4g} {steps:>7} {delta:>7g}   "
              f"{accountant.epsilon(q, sigma, steps, delta)[0]:>10.4f} "
              f"{pld_epsilon(q, sigma, steps, delta):>11.4f} {gdp_epsilon(q, sigma, steps, delta):>17.4f}")


def main() -> None:
    parser = screen.Parser(__doc__)
    parser.add_argument("--sigma", type=float, help="the noise multiplier (default: a table of settings)")
    parser.add_argument("--delta", type=float, default=1e-5, help="a probability")
    parser.add_argument("--q", type=float, default=0.017, help="sampling rate, lot size / data size")
    parser.add_argument("--steps", type=int, default=200, help="of n equal runs on the same images: n times")
    a = parser.parse_args()
    with screen.one_line(parser.prog, "no more can be lowered"):
        show_comparison(SETTINGS if a.sigma is None else [(a.q, a.sigma, a.steps, a.delta)])


if __name__ == "__main__":
    main()
