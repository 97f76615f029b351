"""audit.py -- attack the private step itself: a lower bound on epsilon, compared with the proven upper bound.

A canary is an image that is made to be detected. (epsilon, delta)-differential privacy says that for every
event E, P(E | canary in) <= e^epsilon P(E | canary out) + delta, and the same with "in" and "out" exchanged.
So the frequencies of any event, with the canary and without it, give a lower bound:

    epsilon >= log( (P(E | in) - delta) / P(E | out) )            [Jagielski et al. 2020; Nasr et al. 2021]

  $ python audit.py                       # the step that train.py runs: lower bound 3.28, proven 4.73
  $ python audit.py --break half-noise    # a step with a fault: the lower bound exceeds the proven epsilon
  $ python audit.py --break all           # eight faults, a line each
  $ python -m attacks.membership          # a weak attack on real images: which were in the training set?

A lower bound above an upper bound on epsilon shows a fault; the verdict takes the smaller of two upper
bounds, `tight`. A lower bound below it proves nothing, because an audit tries one canary, one direction and
one kind of guess, on a model of eight weights. It does not see a fault that this canary does not touch, what
a better guess would find, weak random numbers, lots that are drawn differently in the real run, or a leak
outside the step, such as a printed loss or a tuned setting. The proof is in dpsgd.py and accountant.py, and
no audit replaces reading it.
"""
import itertools
import math
import sys
import time
from typing import Callable, NamedTuple

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor
from torch.func import vmap

import accountant
import dpsgd
import pld
from machinery import screen
from machinery.secret import Secret, new_key

# -----------------------------------------------------------------------------
# 1. the game: two worlds that differ in one image, the canary, and the score by which they are told apart
#
# The model is the identity with an adapter of rank 2, which starts as LoRA does, with B = 0. So only B has a
# gradient, -(y - x) x^T. The canary lights a pixel that no other image lights, and its target is far away.
# Therefore its gradient is clipped, to a norm of C (but for rounding), and no other image moves the release
# in the direction of that gradient. This is the worst case of the proof.

C, LOT = 0.01, 2.0                       # clipping norm, in gradient-norm units; expected batch size, images
START = {"A": torch.eye(2), "B": torch.zeros(2, 2)}
CANARY, OTHER = ([0., 1.], [0., 1000.]), ([1., 0.], [1.002, 0.])         # pairs (x, y)
DIRECTION = torch.tensor([[0., 0.], [0., -1.]])          # of the canary's gradient, in B
LANES = 50_000                                           # runs that are computed at once, for memory


def images(others: int, canary: int, K: int) -> tuple[Tensor, Tensor]:
    """The images of a world: x (n, K, 2), whose K draws are all the same, and y (n, 2). n may be 0."""
    pairs = torch.tensor([OTHER] * others + [CANARY] * canary).reshape(-1, 2, 2)
    return pairs[:, :1].expand(-1, K, 2), pairs[:, 1]


def per_sample(params: dict, x: Tensor, y: Tensor) -> dpsgd.Grads:
    """One gradient for each image, of |y - (x + B A x)|^2 / 2, averaged over its K draws.

    Shapes: x (n, K, 2), y (n, 2) -> (n, 2, 2) for A and for B
    """
    def loss(params, x, y):
        return (y - x - x @ params["A"].mT @ params["B"].mT).square().sum(-1).mean() / 2
    return dpsgd.per_sample_grads(loss, params, x, y)


def scores(step: Callable, runs: int, canary: int, *, q: float, sigma: float, steps: int, K: int, others: int,
           secret: Secret) -> Tensor:
    """(runs,): the scores of `runs` independent runs of `steps` steps each, in units of C.

    The score of a run is the component of its released sums in the direction of the canary's gradient.
    step:   dpsgd.private_gradient, or a fault with the same arguments
    others: the number of ordinary images, which are in both worlds
    Each run has its own lot and its own noise. The runs whose lots are equal are computed by one call of
    `step` under vmap. The weights stay at START, because the attacker may choose them. At q = 1 the score of
    the correct step has the distribution N(0, steps sigma^2) without the canary, and N(steps, steps sigma^2)
    with it.
    """
    x, y = images(others, canary, K)
    total, weights = torch.zeros(runs), sum(p.numel() for p in START.values())
    use = itertools.count(canary, 2)                                 # odd numbers with the canary, else even
    for lanes in torch.arange(runs).split(LANES):
        for _ in range(steps):
            now = next(use)
            coins = secret.coins(now, len(lanes) * len(x))               # one coin per run and image
            tossed = torch.zeros(len(coins), dtype=torch.int64)
            tossed[dpsgd.poisson_sample(coins, q)] = 1
            code = (tossed.view(len(lanes), len(x)) * 2 ** torch.arange(len(x))).sum(1)  # each lot in binary
            normals = secret.normals(now, len(lanes) * weights).view(len(lanes), weights)
            for value in code.unique().tolist():                             # all runs with this lot at once
                mine = code == value
                lot = torch.tensor([i for i in range(len(x)) if value >> i & 1], dtype=torch.int64)

                def one_run(params, normals):
                    return step(per_sample, params, (x[lot], y[lot]), C=C, sigma=sigma, B=LOT,
                                normals=normals)
                copies = {name: p.expand(int(mine.sum()), *p.shape) for name, p in START.items()}
                released = vmap(one_run)(copies, normals[mine])              # (mine, 2, 2) each
                total[lanes[mine]] += (released["B"] * DIRECTION).sum((1, 2)) * LOT / C
    return total


# -----------------------------------------------------------------------------
# 2. from scores to a lower bound


class Finding(NamedTuple):
    """What an audit found."""
    epsilon: float                       # the lower bound, never below 0
    event: str                           # the attacker's guess, and the scores for which it is made
    true_positive_rate: float            # share of the runs of the guessed world in which the guess is made
    false_positive_rate: float           # the same share of the runs of the other world


def clopper_pearson(k, n: int, alpha: float):
    """(low, high), the limits of a probability after k hits in n tries.            [Clopper & Pearson 1934]

    low solves P(Bin(n, low) >= k) = alpha, and high solves P(Bin(n, high) <= k) = alpha.
    Guarantee: each limit is wrong with probability at most alpha
    """
    k = np.asarray(k, float)
    low = np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)
    return low, np.where(k < n, beta.ppf(1 - alpha, k + 1, np.maximum(n - k, 1)), 1.0)


def bounds(suspect: np.ndarray, innocent: np.ndarray, thresholds, delta: float, alpha: float) -> np.ndarray:
    """For each threshold t a lower limit of log((P(suspect >= t) - delta) / P(innocent >= t)).

    Both sets of scores are sorted.
    """
    hits, false_alarms = (len(s) - np.searchsorted(s, thresholds) for s in (suspect, innocent))
    low = clopper_pearson(hits, len(suspect), alpha)[0]
    high = clopper_pearson(false_alarms, len(innocent), alpha)[1]
    return np.log(np.maximum(low - delta, 1e-300) / high)


def lower_bound(without, present, delta: float, confidence: float = 0.95) -> Finding:
    """What two sets of scores prove: epsilon >= Finding.epsilon.

    The guess is chosen on one half of the runs: the value of t, "at least t" or "at most t", and whether the
    attacker then guesses "with" or "without the canary". It is counted on the other half, which had no
    influence on the choice. So the two limits, at (1 - confidence) / 2 each, need no further correction.
    Shapes:    without, present: the scores of independent runs, (n,) and (m,)
    Guarantee: wrong with probability at most 1 - confidence
    Errors:    fewer than 20 scores -> ValueError
    """
    if min(len(without), len(present)) < 20:
        raise ValueError(f"lower_bound: {len(without)} and {len(present)} scores, expected at least 20 each")
    without, present = (np.asarray(s, dtype=float) for s in (without, present))
    alpha = (1 - confidence) / 2
    best = -math.inf
    for sign in (1, -1):                                                 # guess at high scores, at low ones
        for suspect, innocent, says in ((present, without, "with"), (without, present, "without")):
            choose, count = (np.sort(sign * half) for half in np.array_split(suspect, 2))
            choose_0, count_0 = (np.sort(sign * half) for half in np.array_split(innocent, 2))
            tried = np.r_[depths(choose), depths(choose_0)]
            values = bounds(choose, choose_0, tried, delta, alpha)
            if values.max() > best:
                best = values.max()
                chosen = tried[values.argmax()], sign, count, count_0, says
    t, sign, count, count_0, says = chosen
    proven = max(float(bounds(count, count_0, [t], delta, alpha)[0]), 0.0)
    event = f'"{says} the canary" if the score {">=" if sign > 0 else "<="} {sign * t:.3f}'
    return Finding(proven, event, float((count >= t).mean()), float((count_0 >= t).mean()))


def depths(s: np.ndarray) -> np.ndarray:
    """At most 150 of the sorted scores: the last, the one before it, and so on, ever farther apart."""
    return s[-np.unique(np.geomspace(1, len(s), 150).astype(int))]


def upper_bounds(q: float, sigma: float, steps: int, delta: float) -> tuple[float, float]:
    """(proven, tight): the bound by RDP, and a tighter one, by PLD, which at q = 1 is the exact epsilon.

    Both are upper bounds, so no lower bound may exceed `tight`.
    """
    if q == 1:
        tight = pld.gaussian_epsilon(sigma / math.sqrt(steps), delta)
    else:
        tight = pld.pld_epsilon(q, sigma, steps, delta)
    return accountant.epsilon(q, sigma, steps, delta)[0], tight


def histogram(without, present, rows: int = 18, width: int = 40) -> str:
    """A histogram of both sets of scores as text, side by side. A dot stands for less than half a mark."""
    without, present = np.asarray(without), np.asarray(present)
    both = np.r_[without, present]
    edges = np.linspace(both.min(), both.max() + 1e-6, rows + 1)
    left, right = np.histogram(without, edges)[0], np.histogram(present, edges)[0]
    most = max(left.max(), right.max())

    def bar(count: int) -> str:
        marks = round(width * count / most)
        return "." if count and not marks else "#" * marks
    lines = [f"{'score':>8} {'without the canary':>{width}} | with the canary"]
    for a, b, n, m in zip(edges, edges[1:], left, right):
        lines.append(f"{(a + b) / 2:>8.2f} {bar(n):>{width}} | {bar(m)}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# 3. faults: each takes the arguments of dpsgd.private_gradient, and makes one mistake

right = dpsgd.private_gradient
FIXED = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for name, p in START.items()}


def half_noise(*a, sigma, **kw):
    return right(*a, sigma=sigma / 2, **kw)


def clip_2C(*a, C, sigma, **kw):
    return right(*a, C=2 * C, sigma=sigma / 2, **kw)                     # the noise_std is still sigma C


def draws_apart(per_sample, params, lot, **kw):
    x, y = lot                                                           # each image becomes K examples
    return right(per_sample, params, (x.reshape(-1, 1, 2), y.repeat_interleave(x.shape[1], 0)), **kw)


def no_noise(*a, sigma, **kw):
    return right(*a, sigma=0.0, **kw)


def one_tensor(*a, sigma, **kw):
    return right(*a, sigma=sigma, **kw) | {"B": right(*a, sigma=0.0, **kw)["B"]}


def realised_size(per_sample, params, lot, *, B, **kw):
    return right(per_sample, params, lot, B=max(len(lot[0]), 1), **kw)


def skip_empty(per_sample, params, lot, **kw):
    if len(lot[0]) == 0:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    return right(per_sample, params, lot, **kw)


def fixed_seed(*a, C, sigma, B, **kw):
    return {name: g + sigma * C * FIXED[name] / B for name, g in right(*a, C=C, sigma=0.0, B=B, **kw).items()}


BROKEN = {                               # name -> (consequence, step, settings that show it)
    "half-noise": ("the noise is half of what the accountant assumes, so a step costs more than is counted",
                   half_noise, {}),
    "clip-2C": ("one image moves the sum by 2C, but the noise is computed for C", clip_2C, {}),
    "draws-apart": ("K draws are clipped one by one, so an image moves the sum by K C (the published code)",
                    draws_apart, {"K": 4}),
    "no-noise": ("clipping without noise hides nothing", no_noise, {}),
    "one-tensor": ("A gets noise, but B does not, and B alone shows the canary", one_tensor, {}),
    "realised-size": ("the sum is divided by the actual lot size, so the noise shrinks if an image joins",
                      realised_size, {"q": 1.0, "others": 1}),
    "skip-empty": ("an empty lot makes no step, so any step at all shows that an image is there", skip_empty,
                   {"q": 0.5, "others": 0}),
    "fixed-seed": ("the noise is the same in every run, so the attacker can subtract it", fixed_seed, {}),
}


def audit(step: Callable, runs: int, delta: float, seed: int, **world) -> tuple[Tensor, Tensor, Finding]:
    """(scores without the canary, scores with it, what they prove) of one step.

    world: the settings of `scores`
    """
    secret = Secret(new_key(seed))
    with screen.waiting(f"an audit of {runs:,} runs"):
        without, present = (scores(step, runs, canary, secret=secret, **world) for canary in (0, 1))
        return without, present, lower_bound(without, present, delta)


def show(step: Callable, runs: int, delta: float, seed: int, **world) -> bool:
    """Print one audit in full. Returns: whether the lower bound is at most `tight`"""
    proven, tight = upper_bounds(world["q"], world["sigma"], world["steps"], delta)
    without, present, found = audit(step, runs, delta, seed, **world)
    fine = found.epsilon <= tight
    print(", ".join(f"{name} = {value:g}" for name, value in world.items()) + f", delta = {delta:g}; "
          f"{runs:,} runs without the canary, {runs:,} with it\n\n{histogram(without, present)}\n")
    print(f"guess    {found.event}; made in {found.true_positive_rate:.3%} of the runs where it is right, "
          f"and in {found.false_positive_rate:.4%} of those where it is wrong")
    print(f"lower    epsilon >= {found.epsilon:.3f}   95% confidence; guess chosen on half of the runs, "
          f"counted on the others")
    exact = "no correct proof can promise less" if world["q"] == 1 else "a tighter bound, by PLD"
    print(f"tight    epsilon  = {tight:.3f}   {exact}")
    print(f"proven   epsilon <= {proven:.3f}   what train.py would state (accountant.epsilon)")
    verdict = "no contradiction found" if fine else "BROKEN: the lower bound contradicts the proof"
    print(f"verdict  {verdict}")
    return fine


def show_all(runs: int, delta: float, seed: int, **world) -> None:
    """Print the audit of the correct step and of every fault, a line each."""
    print(f"{'step':<14} {'lower':>7} {'tight':>7}         seconds   "
          f"({runs:,} runs without the canary and {runs:,} with it, 95% confidence)")
    for name, (why, step, settings) in {"(right)": ("what train.py runs", right, {}), **BROKEN}.items():
        start, here = time.time(), world | settings
        tight = upper_bounds(here["q"], here["sigma"], here["steps"], delta)[1]
        found = audit(step, runs, delta, seed, **here)[2]
        broken = found.epsilon > tight
        shown = "".join(f" [{k} = {v:g}]" for k, v in settings.items())
        print(f"{name:<14} {found.epsilon:>7.2f} {tight:>7.2f} {'BROKEN' if broken else 'ok':>7} "
              f"{time.time() - start:>7.1f}   {why}{shown}")


def main() -> None:
    p = screen.Parser(__doc__)
    p.add_argument("--q", type=float, default=1.0, help="sampling rate")
    p.add_argument("--sigma", type=float, default=1.0, help="noise multiplier")
    p.add_argument("--steps", type=int, default=1, help="steps of each run, all of which the attacker sees")
    p.add_argument("--K", type=int, default=1, help="draws that the loss of one image averages")
    p.add_argument("--delta", type=float, default=1e-5, help="delta of the guarantee, no unit")
    p.add_argument("--runs", type=int, default=4_000_000,
                   help="number of runs without the canary, and of runs with it")
    p.add_argument("--seed", type=int, default=0, help="seed of the audit (a private run has none)")
    p.add_argument("--break", dest="fault", choices=[*BROKEN, "all"],
                   help="audit a step with this fault instead of the correct one")
    a = p.parse_args()
    world, fine = dict(q=a.q, sigma=a.sigma, steps=a.steps, K=a.K, others=1), True
    with screen.one_line(p.prog, "lower --runs"):
        for name in ("K", "steps"):
            if getattr(a, name) < 1:
                raise ValueError(f"--{name} {getattr(a, name)}: expected at least 1")
        if a.runs < 1000:
            raise ValueError(f"--runs {a.runs}: expected at least 1000, because fewer show nothing")
        if not 0 <= a.seed < 2**32:
            raise ValueError(f"--seed {a.seed}: expected a whole number, 0 to 2^32 - 1")
        if a.fault == "all":
            show_all(a.runs, a.delta, a.seed, **world)
        elif a.fault:
            why, step, settings = BROKEN[a.fault]
            print(f"{a.fault}: {why}")
            show(step, a.runs, a.delta, a.seed, **world | settings)
        else:
            fine = show(right, a.runs, a.delta, a.seed, **world)
    print("\n" + __doc__.split("\n\n")[-1].strip())
    if not fine:
        sys.exit("the step that train.py runs has a fault, or this is one of the 5% of audits whose lower "
                 "bound is wrong; try another --seed")


if __name__ == "__main__":
    main()
