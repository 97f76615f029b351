"""Theorems about the private loop as a whole: what an image, a step and an interruption can do to a run."""
import contextlib
import dataclasses
import json
import math
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

import base
import accountant
import dpsgd
import lora
import sample
import train
import unet
import pld
from machinery import checkpoint, draws
from support import privacy_report
from conftest import tiny_unet
from helpers import IMAGES, N, Code, finetune, make_place, stop_after, watch

Q, LONG = 40 / N, 150        # sampling rate of FLAGS; steps of the runs whose lots and noise are counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("theorems"))


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
    """The headline theorem from the uint8 images to the gradient that Adam gets, as train.py wires it up.

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
    monkeypatch.setattr(unet, "autocast", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(train, "DROP", 0.5)
    s = train.Settings(K=K, train=what)

    def step(first):
        key, names = torch.tensor(3), draws.names(images[first:])
        examples = train.with_draws(images[first:], labels[first:], names, key, 1, model.classes, s)
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


def test_the_noise_cannot_be_found_by_trying_all_32_bit_seeds():
    """manual_seed(s) leaves s itself as the first word of the state: whoever guesses it has the other 623."""
    words = lambda g: g.get_state()[24:24 + 624 * 8].view(torch.int64)
    state = words(dpsgd.os_generator())
    assert not torch.equal(words(torch.Generator().manual_seed(int(state[0]))), state)


def test_the_uniform_draws_of_a_lot_are_fine_enough_for_a_small_q(monkeypatch):
    """Of 30,000 draws with 24 bits about 27 coincide, and no q below 6e-8 is possible; with 53, none do."""
    drawn, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(rand(*a, **k)) or drawn[-1])
    dpsgd.poisson_sample(30_000, 0.5, torch.Generator().manual_seed(0))
    assert len(drawn[0].unique()) == 30_000


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
        assert code == 0 and all(line.startswith("step ") for line in err.splitlines()), err
        files = [Path("run", name).read_text() for name in ("metrics.csv", "privacy.json", "config.json")]
        said.append([out, err, shown, *files])
    for one, other in zip(*said):
        assert one == other


# --- the statement

def test_the_statement_counts_the_steps_in_the_ledger_not_the_steps_wanted(monkeypatch):
    """Had a run really taken 4 of its 6 steps, or 7, the statement would say so."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(statement, "publish", lambda *arguments: m.setattr(train, "kept", arguments, raising=False))
        code, _, err = finetune("--out", "ledger", "--epsilon", 20)
        assert code == 0, err
        s, sigma, metrics, *rest = train.kept
    monkeypatch.setattr(sample, "before_and_after", lambda *_: None)
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)                         # not what is asked here
    s = dataclasses.replace(s, epsilon=40.0)                             # room for a seventh step
    for rows in (metrics[:4], metrics + [[7, None, None]]):
        Path("ledger", "checkpoint.pt").touch()
        privacy_report.publish(s, sigma, rows, *rest)
        said = json.loads(Path("ledger", "privacy.json").read_text())
        assert said["steps"] == len(rows)
        assert said["epsilon"] == accountant.epsilon(Q, sigma, len(rows), 1e-3)[0]


@pytest.fixture(scope="module")
def whole(folder):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        code, _, err = finetune("--out", "whole", "--seed", 4)
    assert code == 0, err
    return folder / "whole"


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_stopped_and_resumed_run_is_the_run_that_was_never_stopped(step, whole):
    """The same lots, noise and ledger: no step is repeated with new noise, none goes uncounted."""
    out = f"stopped-{step}"
    with stop_after(step):
        code, _, err = finetune("--out", out, "--seed", 4)
    assert code == 1 and f"stopped after step {step}" in err
    code, _, err = finetune("--out", out, "--seed", 4, "--resume")
    assert code == 0, err
    for name in ("adapter_model.bin", "metrics.csv", "privacy.json"):
        assert Path(out, name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("now", [
    dict(sigma=0.5), dict(N=500), dict(rank=4), dict(private_images="others"), dict(new=1)])
def test_a_checkpoint_goes_on_only_under_the_settings_it_was_written_under(now, tmp_path):
    before = dict(sigma=1.0, N=400, rank=2, private_images="these")
    checkpoint.save(tmp_path / "c.pt", dict(settings=before, step=3))
    assert checkpoint.load(tmp_path / "c.pt", before)["step"] == 3
    with pytest.raises(ValueError, match="other settings"):
        checkpoint.load(tmp_path / "c.pt", before | now)


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_checkpoint_is_readable_by_its_owner_alone(left_behind, tmp_path, monkeypatch):
    """Also where an older file of the same name was readable by all."""
    if left_behind:
        for name in ("c.pt", "c.pt.partial"):
            (tmp_path / name).touch(0o644)
    old, seen, fsync = os.umask(0), [], os.fsync

    def watched(descriptor):
        seen.append(os.fstat(descriptor))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", watched)
    try:
        checkpoint.save(tmp_path / "c.pt", dict(settings={}))
    finally:
        os.umask(old)
    modes = [oct(mode.st_mode & 0o777) for mode in seen if stat.S_ISREG(mode.st_mode)]
    assert modes == [oct(0o600)] and (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o600


# --- files from elsewhere

@pytest.mark.parametrize("what", ["base", "adapter", "checkpoint"])
def test_code_inside_a_file_is_refused_and_never_run(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora.describe("lora", 2, 3.0, True)))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Code(), protocol=2))
    read = dict(base=lambda: base.load(tmp_path / "adapter_model.bin").model,
                adapter=lambda: lora.load(tiny_unet(), tmp_path),
                checkpoint=lambda: checkpoint.load(tmp_path / "adapter_model.bin", {}))[what]
    with contextlib.suppress(ValueError):
        read()
        pytest.fail("a pickle with code in it was accepted")
    assert not (tmp_path / "executed").exists(), "code from the file was run"
