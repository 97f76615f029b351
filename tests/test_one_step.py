"""Properties of a whole step as train.py makes it: what one image moves; the lots and the noise of a run."""
import contextlib
import json
import math
from pathlib import Path

import pytest
import torch

import dpsgd
import lora
import train
from conftest import tiny_unet
from helpers import IMAGES, N, finetune, make_place, watch
from machinery import devices, draws

Q, LONG = 40 / N, 150        # sampling rate of FLAGS; steps of the runs whose lots and noise are counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("one-step"))


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def long_run(folder):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        seen = watch("long", "--steps", LONG, "--seed", 1)
        return seen, json.loads((folder / "long" / "privacy.json").read_text())


def flat(tensors) -> torch.Tensor:
    return torch.cat([g.flatten() for g in tensors.values()])


def correlation(a, b) -> float:
    return torch.corrcoef(torch.stack([flat(a), flat(b)]))[0, 1].item()


# --- one image

@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("what", ["lora", "lora+embed", "lora+conv", "attention"])
def test_one_image_moves_a_whole_step_by_exactly_C_over_B(what, K, chunk, monkeypatch):
    """From the uint8 images to the gradient that Adam gets, as train.py puts the parts together.

    All draws of (t, noise) are known, and the image is taken out of the front: nobody else's may change.
    """
    model, n, B, C = tiny_unet(), 6, 8, 1e-6                             # a C that every gradient exceeds
    lora.attach(model, lora.describe(what, 2, 3.0, True))
    trainable, frozen = lora.split(model)
    with torch.no_grad():
        for p in trainable.values():
            p.add_(0.3 * torch.randn_like(p))
    images, labels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8), torch.arange(n)
    # float32: no rounding to speak of
    monkeypatch.setattr(devices, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "DROP", 0.5)
    s = train.Settings(K=K, train=what)

    def step(first):
        key, hashes = torch.tensor(3), draws.hashes(images[first:])
        examples = train.with_draws(images[first:], labels[first:], hashes, key, 1, model.classes, s)
        per_sample = train.per_image_gradients(model, frozen, s)
        return flat(dpsgd.private_gradient(per_sample, trainable, examples, C=C, sigma=0, B=B, chunk=chunk))
    moved = (step(0) - step(1)).norm().item() * B / C
    assert 0.99 < moved < 1.001, f"one image moved the sum by {moved:.3f} C"


# --- one step

def test_a_runs_lots_are_poisson_samples_at_the_declared_rate(long_run):
    """q = B/N from the declared N, though the folder holds fewer images.

    No fixed size, no memory of earlier lots.
    """
    lots = [lot for lot, _ in long_run[0]]
    assert len(lots) == LONG
    assert all(len(set(lot)) == len(lot) for lot in lots), "an image is in a lot once or not at all"
    size, variance = torch.tensor([float(len(lot)) for lot in lots]), IMAGES * Q * (1 - Q)
    assert abs(size.mean() - IMAGES * Q) < 5 * math.sqrt(variance / LONG), size.mean()
    assert abs(size.var() / variance - 1) < 5 * math.sqrt(2 / LONG), size.var()
    again = [len(set(one) & set(two)) for one, two in zip(lots, lots[1:])]
    assert abs(sum(again) / len(again) - IMAGES * Q**2) < 5 * math.sqrt(IMAGES * Q**2 / LONG), \
        f"{sum(again) / len(again)} images of a lot are in the next one: shuffled data have none"


def test_a_runs_noise_has_std_sigma_C_in_every_tensor_and_is_fresh_in_every_step(long_run):
    noise, said = [n for _, n in long_run[0]], long_run[1]
    for name in noise[0]:
        z = torch.stack([step[name].flatten() for step in noise])
        tolerance = 5 / math.sqrt(2 * z.numel())
        assert z.std().item() == pytest.approx(said["sigma"] * said["C"], rel=tolerance), name
    between = [correlation(a, b) for a, b in zip(noise, noise[1:])]
    assert abs(sum(between) / len(between)) < 5 / math.sqrt(len(between) * len(flat(noise[0])))


def test_two_runs_without_a_seed_share_neither_lots_nor_noise():
    a, b = watch("first"), watch("second")
    assert [lot for lot, _ in a] != [lot for lot, _ in b]
    assert all(abs(correlation(x, y)) < 5.5 / math.sqrt(len(flat(x))) for (_, x), (_, y) in zip(a, b))


def test_an_empty_lot_is_a_step_with_noise_that_counts():
    steps = watch("empty", no_lots=True)
    assert len(steps) == 6 and all(flat(noise).std() > 0 for _, noise in steps)
    assert json.loads((Path("empty") / "privacy.json").read_text())["steps"] == 6


def test_what_a_run_says_depends_on_public_constants_alone(tmp_path, monkeypatch):
    """Two runs with the same seed on other images, and fewer: every word, figure and table is the same."""
    said = []
    for images, seed in ((IMAGES, 0), (IMAGES - 60, 1)):
        monkeypatch.chdir(make_place(tmp_path / str(seed), images, seed))
        shown = []

        class Bar(list):
            set_postfix = lambda self, **figures: shown.append(figures)
        monkeypatch.setattr(train, "tqdm", lambda steps, **_: Bar(steps))
        code, out, err = finetune("--out", "run", "--seed", 5)
        # a note of the number of images that were found is for the curator alone
        log = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert code == 0 and all(line.startswith("step ") for line in log), err
        files = [Path("run", name).read_text() for name in ("metrics.csv", "privacy.json", "config.json")]
        said.append([out, log, shown, *files])
    for one, other in zip(*said):
        assert one == other
