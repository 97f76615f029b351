"""audit.py -- attack your own training: a lower bound on epsilon, to hold against the proven upper bound.

(epsilon, delta)-DP says P(E | canary in) <= e^epsilon P(E | canary out) + delta for every event E, and the
same with in and out exchanged. So any event that can be counted gives

    epsilon >= log( (P(E | in) - delta) / P(E | out) )            [Jagielski et al. 2020; Nasr et al. 2021]

  $ python audit.py                       # the step that train.py runs: lower bound 3.29, proven 4.73
  $ python audit.py --break half-noise    # a step with a fault: the lower bound is above what was "proven"
  $ python audit.py --break all           # eight faults, a line each
  $ python -m attacks.membership          # a weak attack on real images: who was in the training set?

What an audit cannot see: it tries one canary, one direction and one kind of guess, on a model of eight
weights. A fault that this canary does not touch, a better guess, weak random numbers, lots drawn otherwise in
the real run, a leak outside the step (a printed loss, a tuned setting): none of it shows. A lower bound above
the proven epsilon proves a fault; one below it proves nothing. The proof is in dpsgd.py and accountant.py,
and has to be read.
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
# 1. the game: two worlds that differ in one image, the canary; the score is what the attacker sees of it
#
# An adapter of rank 2 beside the identity, as LoRA starts (B = 0), so every gradient is in B: -(y - x) x^T.
# The canary lights a pixel that no other image lights and has an absurd target: its gradient is clipped, to a
# norm of exactly C, and no other image moves the release in its direction. That is the worst case of the
# proof.

C, LOT = 0.01, 2.0                                       # clipping norm (gradient units); declared lot size
START = {"A": torch.eye(2), "B": torch.zeros(2, 2)}
CANARY, OTHER = ([0., 1.], [0., 1000.]), ([1., 0.], [1.002, 0.])         # pairs (x, y)
DIRECTION = torch.tensor([[0., 0.], [0., -1.]])          # of the canary's gradient, in B
LANES = 50_000                                           # runs computed at once: memory only


def images(others: int, canary: int, K: int) -> tuple[Tensor, Tensor]:
    """A world's images: x (n, K, 2), the K draws of each, all the same; y (n, 2). n >= 0."""
    pairs = torch.tensor([OTHER] * others + [CANARY] * canary).reshape(-1, 2, 2)
    return pairs[:, :1].expand(-1, K, 2), pairs[:, 1]


def per_sample(params: dict, x: Tensor, y: Tensor) -> dpsgd.Grads:
    """One gradient per image of |y - (x + B A x)|^2 / 2, the mean over its K draws.

    Shapes: x (n, K, 2), y (n, 2) -> (n, 2, 2) for A and for B
    """
    def loss(params, x, y):
        return (y - x - x @ params["A"].mT @ params["B"].mT).square().sum(-1).mean() / 2
    return dpsgd.per_sample_grads(loss, params, x, y)


def scores(step: Callable, runs: int, canary: int, *, q: float, sigma: float, steps: int, K: int, others: int,
           secret: Secret) -> Tensor:
    """(runs,): in each of `runs` independent runs, what `steps` releases say of the canary, in units of C.

    A run's score is the component of its released sums in the direction of the canary's gradient.
    step is dpsgd.private_gradient, or a fault with the same arguments; `others`: how many ordinary images are
    in both worlds. vmap makes one call of it many runs: every lane has its own lot and its own noise. The
    weights stay at START: the attacker, who may choose them, likes them there. For the right step at q = 1:
    N(0, steps sigma^2) without, + steps with the canary.
    """
    x, y = images(others, canary, K)
    total, weights = torch.zeros(runs), sum(p.numel() for p in START.values())
    use = itertools.count(canary, 2)                                 # no two uses have the same numbers
    for lanes in torch.arange(runs).split(LANES):
        for _ in range(steps):
            now = next(use)
            coins = secret.coins(now, len(lanes) * len(x))               # one coin per run and image
            tossed = torch.zeros(len(coins), dtype=torch.int64)
            tossed[dpsgd.poisson_sample(coins, q)] = 1
            code = (tossed.view(len(lanes), len(x)) * 2 ** torch.arange(len(x))).sum(1)  # the lot, in binary
            normals = secret.normals(now, len(lanes) * weights).view(len(lanes), weights)
            for value in code.unique().tolist():                             # runs with equal lots together
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
    epsilon: float                       # the lower bound, never below 0
    event: str                           # what the attacker looks for
    often: float                         # its share of the runs of the world it points to
    seldom: float                        # its share of the other world's


def clopper_pearson(k, n: int, alpha: float):
    """(low, high) limits of a probability after k hits in n tries; each is wrong with probability <= alpha.

    low solves P(Bin(n, low) >= k) = alpha, high P(Bin(n, high) <= k) = alpha.      [Clopper & Pearson 1934]
    """
    k = np.asarray(k, float)
    low = np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), n - k + 1), 0.0)
    return low, np.where(k < n, beta.ppf(1 - alpha, k + 1, np.maximum(n - k, 1)), 1.0)


def bounds(suspect: np.ndarray, innocent: np.ndarray, thresholds, delta: float, alpha: float) -> np.ndarray:
    """For each threshold, a lower limit of log((P(suspect >= t) - delta) / P(innocent >= t)); both sorted."""
    hits, misses = (len(s) - np.searchsorted(s, thresholds) for s in (suspect, innocent))
    low = clopper_pearson(hits, len(suspect), alpha)[0]
    high = clopper_pearson(misses, len(innocent), alpha)[1]
    return np.log(np.maximum(low - delta, 1e-300) / high)


def lower_bound(without, present, delta: float, confidence: float = 0.95) -> Finding:
    """What two sets of scores prove: epsilon >= Finding.epsilon, wrong with probability <= 1 - confidence.

    The event is chosen on one half of the runs, out of: both tails, both ways round, all depths. It is then
    counted on the other half, which had no say in the choice, with two limits at (1 - confidence) / 2: no
    further correction.
    Shapes: without, present: scores of independent runs, (n,) and (m,)
    Errors: fewer than 20 scores -> ValueError
    """
    if min(len(without), len(present)) < 20:
        raise ValueError(f"lower_bound: {len(without)} and {len(present)} scores, expected at least 20 each")
    without, present = (np.asarray(s, dtype=float) for s in (without, present))
    alpha, best = (1 - confidence) / 2, None
    for sign in (1, -1):
        for suspect, innocent, says in ((present, without, "with"), (without, present, "without")):
            choose, judge = (np.sort(sign * half) for half in np.array_split(suspect, 2))
            choose_0, judge_0 = (np.sort(sign * half) for half in np.array_split(innocent, 2))
            tried = np.r_[depths(choose), depths(choose_0)]
            value = bounds(choose, choose_0, tried, delta, alpha)
            if best is None or value.max() > best[0]:
                best = value.max(), tried[value.argmax()], sign, judge, judge_0, says
    _, t, sign, judge, judge_0, says = best
    proven = max(float(bounds(judge, judge_0, [t], delta, alpha)[0]), 0.0)
    event = f"a score {'>=' if sign > 0 else '<='} {sign * t:.3f} says {says!r}"
    return Finding(proven, event, float((judge >= t).mean()), float((judge_0 >= t).mean()))


def depths(s: np.ndarray) -> np.ndarray:
    """Of sorted scores those of rank 1, 2, 3, .. n from the end, ever fewer of them."""
    return s[-np.unique(np.geomspace(1, len(s), 150).astype(int))]


def upper_bounds(q: float, sigma: float, steps: int, delta: float) -> tuple[float, float]:
    """(proven, tight): what train.py states, and the least that any correct proof could state."""
    if q == 1:
        tight = pld.gaussian_epsilon(sigma / math.sqrt(steps), delta)
    else:
        tight = pld.pld_epsilon(q, sigma, steps, delta)
    return accountant.epsilon(q, sigma, steps, delta)[0], tight


def limit(q: float, proven: float, tight: float) -> float:
    """What a lower bound must not exceed: at q = 1 the tight value is exact, else the stated one."""
    return tight if q == 1 else proven


def histogram(without, present, rows: int = 18, width: int = 40) -> str:
    """Both sets of scores, side by side; a dot: fewer runs than half a mark, where the bound comes from."""
    without, present = np.asarray(without), np.asarray(present)
    both = np.r_[without, present]
    edges = np.linspace(both.min(), both.max() + 1e-6, rows + 1)
    left, right = np.histogram(without, edges)[0], np.histogram(present, edges)[0]
    most = max(left.max(), right.max())

    def bar(count: int) -> str:
        return "#" * round(width * count / most) or "." * bool(count)
    lines = [f"{'score':>8} {'without the canary':>{width}} | with the canary"]
    for a, b, n, m in zip(edges, edges[1:], left, right):
        lines.append(f"{(a + b) / 2:>8.2f} {bar(n):>{width}} | {bar(m)}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# 3. faults: each takes the arguments of dpsgd.private_gradient, and does one thing wrong

right = dpsgd.private_gradient
FIXED = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for name, p in START.items()}


def half_noise(*a, sigma, **kw):
    return right(*a, sigma=sigma / 2, **kw)


def clip_2C(*a, C, sigma, **kw):
    return right(*a, C=2 * C, sigma=sigma / 2, **kw)                     # noise_std stays sigma C


def draws_apart(per_sample, params, lot, **kw):
    x, y = lot                                                           # K rows an image:
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


BROKEN = {                               # name -> consequence, step, settings that show it
    "half-noise": ("the noise is not what the accountant was told: every step costs more than was counted",
                   half_noise, {}),
    "clip-2C": ("one image moves the sum by 2C, but the noise was made for C", clip_2C, {}),
    "draws-apart": ("K draws clipped one by one: an image moves the sum by K C (the published code)",
                    draws_apart, {"K": 4}),
    "no-noise": ("clipping alone hides nobody: one look tells", no_noise, {}),
    "one-tensor": ("noise on A, none on B: one bare tensor gives the image away", one_tensor, {}),
    "realised-size": ("divided by the realised lot: the noise shrinks when one more image joins",
                      realised_size, {"q": 1.0, "others": 1}),
    "skip-empty": ("an empty lot makes no step: any step at all says that somebody is there", skip_empty,
                   {"q": 0.5, "others": 0}),
    "fixed-seed": ("the same noise in every run: subtract it", fixed_seed, {}),
}


def audit(step: Callable, runs: int, delta: float, seed: int, **world) -> tuple[Tensor, Tensor, Finding]:
    """(scores without, scores with, what they prove) for one step; `world`: the settings of `scores`."""
    secret = Secret(new_key(seed))
    with screen.waiting(f"an audit of {runs:,} runs"):
        without, present = (scores(step, runs, canary, secret=secret, **world) for canary in (0, 1))
        return without, present, lower_bound(without, present, delta)


def show(step: Callable, runs: int, delta: float, seed: int, **world) -> bool:
    """Print one audit in full; True if the lower bound does not contradict what is proven."""
    proven, tight = upper_bounds(world["q"], world["sigma"], world["steps"], delta)
    without, present, found = audit(step, runs, delta, seed, **world)
    fine = found.epsilon <= limit(world["q"], proven, tight)
    print(", ".join(f"{name} = {value:g}" for name, value in world.items()) + f", delta = {delta:g}; "
          f"{runs:,} runs without the canary, {runs:,} with it\n\n{histogram(without, present)}\n")
    print(f"guess    {found.event}: {found.often:.3%} of the runs that were, {found.seldom:.4%} of those "
          f"that were not")
    print(f"lower    epsilon >= {found.epsilon:.3f}   95% confidence: chosen on half of the runs, counted on "
          f"the others")
    print(f"tight    epsilon  = {tight:.3f}   no correct proof can promise less")
    print(f"proven   epsilon <= {proven:.3f}   what train.py would state (accountant.epsilon)")
    verdict = "no contradiction found" if fine else "BROKEN: this step does not do what was proven"
    print(f"verdict  {verdict}")
    return fine


def show_all(runs: int, delta: float, seed: int, **world) -> None:
    """Print the audit of the right step and of every fault, a line each."""
    print(f"{'step':<14} {'lower':>7} {'proven':>7}         seconds   "
          f"({runs:,} runs each way, 95% confidence)")
    for name, (why, step, settings) in {"(right)": ("what train.py runs", right, {}), **BROKEN}.items():
        start, here = time.time(), world | settings
        proven, tight = upper_bounds(here["q"], here["sigma"], here["steps"], delta)
        found = audit(step, runs, delta, seed, **here)[2]
        broken = found.epsilon > limit(here["q"], proven, tight)
        shown = "".join(f" [{k} = {v:g}]" for k, v in settings.items())
        print(f"{name:<14} {found.epsilon:>7.2f} {proven:>7.2f} {'BROKEN' if broken else 'ok':>7} "
              f"{time.time() - start:>7.1f}   {why}{shown}")


def main() -> None:
    p = screen.Parser(__doc__)
    p.add_argument("--q", type=float, default=1.0, help="sampling rate")
    p.add_argument("--sigma", type=float, default=1.0, help="noise multiplier")
    p.add_argument("--steps", type=int, default=1, help="steps that the attacker sees in each run")
    p.add_argument("--K", type=int, default=1, help="draws averaged inside one image's loss")
    p.add_argument("--delta", type=float, default=1e-5, help="delta, a probability")
    p.add_argument("--runs", type=int, default=4_000_000, help="runs without the canary, and as many with it")
    p.add_argument("--seed", type=int, default=0, help="of the audit; the real run's noise has none")
    p.add_argument("--break", dest="fault", choices=[*BROKEN, "all"], help="audit a step that is wrong")
    a = p.parse_args()
    world, fine = dict(q=a.q, sigma=a.sigma, steps=a.steps, K=a.K, others=1), True
    with screen.one_line(p.prog, "lower --runs"):
        for name in ("K", "steps"):
            if getattr(a, name) < 1:
                raise ValueError(f"--{name} {getattr(a, name)}: expected at least 1")
        if a.runs < 1000:
            raise ValueError(f"--runs {a.runs}: expected at least 1000, fewer show nothing")
        if not 0 <= a.seed < 2**32:
            raise ValueError(f"--seed {a.seed}: expected 0 to 2^32 - 1")
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
        sys.exit("the step that train.py runs is broken (or this was the 1 in 20: try another --seed)")


if __name__ == "__main__":
    main()
