"""dpsgd.py -- a private gradient of any per-example loss; knows nothing of diffusion.

    g_bar = (1/B) ( sum_{i in lot} clip_C(g_i) + N(0, (sigma C)^2 I) )    [DP-SGD, Abadi et al. 2016, Alg. 1]

The lot is a Poisson sample, one example moves the sum by at most C, the noise is drawn once a step:
that is the sampled Gaussian mechanism whose epsilon accountant.py computes.

  $ python dpsgd.py           # norms before and after clipping, checked against a loop
"""
import functools
import math
import os
from typing import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from machinery import distributed

Params = dict[str, Tensor]                               # name -> (*shape)
Grads = dict[str, Tensor]                                # name -> (n, *shape), one gradient per example


def poisson_sample(N: int, q: float, generator: torch.Generator | None = None) -> Tensor:
    """A lot: each of N examples is in it with probability q, independently of all others.

    Returns: (m,) int64 indices; m is random and private, 0 is legal
    The draws are float64: float32 has only 2^24 values below 1, too coarse for a small q.
    """
    if N < 0 or not 0 <= q <= 1:
        raise ValueError(f"poisson_sample: N = {N}, q = {q}, expected N >= 0 and 0 <= q <= 1")
    return (torch.rand(N, dtype=torch.float64, generator=generator) < q).nonzero()[:, 0]


# -----------------------------------------------------------------------------
# one gradient per example: the definition, and a faster way to the same numbers


def per_sample_grads(loss: Callable, params: Params, *examples: Tensor) -> Grads:
    """g_i = gradient of loss(params, *example_i) with respect to params: vmap(grad), the definition.

    Shapes: loss(params, *one_example) -> scalar; examples (n, ...) each -> dict of (n, *shape)
    Randomness (t, noise) is drawn outside and passed in as examples.
    """
    params = {name: p.detach() for name, p in params.items()}    # or the graph of every chunk would be kept
    return vmap(grad(loss), in_dims=(None,) + (0,) * len(examples))(params, *examples)


def loss_of_one(losses: Callable) -> Callable:
    """losses(params, *examples) -> (n,) as a loss(params, *one_example) -> scalar, for per_sample_grads."""
    def loss(params, *example):
        return losses(params, *(e[None] for e in example))[0]
    return loss


def per_sample_grads_by_copies(losses: Callable, params: Params, *examples: Tensor) -> Grads:
    """The same gradients from one ordinary backward pass: every example is given its own copy of params.

    Private for the same reason: example i's loss is a function of copy i alone, so the gradient of the sum of
    all losses with respect to copy i is g_i. Layers must accept copies (lora.py's do; they are equal, so the
    first may do for all in the forward pass), and must not mix examples.
    Shapes: losses(copies, *examples) -> (n,), where copies is a dict of (n, *shape) -> dict of (n, *shape)
    """
    n = len(examples[0])
    copies = {}
    for name, p in params.items():
        copies[name] = p.detach().expand(n, *p.shape).requires_grad_()   # n views, no memory
    return dict(zip(copies, torch.autograd.grad(losses(copies, *examples).sum(), list(copies.values()))))


def full_chunks(per_sample: Callable, chunk: int) -> tuple[Callable, int]:
    """per_sample for up to `size` examples, run at exactly `size`: (the function, size = max(1, chunk)).

    Fewer are filled up with blank ones, zeros of class 0, whose gradients are dropped. Without it the size of
    the last part, and so the rounding of everybody's gradient in it, would follow the size of the lot, which
    one example changes. `chunk` is declared, never taken from a lot.
    Errors: more than `size` examples, or not one gradient for each -> ValueError
    """
    size = max(1, chunk)

    def full(params, *examples):
        n = len(examples[0])
        if n > size:
            raise ValueError(f"full_chunks: {n} examples, expected at most {size}")
        filled = [torch.cat([e, e.new_zeros(size - n, *e.shape[1:])]) for e in examples]
        grads = per_sample(params, *filled)
        if any(len(g) != len(filled[0]) for g in grads.values()):
            raise ValueError(f"full_chunks: expected one gradient of each of {len(filled[0])} examples")
        return {name: g[:n] for name, g in grads.items()}
    return full, size


# -----------------------------------------------------------------------------
# clip, sum, add noise
#
# All of it in float64, and rounded to the weights' precision once, at the very end: rounding a sum that has
# its noise is post-processing, noise that is itself coarse is a leak. float32 normals come from uniforms of
# 24 bits: none is longer than 5.77 standard deviations, so a release that lies further out says "this image
# was here"; and their lattice shows through the sum of one step.          [Mironov 2012; tests/test_noise.py]

SMALLEST_C = 1e-40                                       # gradient units; C above it is exact in float64


def float64(x: Tensor) -> Tensor:
    """x in float64, on its own device; on the CPU where the device (mps) has no float64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def norms(grads: Grads) -> Tensor:
    """(n,) float64: the L2 norm of each example's gradient over ALL trainable tensors jointly.

    In float64 no square of a float32 overflows, or underflows to 0 and lets a long gradient pass unclipped.
    """
    each = [torch.linalg.vector_norm(float64(g.flatten(1)), dim=1) for g in grads.values()]
    return torch.linalg.vector_norm(torch.stack(each), dim=0)


def clip_and_sum(grads: Grads, C: float) -> Params:
    """sum_i g_i min(1, C / ||g_i||).                                             [Abadi et al. 2016, Alg. 1]

    Shapes:    dict of (n, *shape) -> dict of (*shape), float64
    Guarantee: adding or removing one example moves the result by at most C in L2
    Errors:    C < 1e-40 -> ValueError; an example whose norm is not finite counts as zero
    Example:   C = 1, norms (5.0, 0.5) -> (1.0, 0.5)
    """
    if not C >= SMALLEST_C:
        raise ValueError(f"clip_and_sum: C = {C}, expected a norm bound of at least {SMALLEST_C:g} "
                         f"(inf: no clipping)")
    norm = norms(grads)
    factor = torch.where(norm.isfinite(), (C / norm).clamp(max=1), 0)    # (n,)
    total = {}
    for name, g in grads.items():
        rows = float64(g.flatten(1).nan_to_num(0, 0, 0))         # 0 * NaN would be NaN, and 0 * inf, too
        total[name] = (factor @ rows).view(g.shape[1:])          # in float64 no TF32 or autocast rounds it
    return total


def add_noise(total: Params, std: float, generator: torch.Generator | None = None) -> Params:
    """total + N(0, std^2 I), independent for every coordinate, in float64.

    The normals are drawn on the CPU, from uniforms of 53 bits: the longest is 8.57 standard deviations
    (`tail`).
    """
    if not std >= 0:
        raise ValueError(f"add_noise: std = {std}, expected a number >= 0")
    if std == 0:
        return dict(total)
    noisy = {}
    for name, g in total.items():
        noise = std * torch.randn(g.shape, dtype=torch.float64, generator=generator)
        g = float64(g)
        noisy[name] = g + noise.to(g.device)
    return noisy


REACH = math.sqrt(2 * 53 * math.log(2))                  # 8.57 sigma: the longest pair of Box & Muller


def tail(q: float, sigma: float, steps: int, weights: int, reach: float = REACH, images: int = 1) -> float:
    """What no epsilon covers, to be added to delta: a bound on P(the noise had to reach beyond its reach).

    A release with a pair of coordinates further from the other images' sum than reach * sigma * C shows,
    beyond doubt, that the image was in the lot. The image moves pair j by a_j (in sigma C), a step, with
    probability q, and a pair of normals has P(length > r) = exp(-r^2 / 2), so pair j gets there with at most
    exp(-(reach - a_j)^2 / 2) - exp(-reach^2 / 2). The a_j^2 add up to 1 / sigma^2 or less: all in one pair
    is the first term below; the part that is linear in a_j is largest spread over all pairs, the second.
    images: a person's; n of them are in a lot with the binomial probability, and move the sum n times as far
    Example: q=1, sigma=0.4526, one step, 25,280 weights -> 1.6e-9; with float32's reach of 5.768: 1.9e-3
    """
    total = 0.0
    for n in range(1, images + 1):
        share = math.comb(images, n) * q**n * (1 - q)**(images - n)
        together, spread = 1.0, 0.0
        if sigma > 0:
            together = math.exp(-max(reach - n / sigma, 0.0)**2 / 2)
            spread = reach * math.sqrt(weights / 2) * n / sigma * math.exp(-reach**2 / 2)
        total += steps * share * (together + spread)
    return min(total, 1.0)


def private_gradient(per_sample: Callable, params: Params, examples: tuple[Tensor, ...], *, C: float,
                     sigma: float, B: float, generator: torch.Generator | None = None,
                     chunk: int = 256) -> Params:
    """One step's private gradient: (sum of clipped per-example gradients + noise of std sigma C) / B.

    per_sample(params, *part) -> dict of (part, *shape); called on parts of at most `chunk` examples, so that
    memory for gradients is bounded by `chunk` however large the lot. An empty lot is legal: pure noise is
    returned. In a torch.distributed group the lot is this rank's part of the lot, and every rank gets the
    whole gradient.
    Shapes:    examples: tensors (m, ...), the lot; returns dict of (*shape) in params' precision
    Units:     C gradient norm, sigma no unit (noise multiplier), B the DECLARED batch size, always the same
    Guarantee: one example moves the sum by at most C, and the noise is drawn once: a Gaussian mechanism of
               multiplier sigma
    """
    if chunk < 1 or not B > 0:
        raise ValueError(f"private_gradient: chunk = {chunk}, B = {B}, expected at least 1 and above 0")
    total = {name: float64(torch.zeros_like(p)) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, g in clip_and_sum(part, C).items():
            total[name] += g
    std = sigma * C if sigma and distributed.rank() == 0 else 0.0        # once: after all chunks, by one rank
    noisy = distributed.sum_over_ranks(add_noise(total, std, generator))
    mean = {name: g / B for name, g in noisy.items()}            # not the realised lot size: that is private
    return {name: mean[name].to(p) for name, p in params.items()}        # the one rounding


def os_generator(seed: int | None = None) -> torch.Generator:
    """CPU generator seeded by the operating system, or reproducibly by `seed` (the noise is not secret then).

    torch seeds its Mersenne Twister with 32 bits, few enough to try them all; here all 624 words of its
    state come from os.urandom. It is still no cryptographic generator (docs/privacy.md).
    """
    generator = torch.Generator()
    if seed is not None:
        return generator.manual_seed(seed)
    generator.manual_seed(0)
    state = generator.get_state()
    words = state[24:24 + 624 * 8].view(torch.int64)                     # 32-bit words in 64-bit slots
    words.copy_(torch.frombuffer(bytearray(os.urandom(624 * 4)), dtype=torch.uint32).long())
    generator.set_state(state)
    return generator


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y, w = torch.randn(8, 3), torch.randn(8), {"w": torch.randn(3)}
    x[7] *= 100                                                          # an outlier
    y[6] = float("nan")                                                  # and a broken example
    def loss(params, x, y):
        return (x @ params["w"] - y).square()
    g, C = per_sample_grads(loss, w, x, y), 2.0
    one_by_one = torch.stack([grad(loss)(w, x[i], y[i])["w"] for i in range(8)])
    print(f"example    norm before    after clipping to C = {C:g}")
    for i, norm in enumerate(norms(g).tolist()):
        after = clip_and_sum({"w": g["w"][i:i + 1]}, C)["w"].norm()
        print(f"{i:>7} {norm:>14.3f} {after:>14.3f}")
    apart = (g["w"] - one_by_one)[y.isfinite()].abs().max()
    print(f"vmap(grad) against a loop: largest difference {apart:.1g}")
    noisy = private_gradient(functools.partial(per_sample_grads, loss), w, (x, y), C=C, sigma=1.5, B=8)
    print(f"noise added once to the sum of all, of std sigma C = 1.5 x {C:g}: {noisy['w'].tolist()}")
