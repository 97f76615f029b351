"""Shared by tests of whole runs: the real command line inside the test's own process, torch imported once.

  $ python tests/helpers.py --data mnist ...     # train.py with few sampling steps, many checkpoints and a
                                                 # coarse PLD, for tests that need a process of its own
"""
import contextlib
import gzip
import io
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import base  # noqa: E402
import data  # noqa: E402
import dpsgd  # noqa: E402
import pld  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from conftest import tiny_unet  # noqa: E402
from machinery import checkpoint  # noqa: E402

# a grid of 3^9 points: epsilon_pld is a bound as well, a little looser, in a fraction of a second
QUICK = [(sample, "PICTURES", sample.Sampling(steps=3, guidance=0.0)), (checkpoint, "SAVE_EVERY", 2),
         (pld, "PLD_POINTS", 3**9)]

# declared and real number of images: they differ, so that mistaking one for the other shows
N, IMAGES = 400, 200
FLAGS = ("--N 400 --B 40 --steps 6 --rank 2 --delta 1e-3 --C 0.02 --K 1 --chunk 20 --device cpu "
         "--data-dir data --base base.pt").split()
PUBLISHED = ("adapter_config.json", "adapter_model.bin", "config.json", "metrics.csv", "privacy.json",
             "samples.png")


def write_idx(folder, images, labels, prefix="train"):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def make_folder(path, sizes=((40, 30), (32, 32), (50, 70)), classes=("cats", "dogs")):
    from PIL import Image
    rng = np.random.default_rng(0)
    for c in classes:
        (path / c).mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path / c / f"{i}.png")


def make_place(folder, images=IMAGES, seed=0, name="data"):
    """folder/base.pt and folder/data: 8 x 8 "private" images in MNIST's format.

    The first pixel of each is its number.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0] = np.arange(images)
    (folder / name).mkdir(parents=True)
    write_idx(folder / name, pixels, np.arange(images, dtype=np.uint8) % 10)
    base.save(folder / "base.pt", tiny_unet())
    return folder


def call(main, *argv) -> tuple[int, str, str]:
    """main() as the command line would run it: (exit code, stdout, stderr), warnings and tracebacks included.

    The handler of Ctrl-C is put back.
    """
    out, err, handler, code = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.MonkeyPatch.context() as m, warnings.catch_warnings():
        warnings.showwarning = lambda *w, **_: err.write(warnings.formatwarning(*w[:4]))
        m.setattr(sys, "argv", [main.__module__ + ".py", *map(str, argv)])
        try:
            main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            err.write("" if isinstance(e.code, int) else f"{e.code}\n")
        except Exception:
            code = 1
            err.write(traceback.format_exc())
        finally:
            signal.signal(signal.SIGINT, handler)
    return code, out.getvalue(), err.getvalue()


def finetune(*flags, picture=False) -> tuple[int, str, str]:
    """`python train.py`, small and quick, in the current folder; without samples.png, most of the time."""
    with pytest.MonkeyPatch.context() as m:
        for module, name, value in QUICK:
            m.setattr(module, name, value)
        if not picture:
            m.setattr(sample, "before_and_after", lambda *_: None)
        return call(train.main, *FLAGS, *flags)


def watch(out, *flags, no_lots=False) -> list[tuple[list[int], dict]]:
    """A whole run on images whose gradients are all 0.

    Returns of each step the numbers in its lot and its noise, per tensor.
    """
    steps, real = [], dpsgd.private_gradient

    def nothing(params, *part):
        return {name: torch.zeros(len(part[0]), *p.shape) for name, p in params.items()}

    def spy(per_sample, params, examples, **settings):
        gradient = real(nothing, params, examples, **settings)
        numbers = data.to_uint8(examples[0])[:, 0, 0, 0].tolist()
        steps.append((numbers, {name: g * settings["B"] for name, g in gradient.items()}))
        return gradient
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dpsgd, "private_gradient", spy)
        if no_lots:
            m.setattr(dpsgd, "poisson_sample", lambda *_: torch.zeros(0, dtype=torch.int64))
        code, _, err = finetune("--out", out, *flags)
    assert code == 0, err
    return steps


def stop_after(step: int):
    """A context in which Ctrl-C is pressed during the given step (1, 2, ..) of the private run inside it."""
    @contextlib.contextmanager
    def context():
        calls, real = [], dpsgd.private_gradient

        def press(*args, **settings):
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(signal.SIGINT)
            return real(*args, **settings)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(dpsgd, "private_gradient", press)
            yield
    return context()


class Code:
    """What a pickle can do: unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


if __name__ == "__main__":
    for module, name, value in QUICK:
        setattr(module, name, value)
    train.main()
