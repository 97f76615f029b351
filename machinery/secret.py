"""secret.py -- random numbers that nobody can predict: the privacy noise and the coins of the Poisson lots.

Every random number that must stay secret comes from SHAKE-256 (FIPS 202), applied to a 256-bit key, the
purpose of the number and the step. Somebody who knows every released number but not the key can tell these
numbers from truly random ones only by breaking SHAKE-256 or by trying 2^256 keys. torch's own generator does
not have this property: 624 of its outputs determine all others.

    bytes = SHAKE-256( key | purpose, 16 bytes | step, 8 bytes )

There is no state to advance: with one key, step t has the same numbers whether or not the steps before it
ran. The key is never written to disk, and a private run that is resumed draws a new one.

  $ python -m machinery.secret        # coins, normals and their time
"""
import hashlib
import math
import os
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

KEY_BYTES = 32
REACH = math.sqrt(2 * 128 * math.log(2))         # 13.3: the largest radius sqrt(x^2 + y^2) of a pair (x, y)
FINE = math.sqrt(2 * 100 * math.log(2))          # 11.8: above it the possible radii lie too far apart


def new_key(seed: int | None = None) -> bytes:
    """A run's secret key, from the operating system. With a seed it is made from that, and is not secret."""
    if seed is None:
        return os.urandom(KEY_BYTES)
    return hashlib.sha256(f"seed {seed}".encode()).digest()


class Secret(NamedTuple):
    """All secret random numbers of one run, as functions of its key, of a purpose and of a step."""
    key: bytes

    def __repr__(self) -> str:
        return "Secret(key=...)"                                         # so no traceback shows the key

    def words(self, purpose: str, step: int, n: int) -> np.ndarray:
        """(n,) uint64, independent and uniform for everybody who does not know the key.

        Errors: a key that does not have 32 bytes, a purpose of more than 16 bytes, or a step outside
                0 to 2^64 - 1 -> ValueError
        """
        name = purpose.encode().ljust(16, b"\0")                         # fixed lengths: no two uses collide
        if len(self.key) != KEY_BYTES or len(name) != 16 or not 0 <= step < 2**64:
            raise ValueError(f"secret: a key of {len(self.key)} bytes, purpose {purpose!r}, step {step}, "
                             f"expected {KEY_BYTES} bytes, at most 16 bytes and 0 to 2^64 - 1")
        stream = hashlib.shake_256(self.key + name + step.to_bytes(8, "little"))
        return np.frombuffer(stream.digest(8 * n), "<u8")

    def coins(self, step: int, n: int) -> Tensor:
        """(n,) float64, uniform in [0, 1), multiples of 2^-53: one coin for the image at each place."""
        return torch.from_numpy((self.words("coins", step, n) >> np.uint64(11)) * 2.0**-53)

    def normals(self, step: int, n: int) -> Tensor:
        """(n,) float64 from N(0, 1), none of absolute value above REACH.              [Box & Muller 1958]

            sqrt(-2 log u) cos(2 pi v), sqrt(-2 log u) sin(2 pi v),    u of 128 bits, v of 64 bits

        A pair (x, y) of normals is a point of the plane at radius sqrt(-2 log u). Just below u = 1 the
        float64 numbers are 2^-53 apart, so points near 0 would lie on circles with visible gaps between them.
        For u > 1/2 the radius is therefore computed from 1 - u, which is known to 53 bits. (Jin et al. 2022,
        arXiv 2112.05307, attack differential privacy by such gaps.)
        """
        high, low, v = self.words("noise", step, 3 * math.ceil(n / 2)).reshape(3, -1)
        u = (high.astype(float) + (low.astype(float) + 1) * 2.0**-64) * 2.0**-64         # in [2^-128, 1]
        rest = ((~high).astype(float) + (~low).astype(float) * 2.0**-64) * 2.0**-64      # 1 - u to 53 bits
        log_u = np.where(rest < 0.5, np.log1p(-np.minimum(rest, 0.5)), np.log(u))
        radius, angle = np.sqrt(-2 * log_u), 2 * math.pi * 2.0**-64 * v
        return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n])


def tail(epsilon: float, steps: int, weights: int) -> float:
    """The extra delta that is needed because very long pairs of normals are not Gaussian.

    The radius of a pair follows from the whole number u 2^128. Where it is small, neighbouring numbers give
    radii that lie far apart, and u = 2^-128 gives the largest one, REACH. Up to FINE at least five possible
    radii lie in each unit to which a release is rounded (dpsgd.py:grid). Of longer ones nothing is assumed. A
    pair is longer with probability 2^-100, and a run has steps * weights / 2 pairs. The probability of any
    event therefore changes by at most tau = 2^-100 * pairs, both with the image and without it. The latter
    change counts e^epsilon times, so (1 + e^epsilon) tau is added to delta.
    Example: epsilon=10, 110 steps, 25,280 weights -> 2e-20, far below a delta of 1e-5
    """
    pairs = steps * math.ceil(weights / 2)
    return min(1.0, (1 + math.exp(min(epsilon, 700.0))) * pairs * math.exp(-FINE**2 / 2))


if __name__ == "__main__":
    secret = Secret(new_key())
    print("the first coins of step 1:", ", ".join(f"{u:.4f}" for u in secret.coins(1, 5).tolist()))
    x = secret.normals(1, 1_000_000)
    print(f"a million normals: mean {x.mean():.4f}, standard deviation {x.std():.4f}, the largest "
          f"{x.abs().max():.2f} (none can exceed {REACH:.2f})")
    for n in (25_280, 662_692):
        start = time.perf_counter()
        secret.normals(2, n)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        torch.randn(n, dtype=torch.float64)
        theirs = time.perf_counter() - start
        print(f"{n:>7,} normals: {1000 * ours:.1f} ms; torch's generator, which can be predicted: "
              f"{1000 * theirs:.1f} ms")
