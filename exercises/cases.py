"""cases.py -- what each exercise is graded on: inputs from the smallest up, and what they teach.

The answers are not here: the expected values come from the repository's own functions, run beside yours.
"""
import math
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from grade import Case, Exercise, load, on, show, HERE  # first: it puts the repository on the path
import accountant
import autoencoder
import data
import ddpm
import dpsgd
import lora
import theorem

COSINE = ddpm.Schedule(T=50, kind="cosine")


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# ex01 to ex03: diffusion


def noising():
    f, one = ddpm.q_sample, torch.ones(1, 1, 1, 1)
    yield on(f, "signal alone", "the signal is scaled by the ROOT of alpha_bar: alpha_bar is a share of "
             "variance, not of amplitude.", one, torch.tensor([500]), 0 * one)
    yield on(f, "noise alone", "the noise is scaled by sqrt(1 - alpha_bar), so that the variances add up to "
             "1 at every t.",
             0 * one, torch.tensor([500]), one)
    yield on(f, "two images, each at its own t", "every image has its own t: alpha_bar[t] must meet the "
             "image's dimension, not its pixels: [..., None, None, None].",
             torch.ones(2, 1, 1, 2), torch.tensor([0, 999]), torch.ones(2, 1, 1, 2), on_shape=True)
    yield on(f, "another schedule", "use the schedule that is passed in: the model must be sampled on the "
             "one it was trained on.", one, torch.tensor([20]), one, COSINE)
    yield on(f, "one image, three draws", "leading dimensions broadcast: the loss noises one image K times "
             "this way.",
             rand(0, 2, 1, 1, 2, 2), torch.tensor([[1, 2, 3], [500, 600, 999]]), rand(1, 2, 3, 1, 2, 2),
             on_shape=True)


def half(x, t, labels):
    """the model x/2"""
    return x / 2


def knowing(x, t, labels):
    """the model x t/1000 + label"""
    return x * t.view(-1, 1, 1, 1) / 1000 + (0 if labels is None else labels.view(-1, 1, 1, 1))


def losses():
    f, t = ddpm.loss, torch.tensor
    yield on(f, "one image, one draw", "noise the image, ask the model, square the difference to the noise, "
             "average over C, H, W.", half, torch.ones(1, 1, 1, 2), None, t([[500]]), rand(0, 1, 1, 1, 1, 2))
    yield on(f, "one image, two draws", "an image's loss is the MEAN over its K draws. A sum makes its "
             "gradient K times as long; two rows for two draws make it count twice when rows are clipped: "
             "one image would move the sum by K C, the noise is for C.",
             half, torch.ones(1, 1, 1, 1), None, t([[100, 900]]),
             rand(1, 1, 2, 1, 1, 1),
             on_shape=True)
    yield on(f, "two images", "one number for each image, (n,), not one for the lot: what is not separate "
             "cannot be clipped separately.",
             half, rand(2, 2, 1, 1, 1), None, t([[100], [900]]), rand(3, 2, 1, 1, 1, 1),
             on_shape=True)
    yield on(f, "two images with labels, two draws", "rows i K to i K + K - 1 belong to image i, so its "
             "label is repeated K times in a row (0, 0, 1, 1). In the order 0, 1, 0, 1 an image is trained "
             "with the label of another.",
             knowing, rand(4, 2, 1, 1, 1), t([0, 1]), t([[100, 200], [300, 900]]), rand(5, 2, 2, 1, 1, 1))
    yield on(f, "another schedule", "pass the schedule on.", half, rand(6, 1, 1, 2, 2), None, t([[3]]),
             rand(7, 1, 1, 1, 2, 2), COSINE)
    yield on(f, "five colour images", "the same, at full size.", knowing, rand(8, 5, 3, 4, 4),
             t([0, 1, 2, 3, 4]),
             torch.arange(15).view(5, 3) * 60, rand(9, 5, 3, 3, 4, 4))


def ddim_step(x: Tensor, noise: Tensor, a: float, a_next: float, eta: float, fresh: Tensor) -> Tensor:
    """The repository's ddim_sample made to take this one jump, on these levels, with these draws."""
    seen, levels = [], [a] if a_next == 1 else [a_next, a]

    class Fixed(torch.nn.Linear):                                # any module with a parameter, hence a device
        classes = None

        def forward(self, x_t, t, labels):
            seen.append(x_t)
            return noise
    schedule = SimpleNamespace(T=len(levels), alpha_bar=torch.tensor(levels, dtype=torch.float64))
    with mock.patch("torch.randn", side_effect=[x, fresh]):
        end = ddpm.ddim_sample(Fixed(1, 1), None, x.shape, steps=len(levels), eta=eta, schedule=schedule)
    return end if a_next == 1 else seen[1]


def jumps():
    f, pixel = ddim_step, lambda v: torch.tensor(float(v)).view(1, 1, 1, 1)
    yield on(f, "the last jump", "at a_next = 1 all noise is gone: the answer is the image that the model "
             "sees.",
             pixel(0.3), pixel(0.1), 0.25, 1.0, 0.0, pixel(9))
    yield on(f, "a jump half-way, eta = 0", "keep the image, scale it to the new level, and put the same "
             "noise back at its new strength sqrt(1 - a_next).",
             pixel(0.3), pixel(0.1), 0.25, 0.64, 0.0, pixel(9))
    yield on(f, "a guess outside [-1, 1]", "the image is clipped first; the noise must then be computed "
             "AGAIN, from the clipped image, or the two no longer add up to x.",
             pixel(2), pixel(0.1), 0.25, 0.64, 0.0,
             pixel(9))
    yield on(f, "eta = 1", "sigma of the fresh noise is taken from the old one: sqrt(1 - a_next - sigma^2), "
             "so the variance of the whole stays 1 - a_next.",
             pixel(0.3), pixel(0.1), 0.25, 0.64, 1.0, pixel(0.5))
    yield on(f, "the last jump, eta = 1", "sigma is 0 at a_next = 1: no noise is added to a finished image.",
             pixel(0.3), pixel(0.1), 0.25, 1.0, 1.0, pixel(9))
    yield on(f, "eta = 1.5", "here 1 - a_next - sigma^2 is below 0: max(..., 0) under the root, or the image "
             "is NaN.",
             pixel(0.3), pixel(0.1), 0.25, 0.64, 1.5, pixel(0.5))
    for seed in range(4):
        a, a_next = (float(ddpm.LINEAR.alpha_bar[t]) for t in (900 - 200 * seed, 700 - 200 * seed))
        yield on(f, "random images", "the same, at levels of the real schedule.", rand(seed, 2, 3, 4, 4),
                 rand(seed + 9, 2, 3, 4, 4), a, a_next, seed / 3, rand(seed + 99, 2, 3, 4, 4))


# -----------------------------------------------------------------------------
# ex04, ex05: LoRA


def layer(W: Tensor, b: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> lora.LoRALinear:
    made = lora.LoRALinear(torch.nn.Linear(*W.shape[::-1]), r, lora_alpha)
    with torch.no_grad():
        for p, value in ((made.base.weight, W), (made.base.bias, b), (made.lora_A, A), (made.lora_B, B)):
            p.copy_(value)
    return made


def lora_forward(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    return layer(W, b, A, B, lora_alpha, r)(x).detach()


def merged_weight(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    model = torch.nn.Sequential(layer(W, torch.zeros(len(W)), A, B, lora_alpha, r))
    return lora.merge(model)[0].weight.detach()


def factors(seed: int, d_in: int, d_out: int, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rand(seed, d_out, d_in), rand(seed + 1, d_out), rand(seed + 2, r, d_in), rand(seed + 3, d_out, r)


def layers():
    f, eye, t = lora_forward, torch.eye(2), torch.tensor
    yield on(f, "B = 0, the first step", "with B = 0 the layer is the public one: W x + b.", t([5., 7.]),
             eye, t([1., 2.]),
             t([[1., 0.]]), torch.zeros(2, 1), 1.0, 1)
    yield on(f, "rank 1", "x goes through A (down to r numbers), then through B (up to d_out).",
             t([5., 7.]), eye, torch.zeros(2), t([[1., 0.]]), t([[0.], [2.]]), 1.0, 1)
    yield on(f, "lora_alpha = 3, r = 2", "the update is scaled by lora_alpha / r, not by lora_alpha: meant "
             "to let one learning rate serve every r, if A is as large at every r. (Here A has std 1/r, so "
             "train.py takes lora_alpha = r.)",
             t([1., 1.]), eye, t([1., 2.]), eye, eye, 3.0, 2)
    yield on(f, "3 in, 4 out, a batch of tokens", "x has any number of leading dimensions; vectors are in "
             "the last one: x @ W.mT.", rand(0, 2, 5, 3), *factors(1, 3, 4, 2), 2.0, 2, on_shape=True)


def merges():
    f, t = merged_weight, torch.tensor
    yield on(f, "rank 1", "B A is (d_out, r) times (r, d_in); A B would be r x r.", torch.zeros(2, 2),
             t([[1., 2.]]),
             t([[3.], [4.]]), 1.0, 1, on_shape=True)
    yield on(f, "lora_alpha = 3, r = 2", "the scale lora_alpha / r belongs to the update, not to W.",
             torch.eye(2),
             torch.eye(2), torch.eye(2), 3.0, 2)
    W, _, A, B = factors(0, 3, 4, 2)
    yield on(f, "3 in, 4 out", "the shape of W is (d_out, d_in).", W, A, B, 2.0, 2, on_shape=True)


# -----------------------------------------------------------------------------
# ex06 to ex08: the private gradient


def squared(params, x):
    """the loss (w x)^2"""
    return (params["w"] * x).square().sum()


def affine(params, x, y):
    """the loss |M x + v - y|^2"""
    return (params["M"] @ x + params["v"] - y).square().sum()


def gradients():
    f, t = dpsgd.per_sample_grads, torch.tensor
    yield on(f, "one example", "d/dw (w x)^2 = 2 w x^2; the result is a dict like params, with one row for "
             "each example.",
             squared, {"w": t(1.)}, t([3.]), on_shape=True)
    yield on(f, "two examples", "each example has its own row. One row (their sum or mean) is what "
             "loss.backward() gives: no one can be clipped in it any more.",
             squared, {"w": t(1.)}, t([1., 3.]), on_shape=True)
    yield on(f, "an example that is NaN", "its row is NaN, the others are not touched: rows never meet "
             "before they are clipped.", squared, {"w": t(1.)}, t([1., math.nan, 2.]))
    yield on(f, "two tensors, examples (x, y)", "in_dims needs one entry for each argument: None for params, "
             "0 for every one of the examples, however many there are.",
             affine, {"M": rand(0, 2, 3), "v": rand(1, 2)}, rand(2, 5, 3), rand(3, 5, 2))


def clippings():
    f, t = dpsgd.clip_and_sum, torch.tensor
    yield on(f, "a gradient shorter than C", "what is below the bound passes as it is: min(1, C / norm), not "
             "C / norm. To scale everything to C would still be private, but tells Adam nothing about how "
             "certain an image is.",
             {"a": t([[0.3, 0.4]])}, 1.0)
    yield on(f, "a gradient longer than C", "it keeps its direction and is scaled to norm C.",
             {"a": t([[3., 4.]])}, 1.0)
    yield on(f, "two gradients", "each is clipped by its OWN norm, then they are added. Clip the sum "
             "instead, and one image can turn all of it round: its presence shows however large the lot.",
             {"a": t([[3., 4.], [0.3, 0.4]])}, 1.0)
    yield on(f, "two tensors", "the norm is over all tensors jointly: 5 here. Tensor by tensor, one image "
             "moves the sum by C in each of L tensors, in all sqrt(L) C, and the noise is too weak by that "
             "factor.",
             {"a": t([[3., 0.]]), "b": t([[[4.]]])}, 1.0)
    yield on(f, "a gradient of zero", "0 / 0 is NaN: C / 0 = inf, and min(1, inf) = 1 leaves the zero alone.",
             {"a": torch.zeros(1, 2)}, 1.0)
    for strange in (math.nan, math.inf):
        yield on(f, f"one example is {strange}", "it counts as zero and the other example is still there. A "
                 "sum that turns NaN tells everybody that this image took part; and 0 * NaN is NaN, so a "
                 "factor 0 is not enough.",
                 {"a": t([[strange, 1.], [0.3, 0.4]]), "b": t([[5.], [0.]])}, 1.0)
    yield on(f, "C = 0", "a bound of 0 has no meaning: say so with a ValueError.", {"a": t([[3., 4.]])}, 0.0)
    yield on(f, "C = inf", "no clipping, for a baseline without privacy: the plain sum.",
             {"a": t([[3., 4.], [0.3, 0.4]])}, math.inf)
    for n in (1, 7, 40):
        yield on(f, f"{n} random gradients", "the same, in three tensors of different shapes.",
                 {"a": rand(n, n, 2, 3), "b": 9 * rand(n + 1, n, 5), "c": rand(n + 2, n, 1)}, 2.0)


PARAMS = {"w": torch.zeros(1), "v": torch.zeros(2)}


def rows(params, x):
    """per_sample: the gradient of example x is x itself, in two tensors"""
    if len(x) == 0:
        raise RuntimeError("per_sample was called on no examples: vmap over zero rows raises")
    return {"w": x[:, :1], "v": x[:, 1:]}


def lot(*x: float) -> tuple[Tensor]:
    return (torch.tensor(x, dtype=torch.float).view(-1, 3),)


def zeros(params, x):
    """per_sample: every example's gradient is 0"""
    return {name: torch.zeros(len(x), *p.shape) for name, p in params.items()}


def noise_of(f, seed: int, n: int, numbers: int, chunk: int = 256) -> tuple[dict, torch.Generator]:
    """One step on n gradients of zero, in units of sigma C / B; and its generator, as it left it."""
    generator = torch.Generator().manual_seed(seed)
    params = {"w": torch.zeros(numbers // 2), "v": torch.zeros(2, numbers // 4)}
    step = f(zeros, params, (torch.zeros(n, 3),), C=0.03, sigma=1.7, B=5.0, generator=generator, chunk=chunk)
    return {name: g.flatten() * 5 / (1.7 * 0.03) for name, g in step.items()}, generator


def steps():
    f = dpsgd.private_gradient

    def say(title, means, examples, **kw):
        return on(f, title, means, rows, PARAMS, examples, **kw)
    yield say("one image of four expected", "divide by the DECLARED B. The realised lot size is private: an "
              "image that joins would change what all others count for.",
              lot(0.3, 0.4, 0), C=1.0, sigma=0.0, B=4.0)
    yield say("an empty lot, no noise", "nobody was sampled: the sum is zero, in the shapes of params, and "
              "per_sample is not called.", lot(), C=1.0, sigma=0.0, B=4.0, on_shape=True)
    yield say("a long gradient and a short one", "clip each image to C before adding.",
              lot(3, 4, 0, 0.3, 0.4, 0), C=1.0,
              sigma=0.0, B=4.0)
    yield say("seven images in chunks of two", "chunks are memory only: all of them count, also the last, "
              "shorter one.",
              (rand(0, 7, 3),), C=1.0, sigma=0.0, B=4.0, chunk=2)

    def largest(f):
        sizes = []

        def spy(params, x):
            sizes.append(len(x))
            return rows(params, x)
        f(spy, {name: p.clone() for name, p in PARAMS.items()}, (rand(0, 7, 3),), C=1.0, sigma=0.0, B=4,
          chunk=2)
        return max(sizes)
    yield Case("the largest part", "per_sample gets at most `chunk` examples at a time: that is what bounds "
               "the memory.",
               dict(lot="7 images", chunk=2), largest)

    # 400,000 draws know their standard deviation to 0.11%, 60,000 to 0.3%, 10,000 to 0.7%
    for n, numbers, chunk, tolerance, means in (
            (1, 400_000, 2, 0.005, "B times the result holds noise of std sigma C. With sigma alone it does "
             "not fit the clipping; with a little less than sigma C the epsilon is not the one that was "
             "promised."),
            (0, 400_000, 2, 0.005, "the noise comes also where nobody was sampled: a result without it says "
             "just that."),
            (100, 60_000, 40, 0.015, "noise is drawn once a step. Once a chunk, its amount tells the lot's "
             "size."),
            (1000, 10_000, 256, 0.04, "noise is drawn once a step, for every lot, however large.")):
        def std(f, n=n, numbers=numbers, chunk=chunk):
            tensors, _ = noise_of(f, 0, n, numbers, chunk)
            return torch.cat(list(tensors.values())).std().item()
        shown = {"lot": f"{n} gradients of zero", "C, sigma, B": (0.03, 1.7, 5.0), "chunk": chunk,
                 "measured": "std / (sigma C)"}
        yield Case(f"the noise of {n} image{'s' * (n != 1)}", means, shown, std, (tolerance, 0.0),
                   expected=1.0)

    def moved(f):
        _, generator = noise_of(f, 0, 1, 1000)
        return not torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
    yield Case("the generator after a step", "the noise must come from the generator that was passed in, "
               "which the operating system has seeded: pass it on as generator=generator. torch's global one "
               "has a seed of 32 bits or, after torch.manual_seed, one that everybody knows.",
               dict(measured="has the generator been used?"),
               moved, expected=True)

    def two_steps(f):
        generator, params = torch.Generator().manual_seed(0), {"w": torch.zeros(20_000)}
        first, second = (f(zeros, params, (torch.zeros(1, 3),), C=0.03, sigma=1.7, B=5.0,
                           generator=generator)["w"]
                         for _ in range(2))
        return torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    yield Case("the noise of two steps", "it must be fresh in every step: noise that comes twice is gone in "
               "the difference.",
               dict(measured="correlation"), two_steps, (0.0, 0.06), expected=0.0)

    def two_rows(f):
        noise = torch.cat(list(noise_of(f, 0, 1, 40_000)[0].values())).view(4, -1)     # w's halves, v's rows
        return (torch.corrcoef(noise) - torch.eye(4)).abs().max().item()
    yield Case("the noise of two tensors, of two rows of one", "it must be independent in every coordinate: "
               "otherwise some combination of the weights is published without noise.",
               dict(measured="largest correlation"), two_rows, (0.0, 0.06), expected=0.0)
    for wrong in (dict(B=0.0), dict(B=4.0, chunk=0)):
        yield say(f"{wrong}", "settings without meaning are refused, with a ValueError.", lot(1, 1, 1),
                  **dict(C=1.0, sigma=0.0) | wrong)


# -----------------------------------------------------------------------------
# ex09 to ex12: the accountant


def gaussian_rdp(sigma: float, order: float) -> float:
    return float(accountant.rdp(1, sigma, order))


def gaussians():
    f = gaussian_rdp
    yield on(f, "sigma = 1, order 2", "a / (2 sigma^2).", 1.0, 2.0)
    yield on(f, "sigma = 2, order 8", "sigma enters by its square: twice the noise, a quarter of the cost.",
             2.0, 8.0)
    yield on(f, "no noise", "without noise one look tells all: infinity, not an error.", 0.0, 2.0)
    yield on(f, "order 1", "orders are above 1 (at 1 it is the Kullback-Leibler divergence): ValueError.",
             1.0, 1.0)
    for sigma, order in ((0.3, 1.01), (17.0, 33.3), (5.0, 4000.0)):
        yield on(f, "other settings", "a / (2 sigma^2).", sigma, order)


def rdp(q: float, sigma: float, order: float) -> float:
    return float(accountant.rdp(q, sigma, order))


def integrals():
    def say(title, means, *args):
        return Case(title, means, dict(zip(("q", "sigma", "order"), args)), lambda f: f(*args), (1e-5, 1e-10))
    yield say("q = 1", "everybody takes part: ex09.", 1.0, 2.0, 8.0)
    yield say("q = 0", "nobody is ever sampled: 0. The logarithm of q must not be taken here.", 0.0, 1.0, 2.0)
    yield say("no noise", "infinity.", 0.1, 0.0, 2.0)
    yield say("q = 1/2, order 2", "log(1 + q^2 (e^(1/sigma^2) - 1)). If yours is q^2 a / (2 sigma^2): that "
              "is smaller than the truth, and an epsilon from it is a promise that does not hold.",
              0.5, 1.0, 2.0)
    yield say("a real order", "orders are real numbers: the best one is rarely whole, and no binomial sum "
              "helps here.",
              0.3, 0.5, 1.5)
    yield say("little noise, a high order", "exp overflows: keep the logarithm of the integrand, add up with "
              "logsumexp; and reach as far as z = a + 14 sigma, where the mass of the integrand is.",
              0.3, 0.5, 64.0)
    yield say("sigma = 0.2", "the integrand has features of width sigma^2: a grid of step sigma / 25 "
              "suffices; one whose step does not follow sigma (1/2, say) is too coarse here.", 0.04, 0.2, 4.3)
    yield say("much noise", "a large sigma needs a wide grid: its ends are 14 SIGMA away.", 0.4, 12.0, 59.1)
    yield say("a small rate", "q = 0.001 is ordinary in practice.", 0.001, 0.7, 12.3)
    for wrong in ((1.5, 1.0, 2.0), (0.5, -1.0, 2.0), (0.5, 1.0, 1.0)):
        yield say("settings without meaning", "ValueError.", *wrong)


def conversions():
    f = accountant.to_epsilon
    yield on(f, "one order", "the formula itself. If you have RDP - log(delta) / (a - 1): that is Mironov's "
             "of 2017, valid, but it gives away a fifth of epsilon here.", [1.0], [8.0], 1e-5)
    yield on(f, "two orders", "each order proves an epsilon and all of them hold: the smallest is yours.",
             [0.5, 2.0], [4.0, 16.0], 1e-5)
    yield on(f, "almost nothing spent, a large delta", "the formula goes below 0 here; epsilon does not.",
             [0.001], [2.0],
             0.9)
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    yield on(f, "2250 steps of q = 0.04, sigma = 1.5", "a known value: 7.3291, at order 3.9.",
             2250 * accountant.rdp(0.04, 1.5, orders), orders, 1e-5)
    for total, order, delta in (([1.0], [2.0], 0.0), ([1.0], [2.0], 1.0), ([1.0], [1.0], 1e-5),
                                ([-1.0], [2.0], 1e-5), ([math.nan], [2.0], 1e-5)):
        yield on(f, "numbers without meaning", "a delta outside (0, 1), an order of 1, an RDP below 0 or "
                 "NaN: ValueError, not a figure that looks like a guarantee.", total, order, delta)


def calibrations():
    names = ("epsilon", "delta", "q", "steps")
    budgets = [("a single Gaussian", (1.0, 1e-5, 1.0, 1)), ("this repository's own run",
                                                            (10.0, 1e-5, 512 / 60_000, 110)),
               ("a small budget", (0.1, 1e-6, 0.01, 1000)), ("a large one", (100.0, 1e-5, 0.01, 10))]
    budgets += [(f"a single Gaussian, epsilon = {e}", (e, 1e-5, 1.0, 1))
                for e in (0.3, 0.5, 0.7, 2.0, 3.0, 5.0, 7.0, 10.0)]
    for title, args in budgets:
        def verdict(f, args=args):
            target, delta, q, steps = args
            sigma = f(*args)
            if not isinstance(sigma, (int, float)):
                raise TypeError(f"the result is {show(sigma)}, expected one number")
            spent = accountant.epsilon(q, sigma, steps, delta)[0]
            if spent > target:
                return f"sigma = {sigma:.6g} spends epsilon = {spent:.8g}: over the budget"
            wasted = sigma / accountant.calibrate(*args) - 1
            if wasted > 0.01:
                return f"{wasted:.1%} more noise than needed"
            return "keeps the budget, wastes at most 1%"
        yield Case(title, "return the end of the bracket that was CHECKED to keep the budget. Spending more "
                   "than was promised breaks the promise, however little it is; noise beyond what is needed "
                   "costs quality.",
                   dict(zip(names, args)), verdict)
    f = accountant.calibrate
    yield on(f, "no steps", "nothing is released, no noise is needed: 0.", 1.0, 1e-5, 0.1, 0)
    yield on(f, "epsilon = 0", "no noise is enough for epsilon = 0: ValueError, not an endless loop.", 0.0,
             1e-5, 0.1, 10)


# -----------------------------------------------------------------------------
# ex13: the test that catches a leak

RIGHT = dpsgd.private_gradient


def another_right_step(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """Image by image, its noise drawn at once for all tensors: other bits, the same guarantee."""
    parts = [dpsgd.clip_and_sum(per_sample(params, *(e[i:i + 1] for e in examples)), C)
             for i in range(len(examples[0]))]
    sizes = [p.numel() for p in params.values()]
    noise = torch.randn(sum(sizes), generator=generator).split(sizes)
    return {name: (sum((part[name] for part in parts), torch.zeros_like(p)) + sigma * C * z.view_as(p)) / B
            for (name, p), z in zip(params.items(), noise)}


def twice_C(*a, C, sigma, **kw):
    return RIGHT(*a, C=2 * C, sigma=sigma / 2, **kw)                     # the noise's std is still sigma C


def draws_apart(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    if examples[0].ndim < 2:                                             # no draws: the right step
        return RIGHT(per_sample, params, examples, C=C, sigma=sigma, B=B, generator=generator, chunk=chunk)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for k in range(examples[0].shape[1] if len(examples[0]) else 0):
        for name, g in dpsgd.clip_and_sum(per_sample(params, *(e[:, k:k + 1] for e in examples)), C).items():
            total[name] += g
    return {name: g / B for name, g in dpsgd.add_noise(total, sigma * C, generator).items()}


def half_the_noise(*a, sigma, **kw):
    return RIGHT(*a, sigma=sigma / 2, **kw)


def one_tensor_bare(*a, sigma, **kw):
    first = next(iter(a[1]))
    return RIGHT(*a, sigma=sigma, **kw) | {first: RIGHT(*a, sigma=0.0, **kw)[first]}


def step_of(number: int):
    """The private step with one of the bugs of bugs/ in it."""
    bug = theorem.BUGS[number - 1]
    module = load(HERE / "bugs" / f"{bug}.py")
    if module.STANDS_IN_FOR == "dpsgd.private_gradient":
        return module.private_gradient

    def step(*a, **kw):
        with theorem.installed(bug):
            return RIGHT(*a, **kw)
    return step


STEPS = [                                                     # what it is, step, does it leak?, what it means
    ("the repository's step", RIGHT, False, "nothing is wrong with it; a test that cries wolf is switched "
     "off."),
    ("another correct step", another_right_step, False, "it draws its noise in another order, which is just "
     "as good: test the guarantee (distances, standard deviations), not the bits."),
    ("a step that clips at 2C", twice_C, True, "one image moves the sum by 2C. Does your longest gradient "
     "exceed 2C?"),
    ("a step that clips K draws one by one", draws_apart, True, "the published code: one image moves the sum "
     "by up to K C. Give it an image whose K draws point the same way."),
    ("a step that divides by the realised lot", step_of(2), True,
     "compare a lot with and without one image, B not its size."),
    ("a step that clips the lot's mean", step_of(3), True, "one image can turn it all round: add one that "
     "points back."),
    ("a step that clips each tensor on its own", step_of(4), True,
     "one image moves the sum by sqrt(2) C: give it a gradient that is long in both tensors of `toy`."),
    ("a step whose noise lacks the factor C", step_of(5), True, "at C = 10 the noise is ten times too weak "
     "for its epsilon. (At C < 1 it is too strong, and nothing is learnt.)"),
    ("a step without noise for an empty lot", step_of(7), True, "a result of exactly 0 says that nobody was "
     "sampled."),
    ("a step that keeps a NaN example", step_of(9), True, "one NaN image makes the whole result NaN: its "
     "presence is published. Every comparison with NaN is False: `not moved <= C` catches it, `moved > C` "
     "does not."),
    ("a step with half the noise", half_the_noise, True, "the standard deviation is sigma C, to a few "
     "percent; half of it is an epsilon about twice as large."),
    ("a step that leaves one tensor without noise", one_tensor_bare, True, "look at the noise of EVERY "
     "tensor: the bare one is published as it is."),
    ("a step with new noise for each chunk", step_of(6), True, "the noise grows with the lot and so "
     "tells its size: give it a lot of several chunks."),
    ("a step with the same noise every time", step_of(13), True, "call it twice with one generator: the "
     "difference has no noise."),
]


def leaks(step) -> bool:
    """Stands for the repository, which has theorems instead of this function."""
    return next(answer for _, known, answer, _ in STEPS if known is step)


def suspects():
    for title, step, answer, means in STEPS:
        yield Case(title, means, {"this step": "leaks" if answer else "keeps the guarantee"},
                   lambda f, step=step: bool(f(step)), expected=answer)


# -----------------------------------------------------------------------------
# ex14: latents


def private_latents(encode, public: Tensor, private: Tensor) -> Tensor:
    """The repository's two functions with this encoder in an autoencoder's place, at the images' own size."""
    mu, _ = encode(data.to_float(public))
    model = SimpleNamespace(encode=encode, scale=torch.ones(()), latent_channels=mu.shape[1],
                            f=public.shape[-1] // mu.shape[-1], config=dict(image_channels=public.shape[1]))
    with mock.patch("autoencoder.SIDE", 1):                              # no enlarging
        autoencoder.measure_scale(model, public)
        return autoencoder.to_latents(model, private)


def sure(x):
    """mu = x, sigma = 0"""
    if not x.is_floating_point():
        raise TypeError(f"E reads floats in [-1, 1], got {x.dtype}")
    return x, torch.full_like(x, -math.inf)


def unsure(x):
    """mu = x, sigma = 1"""
    return x, torch.zeros_like(x)


def doubled(x):
    """mu = (x, 10 x), two channels, sigma = 0"""
    return sure(torch.cat([x, 10 * x], dim=1))


def real(x):
    """autoencoder.Autoencoder.encode, random weights, f = 4"""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return autoencoder.Autoencoder(channels=8, blocks=(1, 1)).encode(x)


def grey(*levels: int, pixels: int = 1) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, pixels)


def photographs(seed: int, *shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def encodings():
    f, public, close = private_latents, grey(0, 255), grey(102, 153)
    yield on(f, "private images that are the public ones", "grey levels become floats in [-1, 1] before E "
             "sees them; the latent is mu(x) divided by one number, the standard deviation of mu over all "
             "public images, as the tensors' own .std() has it.", sure, public, public, on_shape=True)

    def moved(f):                                # the private images may be more spread than the public ones
        before, after = f(sure, close, grey(51, 102)), f(sure, close, grey(51, 102, 255))
        return (after[:2] - before).abs().max().item()
    yield Case("a white image joins two dark ones", "the two dark images are what they were, so their "
               "latents must be, too. Whatever is measured on the private images, a scale, a mean, a "
               "whitening, every image has a share in: one that joins then moves everybody's latent, and "
               "with it everybody's gradient, while the noise hides one image that moves the sum by C. "
               "Measure it on the public images.",
               {"encode": sure, "public": close, "private": "levels 51, 102; then 51, 102, 255",
                "measured": "how far the latents of 51 and 102 move"}, moved, expected=0.0)
    yield on(f, "private images darker than the public ones", "s is the public images' whoever is encoded: "
             "the private latents' own standard deviation is not 1, and nobody may make it so. Each image "
             "scaled by itself would keep the guarantee, but dark and bright would become one.",
             sure, grey(0, 255, 255, 0, pixels=2), grey(0, 51, 51, 102, pixels=2))
    yield on(f, "a latent of two channels", "s is one number for all channels: D undoes one, z / s.",
             doubled, public, grey(51), on_shape=True)
    yield on(f, "an encoder that is not sure", "the latent is the mean mu, not a draw from N(mu, sigma^2). A "
             "draw is no leak, but latents are made once, and each step adds noise of its own to them: z "
             "should be where D shows the image best.", unsure, public, grey(51, 102))
    yield on(f, "no private image", "a set of one image has this neighbour: no latents, in the shape of "
             "latents.", sure, public, grey(), on_shape=True)
    yield on(f, "five photographs and a real encoder", "the same, in colour.", real,
             photographs(0, 6, 3, 16, 16), photographs(1, 5, 3, 16, 16) // 3)


EXERCISES = {
    "ex01_noising": Exercise("ddpm.py:q_sample", ddpm.q_sample, noising, ("ddpm.q_sample",)),
    "ex02_loss": Exercise("ddpm.py:loss", ddpm.loss, losses, ("ddpm.loss",)),
    "ex03_ddim_step": Exercise("ddpm.py:ddim_sample", ddim_step, jumps,
                               ("ddpm.ddim_sample", "ddpm.ddpm_sample")),
    "ex04_lora_layer": Exercise("lora.py:LoRALinear", lora_forward, layers, ("lora.LoRALinear.forward",)),
    "ex05_merge": Exercise("lora.py:merge", merged_weight, merges, ("lora.merge", "lora.LoRALinear.delta")),
    "ex06_per_sample_gradients": Exercise("dpsgd.py:per_sample_grads", dpsgd.per_sample_grads, gradients,
                                          ("dpsgd.per_sample_grads", "dpsgd.per_sample_grads_by_copies")),
    "ex07_clipping": Exercise("dpsgd.py:clip_and_sum", dpsgd.clip_and_sum, clippings,
                              ("dpsgd.clip_and_sum",)),
    "ex08_noisy_lot": Exercise("dpsgd.py:private_gradient", dpsgd.private_gradient, steps,
                               ("dpsgd.private_gradient",)),
    "ex09_gaussian_rdp": Exercise("accountant.py:rdp", gaussian_rdp, gaussians, ("accountant.rdp",)),
    "ex10_subsampled_rdp": Exercise("accountant.py:rdp", rdp, integrals,
                                    ("accountant.rdp", "accountant._log_A")),
    "ex11_to_epsilon": Exercise("accountant.py:to_epsilon", accountant.to_epsilon, conversions,
                                ("accountant.to_epsilon", "accountant._convert")),
    "ex12_calibrate": Exercise("accountant.py:calibrate", accountant.calibrate, calibrations,
                               ("accountant.calibrate",)),
    "ex13_catch_a_leak": Exercise("tests/test_dpsgd.py", leaks, suspects, ("cases.leaks",)),
    "ex14_latents": Exercise("autoencoder.py:to_latents", private_latents, encodings,
                             ("autoencoder.to_latents", "autoencoder.measure_scale")),
}
