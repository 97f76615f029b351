"""gradient.py -- the cases of ex06 to ex08: one gradient for each example, clip and sum, a private step."""
import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from grade import Case, on
import dpsgd
from cases.inputs import AFRESH, CHANCE, new, rand


def squared(params, x):
    """the loss (w x)^2"""
    return (params["w"] * x).square().sum()


def affine(params, x, y):
    """the loss |M x + v - y|^2"""
    return (params["M"] @ x + params["v"] - y).square().sum()


def gradients():
    say, t = functools.partial(on, dpsgd.per_sample_grads), torch.tensor
    yield say("one example", "d/dw (w x)^2 = 2 w x^2. The result is a dict like params, with one row for "
              "each example.", squared, {"w": t(1.)}, t([3.]), on_shape=True)
    yield say("two examples", "each example has its own row. loss.backward() gives a single row, their sum "
              "or mean, in which nobody can be clipped any more.", squared, {"w": t(1.)}, t([1., 3.]),
              on_shape=True)
    yield say("an example that is NaN", "its row is NaN and the other rows are not: rows must not be "
              "combined before they are clipped.", squared, {"w": t(1.)}, t([1., math.nan, 2.]))
    yield say(AFRESH, "in_dims needs one entry for each argument: None for params, and 0 for each of the "
              "examples, however many there are.",
              affine, {"M": new(2, 3), "v": new(2)}, new(5, 3), new(5, 2))


def clippings():
    say, t = functools.partial(on, dpsgd.clip_and_sum), torch.tensor
    yield say("a gradient shorter than C", "a gradient below the bound stays as it is: the factor is min(1, "
              "C / norm), not C / norm. To scale everything to norm C would still be private, but an image "
              "that the model knows well would count as much as any other.", {"a": t([[0.3, 0.4]])}, 1.0)
    yield say("a gradient longer than C", "it keeps its direction and is scaled to norm C.",
              {"a": t([[3., 4.]])}, 1.0)
    yield say("two gradients", "each is clipped by its OWN norm, and then they are added. If the sum is "
              "clipped instead, one image can reverse all of it, and its presence shows however large the "
              "lot is.", {"a": t([[3., 4.], [0.3, 0.4]])}, 1.0)
    yield say("two tensors", "the norm is over all tensors jointly, which is 5 here. If tensors are clipped "
              "one by one, an image moves each of L tensors by C and all of them by sqrt(L) C, while the "
              "noise is made for C.", {"a": t([[3., 0.]]), "b": t([[[4.]]])}, 1.0)
    yield say("a gradient of zero", "0 / 0 is NaN, but C / 0 = inf, and min(1, inf) = 1 leaves a zero as it "
              "is.", {"a": torch.zeros(1, 2)}, 1.0)
    for strange in (math.nan, math.inf):
        yield say(f"one example is {strange}", "it counts as zero, and the other example is still there. A "
                  "sum that becomes NaN tells everybody that this image took part. A factor 0 is not enough, "
                  "because 0 * NaN is NaN.", {"a": t([[strange, 1.], [0.3, 0.4]]), "b": t([[5.], [0.]])}, 1.0)
    for C in (0.0, -1.0):
        yield say(f"C = {C:g}", "a clipping norm that is not above 0 has no meaning, so a ValueError is "
                  "expected.", {"a": t([[3., 4.]])}, C)
    yield say("C = inf", "nothing is clipped, as for a baseline without privacy. The answer is the plain "
              "sum.", {"a": t([[3., 4.], [0.3, 0.4]])}, math.inf)
    tiny, C = t([[2e-23, 0.]]), 1e-25

    def length(f):
        return float(f({"a": tiny.clone()}, C)["a"].double().norm()) / C
    yield Case("C = 1e-25, a gradient of norm 200 C", "in float32 the square of 2e-23 is 0, so a norm that "
               "is computed in float32 is 0 here, and a gradient that is 200 times too long passes as it is. "
               "Take the squares in float64: g.double(). (If your result is far below 1, a small constant "
               "was added to the norm. That is private, but it leaves nothing of the gradient. No constant "
               "is needed: C / 0 = inf.)",
               {"grads": {"a": tiny}, "C": C, "measured": "norm of the sum / C"}, length, expected=1.0)
    for n in (2, 7, 40):
        yield say(AFRESH, f"the rules are the same for {n} gradients in three tensors of different shapes.",
                  {"a": new(n, 2, 3), "b": 9 * new(n, 5), "c": new(n, 1)}, CHANCE.uniform(1, 3))


PARAMS = {"w": torch.zeros(1), "v": torch.zeros(2)}


def rows(params, x):
    """per_sample: the gradient of example x is x itself, cut into the shapes of params"""
    if len(x) == 0:
        raise RuntimeError("per_sample was called on no examples, and vmap over zero rows raises")
    parts = x.split([p.numel() for p in params.values()], dim=1)
    return {name: g.reshape(-1, *p.shape) for (name, p), g in zip(params.items(), parts)}


def lot(*x: float) -> tuple[Tensor]:
    return (torch.tensor(x, dtype=torch.float).view(-1, 3),)


def normals(*z: float) -> Tensor:
    return torch.tensor(z, dtype=torch.float64)


def steps():
    say = functools.partial(on, dpsgd.private_gradient)
    four = dict(C=1.0, sigma=0.0, B=4.0, normals=normals(1, 1, 1))
    yield say("one image of four expected", "divide by the DECLARED B. The true size of the lot is private: "
              "if it were the divisor, an image that joins would change what all others count for.",
              rows, PARAMS, lot(0.3, 0.4, 0), **four)
    yield say("an empty lot, no noise", "nobody was sampled, so the sum is zero, in the shapes of params, "
              "and per_sample is not called.", rows, PARAMS, lot(), on_shape=True, **four)
    yield say("a long gradient and a short one", "clip each image's gradient to norm C before adding.",
              rows, PARAMS, lot(3, 4, 0, 0.3, 0.4, 0), **four)
    yield say(AFRESH, "seven images come in chunks of two. Chunks only save memory: all of them count, also "
              "the last and shorter one.", rows, PARAMS, (new(7, 3),), chunk=2,
              **four | dict(B=CHANCE.uniform(1.5, 9)))

    def largest(f):
        sizes = []

        def spy(params, x):
            sizes.append(len(x))
            return rows(params, x)
        f(spy, {name: p.clone() for name, p in PARAMS.items()}, (rand(0, 7, 3),), chunk=2, **four)
        return max(sizes)
    yield Case("the largest part", "per_sample gets at most `chunk` examples at a time, because that bounds "
               "the memory.", dict(lot="7 images", chunk=2), largest)

    def precision(f):
        return str(f(rows, {name: p.clone() for name, p in PARAMS.items()}, lot(1, 1, 1), **four)["w"].dtype)
    yield Case("the precision of the result", "add in float64, and return the precision of params, which is "
               "float32 here.", dict(params="two tensors in float32"), precision)

    ten = dict(C=10.0, sigma=2.0, B=4.0)
    yield say("noise", "it is sigma C times the normals that were passed in, one for each number, in the "
              "order of params. Noise of sigma alone does not fit the clipping norm. Normals of torch's own "
              "generator can be predicted, and a normal that is used twice cancels in a difference.",
              rows, PARAMS, lot(0, 0, 0), normals=normals(0.5, -6, 1), on_shape=True, **ten)
    yield say("noise, three chunks", "noise is added once in each step. If it is added once for each chunk, "
              "its amount tells the size of the lot.", rows, PARAMS, (torch.zeros(5, 3),),
              normals=normals(2, 1, -1), chunk=2, **ten)
    yield say("noise, an empty lot", "noise is also added where nobody was sampled, since a result without "
              "noise says that nobody was.", rows, PARAMS, lot(), normals=normals(-1, 3, 0.5), **ten)
    close = say("noise that takes almost all of the sum away", "sum and noise are added in float64, and the "
                "result is rounded once, at the end. float32 has neither 0.5 + 2^-25 (the sum) nor -0.5 - "
                "2^-26 (the first normal). If one of the two is rounded earlier, the result can take only "
                "some values, and which ones tells who was in the lot.", rows, PARAMS,
                lot(0.5, 0, 0, 2**-25, 0, 0), C=1.0, sigma=1.0, B=1.0, normals=normals(-0.5 - 2**-26, 0, 0))
    yield replace(close, tolerance=(1e-2, 1e-12))
    for n, params in ((7, {"M": torch.zeros(2, 3), "v": torch.zeros(4)}),
                      (1000, {"w": torch.zeros(50, 40)})):
        numbers = sum(p.numel() for p in params.values())
        yield say(AFRESH, f"the rules are the same for {n} images and {numbers} weights.", rows, params,
                  (new(n, numbers),), C=CHANCE.uniform(0.1, 9), sigma=CHANCE.uniform(0.5, 9),
                  B=CHANCE.uniform(1.5, 9), normals=3 * new(numbers).double())
    for wrong in (dict(B=0.0), dict(B=-4.0), dict(B=4.0, chunk=0), dict(B=4.0, chunk=-1)):
        yield say(f"{wrong}", "settings without meaning are refused with a ValueError.", rows, PARAMS,
                  lot(1, 1, 1), **four | wrong)
