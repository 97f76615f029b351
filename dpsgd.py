"""dpsgd.py -- a private gradient of any per-example loss; knows nothing of diffusion.

    g_bar = (1/B) ( sum_{i in lot} clip_C(g_i) + N(0, (sigma C)^2 I) )    [DP-SGD, Abadi et al. 2016, Alg. 1]

The lot is a Poisson sample, one example moves the sum by at most C, the noise is drawn once a step:
that is the sampled Gaussian mechanism whose epsilon accountant.py computes.

  $ python dpsgd.py           # norms before and after clipping, checked against a loop
"""
import functools
import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from machinery import distributed
from machinery.secret import Secret, new_key

Params = dict[str, Tensor]                               # name -> (*shape)
Grads = dict[str, Tensor]                                # name -> (n, *shape), one gradient per example


def poisson_sample(coins: Tensor, q: float) -> Tensor:
    """A lot: each example is in it with probability q, independently of all others.

    coins:   (N,) float64 uniform in [0, 1), one for each example, anew each step and secret: Secret.coins
    Returns: (m,) int64 indices; m is random and private, 0 is legal
    Errors:  q outside [0, 1]; coins in float32, which has only 2^24 values below 1, too few for a small q
    Example: coins (0.3, 0.01, 0.7), q = 0.1 -> [1]
    """
    if not 0 <= q <= 1 or coins.dtype != torch.float64:
        raise ValueError(f"poisson_sample: q = {q}, coins {coins.dtype}, expected 0 <= q <= 1 and float64")
    return (coins < q).nonzero()[:, 0]


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
# What floating-point arithmetic does to the proof is settled here. A clipped gradient is rounded towards zero
# to whole multiples of a fixed unit, so the sum is exact and depends on no order, chunk or number of
# processes: removing one example removes exactly its own whole numbers from it. Then the noise is added in
# float64, the result is rounded to whole multiples of the unit again, and at last to the weights' precision.
# Otherwise three things would show through a release: a sum rounded before the noise; noise in float32; and
# bits finer than the unit, which a result near 0 has only if the sum was 0.  [Mironov 2012; test_noise.py]

SMALLEST_C = 1e-40                                       # gradient units; C above it is exact in float64
MOST_EXAMPLES = 2**22                                    # in a lot: that many whole numbers fit into int64
SLACK = 2.0**-30                                         # relative: float64's error in a norm, or in a sum, is below it
WIDTH = 1024                                             # numbers of a gradient that are squared at a time


def float64(x: Tensor) -> Tensor:
    """x in float64, on its own device; on the CPU where the device (mps) has no float64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def norms(grads: Grads) -> Tensor:
    """(n,) float64: the L2 norm of each example's gradient over ALL trainable tensors jointly.

    In float64 no square of a float32 overflows, or underflows to 0 and lets a long gradient pass unclipped.
    Guarantee: an example's norm is the same to the last bit in any company: all additions are written out
               here, for torch adds the numbers of a row in an order that depends on how many rows there are
    """
    rows = [g.flatten(1) for g in grads.values()]
    width = min(WIDTH, max(row.shape[1] for row in rows))
    squares = 0
    for row in rows:
        for part in row.split(width, dim=1):
            squares = squares + F.pad(float64(part).square(), (0, width - part.shape[1]))    # (n, width)
    while squares.shape[1] > 1:                                          # the right half on the left one
        left, right = squares.split((squares.shape[1] + 1) // 2, dim=1)
        squares = left + F.pad(right, (0, left.shape[1] - right.shape[1]))
    return squares[:, 0].sqrt()


def unit(C: float) -> float:
    """The power of two, at most C / 2^40, whose multiples clipped gradients are rounded to."""
    return 2.0 ** (math.frexp(C)[1] - 41)


def clip_and_count(grads: Grads, C: float) -> Params:
    """sum_i g_i min(1, C / ||g_i||), each clipped gradient rounded towards zero to multiples of unit(C).

    Shapes:    dict of (n, *shape) -> dict of (*shape), int64 (C = inf: float64, no clipping and no rounding)
    Guarantee: as clip_and_sum; the sum is exact, so it is the same in any order
    """
    if not C >= SMALLEST_C:
        raise ValueError(f"clip_and_sum: C = {C}, expected a norm bound of at least {SMALLEST_C:g} "
                         f"(inf: no clipping)")
    norm = norms(grads)
    factor = torch.where(norm > C * (1 - SLACK), C * (1 - SLACK) / norm, 1.0)
    factor = torch.where(norm.isfinite(), factor, 0)                     # (n,)
    if C < math.inf:
        factor = factor / unit(C)                                        # exact: a power of two
    total = {}
    for name, g in grads.items():
        rows = float64(g.flatten(1).nan_to_num(0, 0, 0))         # 0 * NaN would be NaN, and 0 * inf, too
        rows = factor[:, None] * rows                            # in float64 no TF32 or autocast rounds it
        if C < math.inf:
            rows = rows.to(torch.int64)                                  # cuts the fraction off: towards zero
        total[name] = rows.sum(0).view(g.shape[1:])
    return total


def clip_and_sum(grads: Grads, C: float) -> Params:
    """sum_i g_i min(1, C / ||g_i||).                                             [Abadi et al. 2016, Alg. 1]

    Shapes:    dict of (n, *shape) -> dict of (*shape), float64
    Guarantee: adding or removing one example moves the result by at most C in L2
    Errors:    C < 1e-40 -> ValueError; an example whose norm is not finite counts as zero
    Example:   C = 1, norms (5.0, 0.5) -> (1.0, 0.5), up to a part in 10^9
    """
    return {name: value(total, C) for name, total in clip_and_count(grads, C).items()}


def value(count: Tensor, C: float) -> Tensor:
    """What clip_and_count counted, as a float64: exact up to 4,096 examples, then rounded once."""
    return count if C == math.inf else float64(count) * unit(C)


def add_noise(total: Params, std: float, normals: Tensor) -> Params:
    """total + N(0, std^2 I), independent for every coordinate, in float64.

    normals: float64, one of N(0, 1) for each coordinate, tensor after tensor: Secret.normals
    Errors:  std < 0, another number of normals or float32 ones -> ValueError
    """
    sizes = [g.numel() for g in total.values()]
    if not std >= 0 or normals.shape != (sum(sizes),) or normals.dtype != torch.float64:
        raise ValueError(f"add_noise: std = {std} and normals {normals.dtype} {tuple(normals.shape)}, "
                         f"expected a number >= 0 and float64 ({sum(sizes)},)")
    noisy = {}
    for (name, g), noise in zip(total.items(), normals.split(sizes)):
        g = float64(g)
        noisy[name] = g + (std * noise).view(g.shape).to(g.device)
    return noisy


def private_gradient(per_sample: Callable, params: Params, examples: tuple[Tensor, ...], *, C: float,
                     sigma: float, B: float, normals: Tensor | None = None, chunk: int = 256) -> Params:
    """One step's private gradient: (sum of clipped per-example gradients + noise of std sigma C) / B.

    per_sample(params, *part) -> dict of (part, *shape); called on parts of at most `chunk` examples, so that
    memory for gradients is bounded by `chunk` however large the lot. An empty lot is legal: pure noise is
    returned. In a torch.distributed group the lot is this rank's part of the lot, and every rank gets the
    whole gradient.
    Shapes:    examples: tensors (m, ...), the lot; normals: float64, one for each weight, secret and used
               once (sigma = 0 needs none); returns dict of (*shape) in params' precision
    Units:     C gradient norm, sigma no unit (noise multiplier), B the DECLARED batch size, always the same
    Guarantee: one example moves the sum by at most C, and the noise is added once: a Gaussian mechanism of
               multiplier sigma. The result is the same to the last bit for any chunk, order and number of
               ranks that give an example the same gradient
    """
    most = MOST_EXAMPLES // distributed.ranks()
    if chunk < 1 or not B > 0 or len(examples[0]) > most:
        raise ValueError(f"private_gradient: chunk = {chunk}, B = {B}, {len(examples[0])} examples, expected "
                         f"at least 1, above 0 and at most {most}")
    if sigma and normals is None:
        raise ValueError(f"private_gradient: sigma = {sigma} without normals, expected Secret.normals")
    whole = torch.int64 if C < math.inf else torch.float64
    total = {name: torch.zeros_like(p, dtype=whole) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, count in clip_and_count(part, C).items():
            total[name] = total[name].to(count.device) + count
    summed = {name: value(count, C) for name, count in distributed.sum_over_ranks(total).items()}
    if sigma:
        noisy = add_noise(summed, sigma * C, normals)                    # once, after all chunks and ranks
        summed = {name: (g / unit(C)).round() * unit(C) for name, g in noisy.items()}
    mean = {name: g / B for name, g in summed.items()}           # not the realised lot size: that is private
    mean = {name: mean[name].to(p) for name, p in params.items()}
    return distributed.of_the_first(mean)                        # all ranks go on with the same bits


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
    apart = ((g["w"] - one_by_one).norm(dim=1) / one_by_one.norm(dim=1))[y.isfinite()].max()
    print(f"vmap(grad) against a loop: largest relative difference {apart:.1g}")
    secret = Secret(new_key())
    noisy = private_gradient(functools.partial(per_sample_grads, loss), w, (x, y), C=C, sigma=1.5, B=8,
                             normals=secret.normals(step=1, n=3))
    print(f"(sum of the clipped gradients + noise of standard deviation sigma C = 1.5 x {C:g}) / 8: "
          + ", ".join(f"{v:.3f}" for v in noisy["w"].tolist()))
