"""leaks.py -- the cases of ex13: private steps, some of them correct, that look alike from outside."""
import functools
from typing import Callable

import torch
from torch import Tensor

from grade import HERE, Case, load, outcome
import dpsgd
import mutation
from cases.inputs import CHANCE


def with_bug(number: int):
    """The private step with one of the bugs of bugs/ in it."""
    bug = mutation.BUGS[number - 1]
    module = load(HERE / "bugs" / f"{bug}.py")
    if module.STANDS_IN_FOR == "dpsgd.private_gradient":
        return module.private_gradient

    def step(*a, **kw):
        with mutation.installed(bug, []):
            return dpsgd.private_gradient(*a, **kw)
    return step


def right(turn: Callable[[Tensor], Tensor]):
    """A correct step: the normals are rotated or reflected, and are then still independent and N(0, 1)."""
    def step(per_sample, params, examples, *, C, sigma, B, normals, chunk):
        exact = {name: p.double() for name, p in params.items()}
        total = dpsgd.private_gradient(per_sample, exact, examples, C=C, sigma=0.0, B=B, chunk=chunk)
        if sigma:
            total = dpsgd.add_noise(total, sigma * C / B, turn(normals))
        return {name: g.to(params[name]) for name, g in total.items()}
    return step


def clips_at(factor: float):                                             # the noise is still that of sigma C
    return lambda *a, C, sigma, **kw: dpsgd.private_gradient(*a, C=factor * C, sigma=sigma / factor, **kw)


def with_noise_of(share: float):
    return lambda *a, sigma, **kw: dpsgd.private_gradient(*a, sigma=share * sigma, **kw)


def clips_draws_apart(per_sample, params, examples, **kw):
    draws = tuple(e.flatten(0, 1)[:, None] if e.ndim > 2 else e for e in examples)       # (n K, 1, d)
    return dpsgd.private_gradient(per_sample, params, draws, **kw)


def one_normal_for_all(*a, normals, **kw):
    same = normals if normals is None else normals[:1].expand_as(normals)
    return dpsgd.private_gradient(*a, normals=same, **kw)


def leaves_bare(which: int):
    def step(per_sample, params, *a, sigma, **kw):
        noisy, bare = (dpsgd.private_gradient(per_sample, params, *a, sigma=s, **kw) for s in (sigma, 0.0))
        name = list(params)[which]
        return noisy | {name: bare[name]}
    return step


RIGHT = ("a correct step", False, "nothing is wrong with it. It may use the normals in another order, with "
         "other signs or mixed, which is just as good. Test the guarantee (distances, standard deviations) "
         "and not the bits.")


def suspects():
    """All steps look alike from outside and come in a random order; the first wrong answer is reported."""
    table = [                                        # title, does it leak?, what a difference means, the step
        (*RIGHT, dpsgd.private_gradient), (*RIGHT, right(torch.neg)), (*RIGHT, right(lambda z: z.flip(0))),
        (*RIGHT, right(lambda z: z - 2 * z.mean())),                     # mirrored along (1, 1, .. 1)
        ("a step that clips above C", True, "one image moves the sum by more than C. Is your longest "
         "gradient several times C, and is more than C (1 + 1e-4) too much for your test?",
         clips_at(CHANCE.uniform(1.05, 1.3))),
        ("a step that clips K draws one by one", True, "the published code does this: one image moves the "
         "sum by up to K C. Give it an image whose K draws point the same way.", clips_draws_apart),
        ("a step that divides by the realised lot", True, "compare a lot with and without one image, where B "
         "is not the size of the lot.", with_bug(2)),
        ("a step that clips the lot's mean", True, "one image can reverse all of it: add one that points the "
         "other way.", with_bug(3)),
        ("a step that clips each tensor on its own", True, "one image moves the sum by sqrt(2) C. Give it a "
         "gradient that is long in both tensors of `toy`.", with_bug(4)),
        ("a step whose noise lacks the factor C", True, "at C = 10 the noise is ten times too weak for its "
         "epsilon. (At C < 1 it is too strong, and nothing is learnt.)", with_bug(5)),
        ("a step without noise for an empty lot", True, "a result of exactly 0 says that nobody was sampled.",
         with_bug(7)),
        ("a step that keeps a NaN example", True, "one NaN image makes the whole result NaN: its presence is "
         "published. Every comparison with NaN is False, so `not moved <= C` catches it and `moved > C` does "
         "not.", with_bug(9)),
        ("a step with too little noise", True, "the standard deviation has to be sigma C to a few percent. "
         "A tenth less noise means an epsilon more than a tenth larger.",
         with_noise_of(CHANCE.uniform(0.8, 0.9))),
        ("a step with one normal for all weights", True, "the noise of two weights has to be independent. "
         "Here it is the same for all weights, so a difference of two weights has no noise.",
         one_normal_for_all),
        ("a step that leaves the first tensor without noise", True, "look at the noise of EVERY tensor: one "
         "without noise is published as it is.", leaves_bare(0)),
        ("a step that leaves the last tensor without noise", True, "look at the noise of EVERY tensor, also "
         "of the last one.", leaves_bare(-1)),
        ("a step that adds noise to each chunk", True, "the noise grows with the lot and so tells its size. "
         "Give it a lot of several chunks.", with_bug(6)),
        ("a step with the same noise every time", True, "call it twice with new normals: the difference has "
         "no noise.", with_bug(13)),
    ]
    said = {}

    def anonymous(number):
        def step(per_sample, params, examples, *, C, sigma, B, normals=None, chunk=256):
            n = sum(p.numel() for p in params.values())
            if sigma and (normals is None or normals.shape != (n,) or normals.dtype != torch.float64):
                raise ValueError(f"sigma = {sigma} needs normals of shape ({n},) in float64")
            return table[number][3](per_sample, params, examples, C=C, sigma=sigma, B=B, normals=normals,
                                    chunk=chunk)
        return step

    def ask(f, number):
        if not said:
            for one in CHANCE.sample(range(len(table)), len(table)):
                said[one] = outcome(lambda one=one: bool(f(anonymous(one))))      # at once
        if isinstance(said[number], BaseException):
            raise said[number]
        return said[number]
    for number, (title, leaky, means, _) in enumerate(table):
        yield Case(title, means, {"this step": "leaks" if leaky else "keeps the guarantee"},
                   functools.partial(ask, number=number), expected=leaky)


def leaks(step) -> bool:
    """The name of ex13's function, for which the repository has only the tests in tests/test_dpsgd.py."""
    raise NotImplementedError
