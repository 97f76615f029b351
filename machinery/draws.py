"""draws.py -- random numbers that belong to one image: functions of (key, step, image) and of nothing else.

The values of t, the diffusion noise and the choice of dropped labels are not the privacy noise, and their key
need not be secret. If they were drawn one after another for a whole lot, however, an image that joins would
change the numbers of every image behind it. To an attacker who knows the numbers, that image moves the sum by
many C. Here the numbers of the other images do not change: even for somebody who can compute the numbers of
any image, one image moves the sum by at most C.

An image is identified by a hash of its bytes. It is not identified by its place in the data, because that
changes when an image before it is taken out. Nor is it identified by its latent, because that may be rounded
differently on another machine. Hashes must be kept as secret as the images: whoever has the list can test
whether a known image is in it.

    output k of the stream with seed s is  mix(s + k gamma), k = 1, 2, ..   [SplitMix64, Steele et al. 2014]

  $ python -m machinery.draws    # the published test vector, one image's draws in two lots, their time
"""
import math
import os
import time

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64                       # 2^64 / golden ratio, odd; int64 wraps around


def shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits as if z were unsigned, so that zeros come in from the left."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def mix(z: Tensor) -> Tensor:
    """SplitMix64's last step, int64 -> int64: a bijection that makes every bit depend on every bit of z."""
    z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ shifted(z, 31)


def new_key(seed: int | None = None) -> Tensor:
    """A run's key for these draws, one int64: the seed, or 64 bits from the system. It is not secret."""
    return torch.tensor(int.from_bytes(os.urandom(8), "little", signed=True) if seed is None else seed)


def hashes(images: Tensor) -> Tensor:
    """(n,) int64: the image hash of each image; entry i is a function of the bytes of image i alone.

    images: (n, C, H, W) as they were read, uint8 or any other type. All arithmetic is with whole numbers, so
            the result is exact on every device
    """
    content = images.flatten(1).view(torch.uint8)                        # (n, bytes)
    weights = mix(GAMMA * torch.arange(1, content.shape[1] + 1, device=images.device))
    return torch.cat([(part.long() * weights).sum(1) for part in content.split(1000)])


def streams(key: Tensor, step: int, hashes: Tensor) -> Tensor:
    """(n,) int64: the seed of each image's own stream in this step, from the key, the step and its hash."""
    return mix(mix(mix(key) + step) + hashes)


def outputs(seeds: Tensor, first: int, count: int) -> Tensor:
    """(n, count) int64: outputs first + 1, ..., first + count of each stream."""
    k = torch.arange(first + 1, first + count + 1, device=seeds.device)
    return mix(seeds[:, None] + GAMMA * k)


def uniforms(seeds: Tensor, first: int, count: int) -> Tensor:
    """(n, count) float32 in [0, 1), multiples of 2^-24, from outputs first + 1, ..., first + count."""
    return shifted(outputs(seeds, first, count), 40).float() * 2.0**-24


def normals(seeds: Tensor, first: int, count: int) -> Tensor:
    """(n, count) float32 from N(0, 1), of outputs first + 1, ..., first + ceil(count / 2).   [Box & Muller]

    Each output gives two uniform numbers of 32 bits and so two normals, at most 6.8 long. That is enough for
    the diffusion noise. They must never be used for the privacy noise.
    """
    z = outputs(seeds, first, math.ceil(count / 2))
    radius = ((shifted(z, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
    angle = (z & (2**32 - 1)).float().mul_(2 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def t_noise_and_drop(seeds: Tensor, K: int, shape: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """One step's draws of each image: (u, noise, drop).

    u (n, K) are uniform numbers, from which t is made. noise is (n, K, *shape). drop (n,) is uniform, and
    decides whether the label is dropped.

    The noise is made one draw after another, so that the intermediate results need a K-th of the memory.
    """
    count = math.prod(shape)
    noise = torch.empty((len(seeds), K, count), device=seeds.device)
    for k in range(K):
        noise[:, k] = normals(seeds, K + 1 + k * math.ceil(count / 2), count)
    return uniforms(seeds, 0, K), noise.view(len(seeds), K, *shape), uniforms(seeds, K, 1)[:, 0]


if __name__ == "__main__":
    words = outputs(torch.tensor([1234567]), 0, 3)[0].tolist()
    print("SplitMix64 of 1234567:", ", ".join(str(word % 2**64) for word in words))
    images, key = torch.randint(256, (512, 1, 28, 28), dtype=torch.uint8), torch.tensor(5)
    seeds = streams(key, 1, hashes(images))
    for name, lot in (("whole lot", images), ("without the first", images[1:])):
        u, noise, drop = t_noise_and_drop(streams(key, 1, hashes(lot)), 2, (1, 28, 28))
        print(f"{name:<18} the last image's u {u[-1].tolist()}, noise {noise[-1, 0, 0, 0, :3].tolist()} ..")
    start = time.perf_counter()
    t_noise_and_drop(seeds, 2, (1, 28, 28))
    ours = time.perf_counter() - start
    start = time.perf_counter()
    torch.randn(512, 2, 1, 28, 28)
    theirs = time.perf_counter() - start
    print(f"a lot of 512 with K = 2: {1000 * ours:.1f} ms; by torch.randn: {1000 * theirs:.1f} ms")
