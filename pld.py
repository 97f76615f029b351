"""pld.py -- second opinions on epsilon: a tighter bound, the exact Gaussian, an approximation.

A run relies on the bound of accountant.py, unless it is told to rely on the tighter one here (--accountant
pld).

  $ python pld.py                                          # five settings, three answers each
  $ python pld.py --q 0.017 --sigma 0.64 --steps 200 --delta 1e-5
  $ python pld.py A/privacy.json B/privacy.json            # what two runs on the same images cost
  $ python pld.py A/privacy.json --images 2                # a person with two images
"""
import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr
from scipy.stats import ncx2

import accountant
from accountant import check
from machinery import screen
from machinery.secret import FINE

PLD_POINTS = 3**13           # 1.6 million points of the loss; odd, so that the grid is symmetric about loss 0


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of ONE Gaussian of sensitivity 1, without sampling.       [Balle & Wang 2018, Thm 8]

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

    It can lie below the true epsilon, so it must never be promised.
    """
    check(q=q, sigma=sigma, steps=steps, delta=delta)
    if steps == 0:
        return 0.0
    if sigma < 0.04:                                                     # e^(1/sigma^2) overflows
        return math.inf
    return gaussian_epsilon(1 / (q * math.sqrt(steps * math.expm1(1 / sigma**2))), delta)


def pld_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """A tighter bound on epsilon, from the distribution of the privacy loss itself, composed by FFT.

    The distribution is computed without `rdp`, which only chooses the window and two exponents (far, tilt).
    The result is the smaller of this bound and RDP's, because both are upper bounds.
    Source:    Koskela et al. 2020; Gopi et al. 2021
    Guarantee: every rounding goes to the safe side, for the removed and for the added example. This includes
               the rounding of float64: a bound on the FFT's error is added to delta. For lengths that are
               powers of 2 such a bound is proved. Ours is almost three times as large, and for our length it
               is tested and not proved (FFT_ERROR, _composed_epsilon; tests/test_pld.py)
               The normals are taken for Gaussian; machinery/secret.py:tail bounds what the difference adds to
               delta
    Errors:    as `epsilon`
    Example:   q=.04, sigma=1.5, steps=2250, delta=1e-5 -> 6.76878
    """
    check(q=q, sigma=sigma, steps=steps, delta=delta)
    return _gaussian([(q, sigma, steps)], delta, 1)


def joint_epsilon(runs, delta: float, images: int = 1) -> float:
    """Epsilon of several runs on the same images, where neighbours differ by `images` images.

    A person with k images is in a lot j times, j ~ Binomial(k, q), and then moves the sum by at most j C. One
    step is therefore N(0, sigma^2) against a mixture of N(j, sigma^2).
    Source:    Ganesh 2024, "Tight group-level DP guarantees for DP-SGD with sampling", Thm 1.1
    Shapes:    runs: a list of (q, sigma, steps)
    Guarantee: as `pld_epsilon`, and also for the normals of machinery/secret.py, of which very long ones are
               not Gaussian (`_too_far`)
    Errors:    images not whole, below 1 or above 1000 -> ValueError; else as `epsilon`
    Example:   [(.00853, .4526, 110)], delta=1e-5, images=2 -> 14.93, less than twice the 8.13 of one image
    """
    for q, sigma, steps in runs:
        check(q=q, sigma=sigma, steps=steps, delta=delta)
    if not 1 <= images <= 1000 or int(images) != images:
        raise ValueError(f"images = {images}, expected a whole number from 1 to 1000")
    runs = [run for run in runs if run[2] > 0]
    if not runs:
        return 0.0
    if any(sigma == 0 for _, sigma, _ in runs):
        return math.inf
    delta -= _too_far(runs, images) * (1 + 1e-10)
    return _gaussian(runs, delta, images) + 2 * UNSEEN if delta > 0 else math.inf


def _gaussian(runs, delta: float, images: int) -> float:
    """`joint_epsilon` for exact Gaussian noise."""
    runs = [run for run in runs if run[2] > 0]
    if not runs:
        return 0.0
    if any(sigma == 0 for _, sigma, _ in runs):
        return math.inf
    tight = max(_removed_and_added(runs, delta, images))
    if images > 1:
        return tight
    # both are bounds; RDP's is the smaller one where the grid is too coarse
    return min(tight, accountant.composed_epsilon(runs, delta))


UNSEEN = 1e-6                # at most twice this is added to epsilon, for normals that are not Gaussian
MOST_PAIRS = 2**28           # of normals in a step; a network of 2^28 weights has half as many


def _too_far(runs, images: int) -> float:
    """What normals that are not Gaussian add to delta, where one person has `images` images.

    A pair of the normals of machinery/secret.py is longer than FINE with probability tau = 2^-100. Shorter
    pairs are taken for Gaussian. Of longer ones nothing is assumed, and the probability that there is one is
    added to delta. In units of sigma C, j images in a lot move the sum by at most j / sigma. Let A(J) be the
    set of noisy sums that no pair longer than FINE is needed for if J is the set of the person's images in
    the lot.

    Removed: the sums outside A(none) may be impossible without the person, so their probability with the
             person is added to delta. A pair that is moved by s is longer than FINE with probability f(s^2) =
             ncx2.sf(FINE^2, 2, s^2). This f is convex up to s = FINE - 0.2, so the worst case is that all of
             j / sigma falls on one pair. Above, 1 is taken for it.
    Added:   the sums are now those without the person, with the density p. What the pairs longer than FINE
             have of the mixture over J is more than eta (1 - q)^k p with probability at most pairs tau / (eta
             (1 - q)^k), by Markov's inequality, which is added to delta. Otherwise it is less than the share
             eta of the mixture, which adds about eta to epsilon. Here k is `images`, and eta is UNSEEN over
             the number of all steps. With q = 1 there is one J, and the sums outside A(J) count as above.
    """
    tau, total_steps = math.exp(-FINE**2 / 2), sum(steps for _, _, steps in runs)
    log_kept, added = 0.0, 0.0
    for q, sigma, steps in runs:
        moved = np.minimum(np.arange(1, images + 1) / max(sigma, 1e-300), FINE)
        far = np.where(moved < FINE - 0.2, ncx2.sf(FINE**2, 2, moved**2), 1.0)
        lost = min(1 - EPS, float(_times_in_a_lot(q, images)[1:] @ far) + MOST_PAIRS * tau)
        log_kept += steps * math.log1p(-lost)
        absent = math.exp(max(images * math.log1p(-q), -700)) if q < 1 else 0    # (1 - q)^k: none in a lot
        added += steps * (MOST_PAIRS * tau * total_steps / UNSEEN / absent if q < 1 else lost)
    return max(-math.expm1(log_kept), min(added, 1.0))


def _removed_and_added(runs, delta, images) -> tuple[float, float]:
    """`_gaussian` for removed examples, and for added ones. The larger of the two counts."""
    # the window [-L, L]: by Markov's inequality the total loss exceeds L with probability below delta / 10^7
    orders = 1 + np.geomspace(1e-3, 1e6, 120)
    divergence = sum(steps * _rdp(q, sigma, orders, images) for q, sigma, steps in runs)
    windows = divergence + math.log(1e7 / delta) / (orders - 1)
    L, far = windows.min(), orders[windows.argmin()] - 1
    half, total_steps = PLD_POINTS // 2, sum(steps for _, _, steps in runs)
    tilt = _tilt(orders - 1, divergence, delta, math.log(FFT_ERROR * (total_steps + 2) * half**0.5))
    loss = np.arange(-half, half + 1) * (L / half)

    removed, added = [], []
    slack = 0.0                          # what the errors of the edges may add to the total loss
    for q, sigma, steps in runs:
        # the loss increases with z, so the cells between grid points are cells of z; the outer two are open
        z, off = _z_of(loss, q, sigma, images)
        slack += steps * off
        edges = np.r_[-math.inf, z, math.inf]
        without, error_without = _normal_mass(edges / sigma)     # under N(0, sigma^2), (PLD_POINTS + 1,)
        present, error_present = 0, 0
        for j, share in enumerate(_times_in_a_lot(q, images)):
            shifted, error_shifted = _normal_mass((edges - j) / sigma)
            present = present + share * shifted
            error_present = error_present + share * error_shifted
        removed.append((present, without, error_present, error_without, off, steps))
        added.append((without[::-1], present[::-1], error_without[::-1], error_present[::-1], off, steps))
    # for added examples the masses are the same, and the loss has the other sign
    return tuple(_composed_epsilon(pairs, loss, delta, tilt, far) + slack for pairs in (removed, added))


def _times_in_a_lot(q, images) -> np.ndarray:
    """P(j of the k images are in the lot) for j = 0..k."""
    return np.array([math.comb(images, j) * q**j * (1 - q)**(images - j) for j in range(images + 1)])


def _loss(z, q, sigma, images):
    """The loss, log sum_j P(j) e^((2 j z - j^2) / (2 sigma^2)), and its slope in z: (n,) -> (n,), (n,)."""
    j = np.arange(images + 1)
    with np.errstate(divide="ignore"):
        terms = np.log(_times_in_a_lot(q, images)) + (2 * j * z[:, None] - j * j) / (2 * sigma**2)
    total = logsumexp(terms, axis=1)
    return total, np.exp(terms - total[:, None]) @ j / sigma**2


def _z_of(loss, q, sigma, images) -> tuple[np.ndarray, float]:
    """The z at which one step has this loss (-inf if there is none), and the largest error of its loss."""
    lowest = images * math.log1p(-q) if q < 1 else -math.inf
    z, there = np.full(loss.shape, -math.inf), loss > lowest
    l, off = loss[there], 0.0
    rounding = 4 * EPS * (2 * loss[-1] + images * (images / sigma**2 + 40 / sigma - math.log(q)) + 2)
    if images == 1:
        z[there] = sigma**2 * (l + np.log(-np.expm1(lowest - l)) - math.log(q)) + 0.5
        return z, rounding
    low, high = -40 * sigma, images + 40 * sigma                     # the mass beyond them is negligible
    for part in np.array_split(np.arange(len(l)), 100):
        table = np.linspace(low, high, 10_000)
        guess = np.interp(l[part], _loss(table, q, sigma, images)[0], table)
        for _ in range(4):                                               # Newton's method; the loss is convex
            value, slope = _loss(guess, q, sigma, images)
            guess = np.clip(guess - (value - l[part]) / np.maximum(slope, 1e-300), low, high)
        inside = (low < guess) & (guess < high)
        off = max(off, abs(_loss(guess, q, sigma, images)[0] - l[part])[inside].max(initial=0))
        z[np.flatnonzero(there)[part]] = guess
    return np.maximum.accumulate(z), off + rounding


def _rdp(q, sigma, orders, images):
    """RDP of one step against `images` images, for the window and the tilt alone: it is not rounded up."""
    if images == 1:
        return accountant.rdp(q, sigma, orders)
    z = np.linspace(-40 * sigma, images + 40 * sigma, 20_000)
    log_density = -z**2 / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(z[1] - z[0])
    loss, _ = _loss(z, q, sigma, images)
    # beyond some order the integrand leaves the grid; such orders are of no use, and their RDP is set to inf
    values = [logsumexp(log_density + a * loss) / (a - 1) for a in orders]
    inside = [np.argmax(log_density + a * loss) < len(z) - 1000 for a in orders]
    return np.maximum(np.where(inside, values, np.inf), 0)


def _tilt(tilts, divergence, delta, log_error) -> float:
    """The smallest tilt that keeps the FFT's error below delta / 10^7 near epsilon (Chernoff's bound).

    With a larger tilt more of the tilted mass would lie beyond the window. The FFT wraps it around, and
    removing the tilt makes it far too large there. Below epsilon it does not count. With a tilt that is much
    too large it also reaches losses above epsilon: the bound would hold, but it would be loose.
    """
    about = np.min(divergence - math.log(delta) / tilts)                 # RDP's epsilon, or a little more
    chernoff = tilts * (divergence - about)                          # log of E[e^(tilt (total - epsilon))]
    enough = chernoff + log_error < math.log(delta) - math.log(1e7)
    return tilts[enough.argmax()] if enough.any() else tilts[chernoff.argmin()]


EPS = 2.0**-52               # float64's spacing at 1; the relative error of a rounding is at most half of it
# relative L2 error of one transform. For powers of 2, 7 log2(n) EPS / 2 is proved  [Higham 2002, Thm 24.2]
FFT_ERROR = 10 * math.log2(PLD_POINTS) * EPS


def _composed_epsilon(pairs, loss, delta, tilt, far) -> float:
    """Epsilon of all steps of `pairs`, composed on the grid `loss` of values of log(dP/dQ).

    pairs: for each run (P, Q, error of P, error of Q, error of the edges, steps). P and Q are the masses in
           each cell of the grid
    tilt:  the exponent of the weights e^(tilt loss) below
    far:   the exponent with which Markov's inequality bounds the mass beyond the end of the grid

    The mass of each cell is moved to the two ends of the cell in such a way that its P-mass and its Q-mass
    both stay the same. The pair that results is never less revealing, and much closer to the true one than
    after rounding up.                                            [Doroshenko et al. 2022, "connect the dots"]
    The first cell lies below the grid, and its loss is rounded up to the first point. The last cell lies
    above the grid, and its loss counts as infinite.

    What is composed is the tilted mass e^(tilt loss) mass / M, which lies nearer to epsilon. The FFT's error
    is a share of everything that it transforms, so it becomes small beside delta. It is added to delta. In
    L2, with f = FFT_ERROR:
        |error of the total|  <=  f (steps |tilted| + |total|)  <=  f (steps + 1) |tilted|
    for one run. For several, the product of their spectra is rounded, too, which adds f |tilted| for each.
    """
    points = len(loss)
    step = min(loss[points // 2 + 1], 700)   # the middle of the grid is 0; exp overflows at 709
    log_lasts = 0.0                      # log P(no step has infinite loss)
    log_moment = 0.0                     # log E[e^(far total)]
    log_M = 0.0                          # log of the product of all M
    spectrum, error, count = 1.0, 0.0, 0
    for P, Q, error_P, error_Q, off, steps in pairs:
        mass = _connect_the_dots(P, Q, error_P, error_Q, off, loss, step)
        # what the grid cannot show counts in full: a step of infinite loss, a total beyond its end (Markov)
        log_mass = np.log(np.maximum(mass, 1e-300))
        log_lasts += steps * math.log1p(-min(P[-1] + error_P[-1], 1 - EPS))
        log_moment += steps * logsumexp(far * loss + log_mass)
        own = logsumexp(tilt * loss + log_mass)
        log_M += steps * own
        tilted = np.exp(tilt * loss + log_mass - own)
        spectrum = spectrum * np.fft.rfft(np.fft.ifftshift(tilted)) ** float(steps)
        error = max(error, float(np.linalg.norm(tilted)))
        count += steps
    lost = -math.expm1(log_lasts) + math.exp(min(log_moment - far * loss[-1], 0))
    total = np.fft.fftshift(np.fft.irfft(spectrum, points)).clip(min=0)
    error *= FFT_ERROR * (count + 1 + len(pairs))                        # of the powers and their product
    untilted = total * np.exp(np.minimum(log_M - tilt * loss, 30))       # the cap acts where delta > 1

    def gap(e: float) -> float:                                      # log of delta(e) / delta, almost linear
        above = np.searchsorted(loss, e)                             # delta(e) = E_P[(1 - exp(e - loss))_+]
        seen = float(untilted[above:] @ -np.expm1(e - loss[above:]))
        cells = min(-1 / math.expm1(-2 * tilt * step), points / 2)    # sum of e^(-2 tilt (loss - e))
        weight = math.exp(min(log_M - tilt * e, 30)) * math.sqrt(cells)
        rounded = 1 + (100 + 4 * tilt * loss[-1]) * EPS * count          # of the tilted masses and of M
        return math.log(lost + (seen + error * weight) * rounded) - math.log(delta)

    if not gap(loss[-1]) <= 0:
        return math.inf
    if gap(0.0) <= 0:
        return 0.0
    return float(brentq(gap, 0.0, loss[-1], xtol=1e-11, rtol=1e-11)) * (1 + 2e-11) + 2e-11


def _connect_the_dots(P, Q, error_P, error_Q, off, loss, step) -> np.ndarray:
    """One step's mass at each point of the grid.

    If the edges of a cell are wrong by up to `off`, the cell may hold losses slightly below its lower end.
    They are rounded up to that end, which is safe. But their Q-mass is larger than that of the rounded
    losses, and a larger Q-mass makes `lower` too large. So a share of the cell's mass, at most
    (e^step + 1) off e^off / (e^step - 1), is moved from the lower end to the upper one.
    """
    inner = P[1:-1] + error_P[1:-1]
    growth = np.exp(np.minimum(loss[1:], 700))
    rounding = error_Q[1:-1] * growth + (abs(loss[1:]) + 4) * EPS * inner
    rounding += (math.exp(step) + 1) * off * math.exp(min(off, 700)) * inner
    lower = (Q[1:-1] * growth - inner - rounding) / math.expm1(step)
    lower = np.clip(lower, 0, inner)         # of the lower end; what is uncertain goes to the upper end
    return np.r_[P[0] + error_P[0] + lower[0], inner[:-1] - lower[:-1] + lower[1:], inner[-1] - lower[-1]]


def _normal_mass(edges):
    """Phi(b) - Phi(a) for edges a <= b, taken in the tail where both are small, and a bound on its error.

    For z < 0 the relative error of ndtr(z) is at most (4 + 2 z^2) EPS [measured: tests/test_pld.py]. That z
    is rounded twice adds (1 + z^2) EPS. From z = -37.7 on down ndtr returns 0; the true mass there is below
    `tiny`, which is added.
    """
    a, b = edges[:-1], edges[1:]
    right = a > 0                                                        # in the right tail
    high = np.where(right, ndtr(-a), ndtr(b))
    low = np.where(right, ndtr(-b), ndtr(a))
    z = np.clip(np.where(right, -a, b), -40, 0)
    return np.maximum(high - low, 0), (10 + 6 * z**2) * EPS * high + np.finfo(float).tiny


SETTINGS = [(0.017, 0.64, 200, 1e-5), (0.034, 1.7, 93, 1e-5), (0.04, 1.5, 2250, 1e-5),
            (0.004, 0.8, 5000, 1e-5), (0.05, 20.0, 1000, 1e-6)]


def show_comparison(settings) -> None:
    """Print the bounds by RDP and by PLD beside the approximation."""
    print("      q    sigma   steps   delta    RDP bound   PLD bound  CLT, not a bound")
    for q, sigma, steps, delta in settings:
        print(f"{q:>7g} {sigma:>8.4g} {steps:>7} {delta:>7g}   "
              f"{screen.up(accountant.epsilon(q, sigma, steps, delta)[0], 6):>10} "
              f"{screen.up(pld_epsilon(q, sigma, steps, delta), 6):>11} "
              f"{gdp_epsilon(q, sigma, steps, delta):>17.4f}")


def main() -> None:
    parser = screen.Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="privacy.json",
                        help="the privacy reports of runs on the same images")
    parser.add_argument("--images", type=int, default=1, help="how many of the images belong to one person")
    parser.add_argument("--sigma", type=float, help="the noise multiplier (default: a table of settings)")
    parser.add_argument("--delta", type=float, default=1e-5, help="the delta of (epsilon, delta)")
    parser.add_argument("--q", type=float, default=0.017, help="the sampling rate B/N, with --sigma")
    parser.add_argument("--steps", type=int, default=200, help="the number of steps, with --sigma")
    a = parser.parse_args()
    with screen.one_line(parser.prog, "close other programs"):
        if a.images != 1 and not a.runs:
            raise ValueError(f"--images {a.images}: expected a run's privacy.json with it")
        if a.sigma is not None and a.runs:
            raise ValueError(f"--sigma {a.sigma}: expected it alone, or the privacy.json of runs without it")
        for name in ("q", "steps", "delta"):
            needed = a.sigma is None and not (name == "delta" and a.runs)
            if needed and getattr(a, name) != parser.get_default(name):
                raise ValueError(f"--{name} {getattr(a, name):g}: expected --sigma with it")
        if a.runs:
            runs = [accountant.read_run(path) for path in a.runs]
            with screen.waiting("composing the runs"):
                spent = joint_epsilon(runs, a.delta, a.images)
            print(f"{screen.count(len(runs), 'run')}, {screen.count(a.images, 'image')} a person: epsilon = "
                  f"{screen.up(spent, 6)} at delta = {a.delta:g}")
            if spent == math.inf:
                print("inf: the noise does not hide so many images, or so many steps at so small a delta, or "
                      "the grid is too coarse for them. No bound is shown")
        else:
            show_comparison(SETTINGS if a.sigma is None else [(a.q, a.sigma, a.steps, a.delta)])


if __name__ == "__main__":
    main()
