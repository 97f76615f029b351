"""dpsgd.py -- a private gradient of any per-example loss. This file knows nothing of diffusion.

    g_bar = (1/B) ( sum_{i in lot} clip_C(g_i) + N(0, (sigma C)^2 I) )    [DP-SGD, Abadi et al. 2016, Alg. 1]

Here clip_C(g) = g min(1, C / |g|), so that no clipped gradient is longer than C. The lot (Abadi et al.'s word
for the random batch of a step) is a Poisson sample, one example moves the sum by at most C, and the noise is
drawn once a step. That is the sampled Gaussian mechanism, whose epsilon accountant.py computes.

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

    coins:   (N,) float64, uniform in [0, 1), one for each example; secret, and new in each step: Secret.coins
    Returns: (m,) int64 indices; m is random and private, and may be 0
    Errors:  q outside [0, 1] -> ValueError; coins in float32 -> ValueError, because uniform float32 numbers
             have only 2^24 values, too few for a small q
    Example: coins (0.3, 0.01, 0.7), q = 0.1 -> [1]
    """
    if not 0 <= q <= 1 or coins.dtype != torch.float64:
        raise ValueError(f"poisson_sample: q = {q}, coins {coins.dtype}, expected 0 <= q <= 1 and float64")
    return (coins < q).nonzero()[:, 0]


# -----------------------------------------------------------------------------
# one gradient per example: the definition, and a faster way to the same numbers


def per_sample_grads(loss: Callable, params: Params, *examples: Tensor) -> Grads:
    """g_i, the gradient of loss(params, *example_i) with respect to params, by its definition: vmap(grad).

    Random numbers that the loss needs are drawn outside and passed in as examples.
    Shapes: loss(params, *one_example) -> scalar; examples (n, ...) each -> dict of (n, *shape)
    """
    params = {name: p.detach() for name, p in params.items()}    # else the graph of every chunk would be kept
    return vmap(grad(loss), in_dims=(None,) + (0,) * len(examples))(params, *examples)


def loss_of_one(losses: Callable) -> Callable:
    """Turn losses(params, *examples) -> (n,) into the loss of one example, which per_sample_grads takes."""
    def loss(params, *example):
        return losses(params, *(e[None] for e in example))[0]
    return loss


def per_sample_grads_by_copies(losses: Callable, params: Params, *examples: Tensor) -> Grads:
    """The same gradients from one ordinary backward pass, in which every example has its own copy of params.

    The loss of example i is a function of copy i alone, so the gradient of the sum of all losses with respect
    to copy i is g_i. The layers must accept copies, as those of lora.py do, and must not mix examples. (All
    copies are equal, so in the forward pass a layer may use the first one for all.)
    Shapes: losses(copies, *examples) -> (n,), where copies is a dict of (n, *shape) -> dict of (n, *shape)
    """
    n = len(examples[0])
    copies = {}
    for name, p in params.items():
        copies[name] = p.detach().expand(n, *p.shape).requires_grad_()   # n views of one tensor
    total = losses(copies, *examples).sum()
    grads = torch.autograd.grad(total, list(copies.values()))
    return dict(zip(copies, grads))


def full_chunks(per_sample: Callable, chunk: int, threads: int = 1) -> tuple[Callable, int]:
    """A function that takes up to `size` examples, and calls `per_sample` on exactly `size`.

    A lot is processed in parts of `chunk` examples, and the last part is usually not full. If it were passed
    on at its own size, one more example in the lot would change that size, and with it how every gradient in
    the part is rounded. So missing examples are replaced by zeros (class 0), and the gradients of these are
    dropped. `chunk` is declared; it is never taken from a lot.
    threads: how many CPU threads share a part. `size` is a multiple of it, because an example that two
             threads compute together is rounded in another way than the others
    Returns: (the function, size: `chunk` rounded down to such a multiple, but at least one for each thread)
    Errors:  more than `size` examples, or not one gradient for each -> ValueError
    """
    size = max(threads, chunk - chunk % threads)

    def full(params, *examples):
        n = len(examples[0])
        if n > size:
            raise ValueError(f"full_chunks: {n} examples, expected at most {size}")
        filled = [torch.cat([e, e.new_zeros(size - n, *e.shape[1:])]) for e in examples]
        grads = per_sample(params, *filled)
        if any(len(g) != size for g in grads.values()):
            raise ValueError(f"full_chunks: expected one gradient for each of {size} examples")
        return {name: g[:n] for name, g in grads.items()}
    return full, size


# -----------------------------------------------------------------------------
# clip, sum, add noise
#
# The proof is about real numbers, but a computer rounds. Two rules keep rounding from giving away the sum.
# (1) Each clipped gradient is rounded towards zero to whole multiples of a fixed unit. The sum is then exact:
#     it depends on no order, chunk or number of processes, and removing one example removes exactly the whole
#     numbers of that example.
# (2) The noise is added in float64. The result is rounded to whole multiples of a larger unit, `grid`, and
#     after that to the precision of the weights. Float64 cannot hold every real number, so there are gaps
#     between the values that the noise can take. More than 2^16 of these values are rounded to each multiple
#     of `grid` (except for very long noise: machinery/secret.py:tail), so the gaps do not show in the result.
# Without these rules a published number could reveal the sum in three ways.
# (a) A sum in floating point is rounded in a way that depends on all examples.
# (b) Noise in float32 has gaps that are wide enough to be seen.
# (c) If the sum is far from 0 and the noise nearly cancels it, the result is a multiple of the distance
#     between float64 numbers near that sum. A result with finer bits rules that sum out.
#                                                                         [Mironov 2012; tests/test_noise.py]

SMALLEST_C = 1e-40                       # in gradient-norm units; above it float64 loses no precision
MOST_EXAMPLES = 2**22                    # of a lot; the sum of that many clipped gradients fits into int64
SLACK = 2.0**-30                         # relative; the error of float64 in a norm or a sum is smaller
WIDTH = 1024                             # how many numbers of a gradient are squared at a time


def float64(x: Tensor) -> Tensor:
    """x in float64, on its own device, or on the CPU if the device (mps) has no float64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def norms(grads: Grads) -> Tensor:
    """(n,) float64: the L2 norm of each example's gradient over ALL trainable tensors jointly.

    In float64 the square of a float32 number does not overflow or underflow. A square that underflowed to 0
    would let a long gradient pass unclipped.
    Guarantee: the norm of an example is the same to the last bit whatever the other examples are. torch adds
               the numbers of a row in an order that depends on the number of rows, so all additions are
               written out here
    """
    rows = [g.flatten(1) for g in grads.values()]
    width = min(WIDTH, max(row.shape[1] for row in rows))
    squares = float64(rows[0].new_zeros(len(rows[0]), width))
    for row in rows:
        for part in row.split(width, dim=1):
            squares[:, :part.shape[1]] += float64(part).square()
    while squares.shape[1] > 1:                                          # add the right half to the left
        left, right = squares.split((squares.shape[1] + 1) // 2, dim=1)
        squares = left + F.pad(right, (0, left.shape[1] - right.shape[1]))
    return squares[:, 0].sqrt()


def unit(C: float) -> float:
    """The unit of rounding: a power of two, at most C / 2^40."""
    return 2.0 ** (math.frexp(C)[1] - 41)


def grid(sigma: float, C: float) -> float:
    """The unit of a result: a power of two, at most 2^-28 of C or of sigma C, whichever is larger.

    It grows with sigma, as do the gaps between the numbers that the noise can take.
    """
    return unit(max(1.0, sigma) * C) * 2.0**12


def clip_and_count(grads: Grads, C: float) -> Params:
    """sum_i g_i min(1, C / ||g_i||) in multiples of unit(C), each clipped gradient rounded towards zero.

    Shapes:    dict of (n, *shape) -> dict of (*shape), int64. With C = inf nothing is clipped or rounded, and
               the result is float64
    Guarantee: as clip_and_sum. For finite C the sum is exact, so it is the same in any order
    Errors:    as clip_and_sum
    """
    if not C >= SMALLEST_C:
        raise ValueError(f"clip_and_sum: C = {C}, expected a clipping norm of at least {SMALLEST_C:g} "
                         f"(inf for no clipping)")
    norm = norms(grads)
    factor = torch.where(norm > C * (1 - SLACK), C * (1 - SLACK) / norm, 1.0)
    factor = torch.where(norm.isfinite(), factor, 0)                     # (n,)
    if C < math.inf:
        factor = factor / unit(C)                                        # exact, as it is a power of two
    total = {}
    for name, g in grads.items():
        sums = []
        for part in g.flatten(1).split(4 * WIDTH, dim=1):                # small enough for a CPU's cache
            rows = float64(part.nan_to_num(0, 0, 0))                     # because 0 * NaN and 0 * inf are NaN
            rows = factor[:, None] * rows
            if C < math.inf:
                rows = rows.to(torch.int64)                              # drops the fraction: towards zero
            sums.append(rows.sum(0))
        total[name] = torch.cat(sums).view(g.shape[1:])
    return total


def clip_and_sum(grads: Grads, C: float) -> Params:
    """sum_i g_i min(1, C / ||g_i||).                                             [Abadi et al. 2016, Alg. 1]

    Shapes:    dict of (n, *shape) -> dict of (*shape), float64
    Guarantee: adding or removing one example moves the result by at most C in L2
    Errors:    C < 1e-40 -> ValueError; an example whose norm is not finite counts as zero
    Example:   C = 1, norms (5.0, 0.5) -> (1.0, 0.5), up to a part in 10^9
    This is the definition. `private_gradient` computes the same: it adds the whole numbers of
    `clip_and_count` over all chunks and processes, and multiplies by the unit once, at the end.
    """
    return {name: value(total, C) for name, total in clip_and_count(grads, C).items()}


def value(count: Tensor, C: float) -> Tensor:
    """What clip_and_count counted, as a float64: exact for up to 4,096 examples, else rounded once."""
    return count if C == math.inf else float64(count) * unit(C)


def add_noise(total: Params, std: float, normals: Tensor) -> Params:
    """total + N(0, std^2 I), independent in every coordinate, in float64.

    normals: float64, one from N(0, 1) for each coordinate, tensor after tensor: Secret.normals
    Errors:  std < 0, another number of normals, or normals in float32 -> ValueError
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

    per_sample(params, *part) -> dict of (n, *shape) is called on parts of n <= `chunk` examples, so `chunk`
    bounds the memory for gradients however large the lot is. An empty lot is legal, and its result is pure
    noise. In a torch.distributed group `examples` is this rank's part of the lot, and every rank gets the
    whole gradient.
    Shapes:    examples: tensors (m, ...), the lot; normals: float64, one for each weight, secret and used
               once (sigma = 0 needs none); returns dict of (*shape) in the precision of params
    Units:     C in gradient-norm units; sigma, the noise multiplier, without unit; B, the DECLARED expected
               batch size, the same in every step
    Guarantee: one example moves the sum by at most C, and the noise is added once. That is a Gaussian
               mechanism with noise multiplier sigma. For finite C the result is the same to the last bit for
               any chunk, order and number of ranks that give an example the same gradient
    Errors:    chunk < 1, B <= 0, too many examples, sigma without normals -> ValueError; C as clip_and_sum
    """
    most = MOST_EXAMPLES // distributed.ranks()
    if chunk < 1 or not B > 0 or len(examples[0]) > most:
        raise ValueError(f"private_gradient: chunk = {chunk}, B = {B}, {len(examples[0])} examples, expected "
                         f"chunk >= 1, B > 0 and at most {most} examples")
    if sigma and normals is None:
        raise ValueError(f"private_gradient: sigma = {sigma} without normals, expected Secret.normals")
    dtype = torch.int64 if C < math.inf else torch.float64       # whole numbers, unless nothing is clipped
    total = {name: torch.zeros_like(float64(p), dtype=dtype) for name, p in params.items()}
    for start in range(0, len(examples[0]), chunk):
        part = per_sample(params, *(e[start:start + chunk] for e in examples))
        for name, count in clip_and_count(part, C).items():
            total[name] = total[name].to(count.device) + count
    summed = {name: value(count, C) for name, count in distributed.sum_over_ranks(total).items()}
    if sigma:
        noisy = add_noise(summed, sigma * C, normals)                    # once, after all chunks and ranks
        coarse = grid(sigma, C)                                          # see (2) above
        summed = {name: (g / coarse).round() * coarse for name, g in noisy.items()}
    mean = {name: g / B for name, g in summed.items()}           # not the realised lot size: that is private
    mean = {name: mean[name].to(p) for name, p in params.items()}
    return distributed.of_the_first(mean)                        # all ranks continue with the same bits


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y, w = torch.randn(8, 3), torch.randn(8), {"w": torch.randn(3)}
    x[7] *= 100                                                          # an outlier,
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
