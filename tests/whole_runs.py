"""Whole runs inside the test's own process: the real command line, but torch is imported once."""
import contextlib
import io
import os
import signal
import sys
import traceback
import warnings

import numpy as np
import pytest
import torch

import data
import dpsgd
import sample
import train
import unet
from conftest import tiny_unet
from quick_train import QUICK
from test_data import write_idx

# declared and real number of images: they differ, so that mistaking one for the other shows
N, IMAGES = 400, 200
FLAGS = ("--N 400 --B 40 --steps 6 --rank 2 --delta 1e-3 --C 0.02 --K 1 --chunk 20 --device cpu "
         "--data-dir data --base base.pt").split()
PUBLISHED = ("adapter_config.json", "adapter_model.bin", "config.json", "metrics.csv", "privacy.json",
             "samples.png")


def make_place(folder, images=IMAGES, seed=0, name="data"):
    """folder/base.pt and folder/data: 8 x 8 "private" images in MNIST's format.

    The first pixel of each is its number.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0] = np.arange(images)
    (folder / name).mkdir(parents=True)
    write_idx(folder / name, pixels, np.arange(images, dtype=np.uint8) % 10)
    unet.save(folder / "base.pt", tiny_unet())
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
