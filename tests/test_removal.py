"""The folder test by removal: what an image changes in all that a run publishes is its own clipped gradient.

Differential privacy compares the runs on two sets of images, D and D', that differ by one image. Here both go
through the real command line, with every coin below q, the key of the draws fixed and the noise set to zero.
In the run on D' the missing image's own clipped gradient is added by hand to each exact sum. That run must
leave the folder of D, byte for byte. Anything else that the image had changed would show.
"""
import contextlib
import functools
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import base
import dpsgd
import pld
import train
from conftest import tiny_unet
from helpers import PUBLISHED, finetune, write_idx
from machinery import draws, secret
from support import privacy_report
from test_latents import public_base

C, STEPS = 0.02, 2
# ten images of three classes: 3, 1 and 6 of them; the third and the fifth cat are the same image
CLASSES = ["ants"] * 3 + ["bees"] + ["cats"] * 6
WHERE = {"first": 0, "alone in its class": 3, "in the middle": 5, "one of two copies": 6, "last": 9}
DECLARED = ["bees", "cats", "ants"]      # in another order than their folders' names; the first is "alone"


def pictures(shape: tuple) -> np.ndarray:
    """uint8 (10, *shape)"""
    x = np.random.default_rng(3).integers(0, 256, (len(CLASSES), *shape), dtype=np.uint8)
    x[8] = x[6]
    return x


def write_mnist(images: np.ndarray, kept: list[int]) -> None:
    labels = [DECLARED.index(CLASSES[i]) for i in kept]
    write_idx(Path("data"), images[kept], np.array(labels, dtype=np.uint8))


def write_folder(images: np.ndarray, kept: list[int]) -> None:
    """A class without an image has no sub-folder; the other files keep their names."""
    for i in kept:
        Path("data", CLASSES[i]).mkdir(exist_ok=True)
        Image.fromarray(images[i]).save(f"data/{CLASSES[i]}/{i}.png")


def pixels() -> None:
    base.save(Path("base.pt"), tiny_unet())


def latents() -> None:
    public_base(Path("base.pt"))


# the folders' ten images are more than N = B = 6: each lot exceeds B
FOLDER = ["--data", "folder:data", "--classes", ",".join(DECLARED), "--N", 6, "--B", 6]
# what is private -> (shape of an image, its writer, writer of the base, flags)
KINDS = {"grey-files": ((8, 8), write_mnist, pixels, ["--N", 16, "--B", 16, "--K", 2]),
         "grey-folder": ((8, 8), write_folder, pixels, [*FOLDER, "--size", 8]),
         "latents": ((64, 64, 3), write_folder, latents, [*FOLDER, "--size", 64])}


@contextlib.contextmanager
def watched(plus: list | None = None):
    """What meets the mechanism in each step, the exact sum of clipped gradients and what is returned.

    plus: of each step one image's examples; its own clipped gradient is added to the sum
    """
    steps, real, sum_over_ranks = [], dpsgd.private_gradient, dpsgd.distributed.sum_over_ranks

    def spy(per_sample, params, examples, **how):
        steps.append(types.SimpleNamespace(examples=examples, how=how, own=None))
        if plus:
            steps[-1].own = dpsgd.clip_and_count(per_sample(params, *plus[len(steps) - 1]), how["C"])
        steps[-1].gradient = real(per_sample, params, examples, **how)
        return steps[-1].gradient

    def summed(total):
        steps[-1].sum = total = sum_over_ranks(total)
        if not plus:
            return total
        return {name: g + steps[-1].own[name] for name, g in total.items()}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dpsgd, "private_gradient", spy)
        m.setattr(dpsgd.distributed, "sum_over_ranks", summed)
        yield steps


bound = functools.cache(pld.pld_epsilon)                         # all runs ask for the same


def run(folder: Path, kind: str, kept: list[int], plus: list | None = None):
    """A whole private run on these images: (what `watched` saw, file's name -> content)."""
    shape, write, write_base, flags = KINDS[kind]
    (folder / "data").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as m, watched(plus) as steps:
        m.chdir(folder)
        write_base()
        write(pictures(shape), kept)
        m.setitem(privacy_report.ACCOUNTANTS, "pld", bound)
        m.setattr(train, "new_key", lambda seed: bytes(secret.KEY_BYTES))
        m.setattr(draws, "new_key", lambda seed: torch.tensor(12345))
        m.setattr(secret.Secret, "normals", lambda self, step, n: torch.zeros(n, dtype=torch.float64))
        torch.manual_seed(0)                                             # of the factors A
        code, said, err = finetune("--out", "run", "--C", C, "--steps", STEPS, "--chunk", 8, *flags,
                                   picture=True)
        assert code == 0, err
        return steps, {p.name: p.read_bytes() for p in Path("run").iterdir()}, said


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """The run on all ten images, D."""
    steps, published, said = run(tmp_path_factory.mktemp("D"), request.param, list(range(len(CLASSES))))
    assert set(published) == set(PUBLISHED) and len(steps) == STEPS
    return types.SimpleNamespace(kind=request.param, steps=steps, published=published, said=said)


@pytest.mark.parametrize("where", WHERE)
def test_an_image_changes_the_sum_by_its_own_clipped_gradient_and_the_folder_by_nothing_else(where, whole,
                                                                                             tmp_path):
    out = WHERE[where]
    kept = [i for i in range(len(CLASSES)) if i != out]
    missing = [tuple(e[out:out + 1] for e in step.examples) for step in whole.steps]
    steps, published, said = run(tmp_path, whole.kind, kept, plus=missing)
    assert said == whole.said, "the screen of two runs that differ by one image"
    for with_it, without in zip(whole.steps, steps, strict=True):
        for one, other in zip(with_it.examples, without.examples, strict=True):
            assert len(one) == len(CLASSES) and torch.equal(one[kept], other), \
                "an image, label, t or noise of another image has changed"
        assert all(with_it.how[name] == without.how[name] for name in ("C", "sigma", "B", "chunk"))
        moved = torch.cat([dpsgd.value(g, C).flatten() for g in without.own.values()]).norm().item()
        assert 0 < moved <= C
        for name, own in without.own.items():
            assert torch.equal(with_it.sum[name] - without.sum[name], own), f"not its own gradient: {name}"
            step = dpsgd.grid(with_it.how["sigma"], C)
            mean = (dpsgd.value(with_it.sum[name], C) / step).round() * step / with_it.how["B"]
            assert torch.equal(with_it.gradient[name], mean.float()), f"not divided by the declared B: {name}"
    assert [name for name in whole.published if published[name] != whole.published[name]] == []
    assert published.keys() == whole.published.keys()


def test_without_noise_a_missing_image_shows_in_the_adapter_and_in_no_table(whole, tmp_path):
    """So the test above can fail; and it is the noise on the sum alone that hides an image."""
    steps, published, said = run(tmp_path, whole.kind, list(range(1, len(CLASSES))))
    assert said == whole.said
    differ = {name for name in PUBLISHED if published[name] != whole.published[name]}
    assert "adapter_model.bin" in differ and differ <= {"adapter_model.bin", "samples.png"}


def test_both_copies_of_an_image_count(whole):
    """They have the same draws, for these follow from an image's bytes; but each is an image of its own."""
    for step in whole.steps:
        assert len(step.examples[0]) == len(CLASSES)
        assert all(torch.equal(e[6], e[8]) for e in step.examples)


def test_files_that_are_no_pictures_change_no_published_byte(tmp_path, monkeypatch):
    """What is left out of a folder is told on the screen; how much it is, is private."""
    published = []
    for name, more in (("with", ["notes.txt", "cats/notes.txt", "cats/.8.png", "9.png"]), ("without", [])):
        def write(images, kept):
            write_folder(images, kept)
            for path in more:
                Path("data", path).write_bytes(Path("data/cats/9.png").read_bytes())
        monkeypatch.setitem(KINDS, "grey-folder", (KINDS["grey-folder"][0], write, *KINDS["grey-folder"][2:]))
        published.append(run(tmp_path / name, "grey-folder", list(range(len(CLASSES))))[1])
    assert published[0] == published[1]
