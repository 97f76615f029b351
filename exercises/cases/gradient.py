"""gradient.py -- what ex06 to ex08 are graded on: one gradient an example, clip and sum, a private step."""
import functools
import math
import secrets

import numpy as np
import torch
from scipy.stats import kstest, kurtosis
from torch import Tensor

from grade import Case, Told, on, source
import dpsgd
from cases.inputs import AFRESH, CHANCE, new, rand, seeded


def squared(params, x):
    """the loss (w x)^2"""
    return (params["w"] * x).square().sum()


def affine(params, x, y):
    """the loss |M x + v - y|^2"""
    return (params["M"] @ x + params["v"] - y).square().sum()


def gradients():
    say, t = functools.partial(on, dpsgd.per_sample_grads), torch.tensor
    yield say("one example", "d/dw (w x)^2 = 2 w x^2; the result is a dict like params, with one row for "
              "each example.", squared, {"w": t(1.)}, t([3.]), on_shape=True)
    yield say("two examples", "each example has its own row. One row (their sum or mean) is what "
              "loss.backward() gives: no one can be clipped in it any more.",
              squared, {"w": t(1.)}, t([1., 3.]), on_shape=True)
    yield say("an example that is NaN", "its row is NaN and the others are not touched: rows never meet "
              "before they are clipped.", squared, {"w": t(1.)}, t([1., math.nan, 2.]))
    yield say(AFRESH, "in_dims needs one entry for each argument: None for params, 0 for every one of the "
              "examples, however many there are.",
              affine, {"M": new(2, 3), "v": new(2)}, new(5, 3), new(5, 2))


def clippings():
    say, t = functools.partial(on, dpsgd.clip_and_sum), torch.tensor
    yield say("a gradient shorter than C", "what is below the bound passes as it is: min(1, C / norm), not "
              "C / norm. To scale everything to C would still be private, but tells Adam nothing about how "
              "certain an image is.", {"a": t([[0.3, 0.4]])}, 1.0)
    yield say("a gradient longer than C", "it keeps its direction and is scaled to norm C.",
              {"a": t([[3., 4.]])}, 1.0)
    yield say("two gradients", "each is clipped by its OWN norm, then they are added. If the sum is clipped "
              "instead, one image can turn all of it round: its presence shows however large the lot is.",
              {"a": t([[3., 4.], [0.3, 0.4]])}, 1.0)
    yield say("two tensors", "the norm is over all tensors jointly: 5 here. Tensor by tensor, one image "
              "moves the sum by C in each of L tensors, sqrt(L) C in all, and the noise is made for C.",
              {"a": t([[3., 0.]]), "b": t([[[4.]]])}, 1.0)
    yield say("a gradient of zero", "0 / 0 is NaN. C / 0 = inf, and min(1, inf) = 1 leaves the zero alone.",
              {"a": torch.zeros(1, 2)}, 1.0)
    for strange in (math.nan, math.inf):
        yield say(f"one example is {strange}", "it counts as zero and the other example is still there. A "
                  "sum that turns NaN tells everybody that this image took part; and 0 * NaN is NaN, so a "
                  "factor 0 is not enough.", {"a": t([[strange, 1.], [0.3, 0.4]]), "b": t([[5.], [0.]])}, 1.0)
    yield say("C = 0", "a bound of 0 has no meaning: say so with a ValueError.", {"a": t([[3., 4.]])}, 0.0)
    yield say("C = inf", "no clipping, for a baseline without privacy: the plain sum.",
              {"a": t([[3., 4.], [0.3, 0.4]])}, math.inf)
    tiny, C = t([[2e-23, 0.]]), 1e-25

    def length(f):
        return float(f({"a": tiny.clone()}, C)["a"].double().norm()) / C
    yield Case("C = 1e-25, a gradient of norm 200 C", "the square of a float32 below 1e-23 is 0, so a norm "
               "that is computed in float32 is 0 here, and a gradient 200 times too long passes as it is. "
               "Take the squares in float64: g.double().",
               {"grads": {"a": tiny}, "C": C, "measured": "norm of the sum / C"}, length, expected=1.0)
    for n in (2, 7, 40):
        yield say(AFRESH, f"the same, for {n} gradients in three tensors of different shapes.",
                  {"a": new(n, 2, 3), "b": 9 * new(n, 5), "c": new(n, 1)}, CHANCE.uniform(1, 3))


def private_gradient(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    return dpsgd.private_gradient(per_sample, params, examples, C=C, sigma=sigma, B=B,
                                  generator=source(generator), chunk=chunk)


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


def noise_of(f, generator, numbers: int, n: int = 1, chunk: int = 256, dtype=torch.float32) -> np.ndarray:
    """The noise of one step on n gradients of zero, in units of sigma C / B: (numbers,)."""
    params = {"w": torch.zeros(numbers // 2, dtype=dtype), "v": torch.zeros(2, numbers // 4, dtype=dtype)}
    step = f(zeros, params, (torch.zeros(n, 3),), C=1 / 32, sigma=2.0, B=4.0, generator=generator,
             chunk=chunk)
    if any(type(g) not in (Tensor, torch.nn.Parameter) for g in step.values()):
        raise Told("the result holds something that calls itself a tensor and is none")
    return 64 * torch.cat([g.detach().flatten().double() for g in step.values()]).numpy()


NORMAL = "independent normals of standard deviation sigma C"


def law(z: np.ndarray) -> str:
    """NORMAL, or what is wrong with these numbers. Right noise fails at most once in 10^7."""
    deviation, slack = z.std(), 5.8 / math.sqrt(2 * z.size)
    if not abs(deviation - 1) < slack or not abs(z.mean()) < 2 * slack:
        return f"mean {z.mean():.3g}, standard deviation {deviation:.4g}, in units of sigma C"
    if kstest(z.ravel(), "norm").pvalue < 1e-8:                          # Kolmogorov & Smirnov
        return f"not normal: the kurtosis is {kurtosis(z, None, fisher=False):.3g}, and of normals 3"
    if z.size > 300_000 and not 4 < abs(z).max() < 7.5:
        return f"cut off: the longest of {z.size} is {abs(z).max():.3g} sigma C"
    repeats = np.fft.irfft(abs(np.fft.rfft(z.ravel())) ** 2)[1:z.size // 2] / z.size      # at each distance
    if abs(repeats).max() > 8 / math.sqrt(z.size):
        return f"numbers {abs(repeats).argmax() + 1} places apart are correlated: {max(repeats, key=abs):.2g}"
    return NORMAL


def dependence(z: np.ndarray) -> str:
    """NORMAL, or what hangs together in these (steps, numbers). Right noise fails at most once in 10^6."""
    pairs = z.reshape(len(z) // 2, -1)                                   # two steps in a row are one vector
    size, width = math.sqrt(len(pairs)), math.sqrt(pairs.shape[1])
    singular = np.linalg.svd(pairs, compute_uv=False)                    # [Davidson & Szarek 2001, Thm 2.13]
    if singular[-1] < size - width - 6 or singular[0] > size + width + 6:
        across = pairs.T @ pairs / len(pairs) - np.eye(pairs.shape[1])
        return f"two numbers, of one step or of two in a row, are correlated: {max(across.flat, key=abs):.2g}"
    found = [law(z), law((z[:, ::2] + z[:, 1::2]) / 2**0.5), law((z[::2] + z[1::2]) / 2**0.5)]
    return next((text for text in found if text != NORMAL), NORMAL)


def steps():
    say = functools.partial(on, private_gradient)
    four = dict(C=1.0, sigma=0.0, B=4.0)
    yield say("one image of four expected", "divide by the DECLARED B. The realised lot size is private: an "
              "image that joins would change what all others count for.",
              rows, PARAMS, lot(0.3, 0.4, 0), **four)
    yield say("an empty lot, no noise", "nobody was sampled: the sum is zero, in the shapes of params, and "
              "per_sample is not called.", rows, PARAMS, lot(), on_shape=True, **four)
    yield say("a long gradient and a short one", "clip each image to C before adding.",
              rows, PARAMS, lot(3, 4, 0, 0.3, 0.4, 0), **four)
    yield say(AFRESH, "seven images in chunks of two: chunks are memory only, and all of them count, also "
              "the last, shorter one.", rows, PARAMS, (new(7, 3),), chunk=2, **four)

    def largest(f):
        sizes = []

        def spy(params, x):
            sizes.append(len(x))
            return rows(params, x)
        f(spy, {name: p.clone() for name, p in PARAMS.items()}, (rand(0, 7, 3),), chunk=2, **four)
        return max(sizes)
    yield Case("the largest part", "per_sample gets at most `chunk` examples at a time: that is what bounds "
               "the memory.", dict(lot="7 images", chunk=2), largest)

    for n, numbers, chunk, means in (
            (1, 400_000, 2, "B times the result holds noise N(0, (sigma C)^2). With sigma alone it does not "
             "fit the clipping. With a little less than sigma C, or another distribution, the epsilon is not "
             "the one that was promised."),
            (0, 100_000, 2, "the noise comes also where nobody was sampled: a result without it says so."),
            (100, 60_000, 40, "noise is drawn once a step. Once a chunk, its amount tells the lot's size."),
            (1000, 10_000, 256, "noise is drawn once a step, for every lot, however large.")):
        def noise(f, n=n, numbers=numbers + 4 * secrets.randbelow(999), chunk=chunk):
            return law(noise_of(f, seeded(), numbers, n, chunk))
        shown = {"lot": f"{n} gradients of zero", "chunk": chunk, "measured": "the noise"}
        yield Case(f"the noise of {n} image{'s' * (n != 1)}", means, shown, noise, expected=NORMAL)

    def repeated(f):
        seed = secrets.randbelow(2**40)
        first, again, other = (noise_of(f, seeded(s), 40) for s in (seed, seed, seed + 1))
        return bool((first == again).all() and (first != other).any())
    yield Case("two steps with the same generator state, one with another", "the noise must come from the "
               "generator that was passed in, which the operating system has seeded: pass it on as "
               "generator=generator. torch's global one has a seed of 32 bits or, after torch.manual_seed, "
               "one that everybody knows.", dict(measured="is the noise the generator's?"), repeated,
               expected=True)

    def many(f):
        generator = seeded()
        return dependence(np.stack([noise_of(f, generator, 24) for _ in range(1000)]))
    yield Case("the noise of 1000 steps", "it must be new in every step, or it is gone in the difference of "
               "two; and independent in every coordinate, or some combination of the weights is published "
               "without noise.", dict(measured="the noise"), many, expected=NORMAL)

    def precision(f):
        z = noise_of(f, seeded(), 400, dtype=torch.float64)
        return "float32" if (z == z.astype(np.float32)).all() else "float64"
    yield Case("params in float64", "draw the noise with dtype=torch.float64, and round the finished sum "
               "once, to the precision of params. Normals of float32 lie on a lattice and end at 5.77 sigma, "
               "so a sum that lies elsewhere tells who was in it.", dict(measured="precision of the noise"),
               precision, expected="float64")
    for wrong in (dict(B=0.0), dict(B=4.0, chunk=0)):
        yield say(f"{wrong}", "settings without meaning are refused, with a ValueError.", rows, PARAMS,
                  lot(1, 1, 1), **dict(C=1.0, sigma=0.0) | wrong)
