"""Property tests of whole runs on the real command line: the privacy report is true, only adapters change.

The first run is a process of its own; the others, and all samples, run in the test's, as main() would.
"""
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import accountant
import base
import data
import ddpm
import lora
import pld
import sample
import train
from conftest import ROOT, examples, tiny_unet
from drawings import glyphs
from helpers import PUBLISHED, call, finetune, make_folder, write_idx
from machinery import draws, screen
from support import privacy_report, runs

TINY = ["--N", "200", "--B", "20", "--steps", "6", "--rank", "2", "--delta", "1e-3", "--device", "cpu",
        "--chunk", "40"]


def command(*argv):
    return subprocess.run([sys.executable, str(ROOT / "tests/helpers.py"), *map(str, argv)],
                          capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny base model and 200 "private" images of 28 x 28 in MNIST's format."""
    place = tmp_path_factory.mktemp("place")
    base.save(place / "base.pt", tiny_unet())
    images, labels = glyphs.draw(200, torch.Generator().manual_seed(1))
    write_idx(place, data.to_uint8(images[:, 0]).numpy(), labels.to(torch.uint8).numpy())
    return place


def where(place, out) -> list:
    return ["--data-dir", place, "--base", place / "base.pt", "--out", place / out]


@pytest.fixture(scope="module")
def run(place):
    done = command(*TINY, "--K", 2, *where(place, "run"))
    assert done.returncode == 0, done.stderr
    return place / "run", done


def test_a_run_leaves_what_it_promises(run):
    folder, done = run
    promised = {"samples.png", "adapter_model.bin", "adapter_config.json", "config.json", "metrics.csv",
                "privacy.json"}
    found = {p.name for p in folder.iterdir()}
    assert found == promised, "and no checkpoint: it holds a fingerprint of the private images"
    said = json.loads((folder / "privacy.json").read_text())
    spent = f"epsilon = {screen.up(said['epsilon'], 6)}"
    for word in (spent, "add or remove one image", said["covers"], "not covered"):
        assert word in done.stdout


def test_the_privacy_report_agrees_with_the_accountant(run):
    folder, _ = run
    said = json.loads((folder / "privacy.json").read_text())
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert said["steps"] == len(rows) == 6 and [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert said["epsilon"] == accountant.epsilon(20 / 200, said["sigma"], 6, 1e-3)[0] <= 10
    assert float(rows[-1]["epsilon_rdp"]) == said["epsilon"]
    assert float(rows[2]["epsilon_rdp"]) == accountant.epsilon(20 / 200, said["sigma"], 3, 1e-3)[0]
    assert (said["N"], said["B"], said["q"], said["K"], said["C"]) == (200, 20, 0.1, 2, train.Settings.C)
    assert said["private"] is True


def test_the_tighter_accountant_asks_for_less_noise_and_keeps_the_promise(monkeypatch):
    monkeypatch.setattr(pld, "PLD_POINTS", 3**10)                       # a coarser grid: a bound all the same
    loose, tight = (train.check(train.Settings(accountant=name)) for name in ("rdp", "pld"))
    sigma = [accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps, train.ACCOUNTANTS[s.accountant])
             for s in (loose, tight)]
    said = [privacy_report.after(s, sigma, s.steps) for s, sigma in zip((loose, tight), sigma)]
    assert sigma[1] < sigma[0] and said[1]["epsilon"] == said[1]["epsilon_pld"] <= 10 < said[1]["epsilon_rdp"]
    assert said[0]["epsilon"] == said[0]["epsilon_rdp"] <= 10
    assert said[0]["epsilon_pld"] < said[0]["epsilon_rdp"]


def test_only_adapters_and_class_embedding_change(place, monkeypatch):
    """In the network that was trained: the folder of a run does not hold its frozen weights."""
    trained, begin = [], runs.begin
    monkeypatch.setattr(runs, "begin", lambda *a: trained.append(begin(*a)) or trained[-1])
    code, _, err = finetune(*TINY, *where(place, "frozen"))
    assert code == 0, err
    before = base.load(place / "base.pt").model.state_dict()
    trainable, frozen = lora.split(trained[0].model)
    for name, p in frozen.items():
        assert torch.equal(p, before[name.replace(".base.", ".")]), name
    assert not torch.equal(trainable["class_embedding.weight"], before["class_embedding.weight"])
    assert all(p.abs().sum() > 0 for name, p in trainable.items() if name.endswith("lora_B"))


def test_the_adapter_loads_in_sample(run, tmp_path):
    folder, _ = run
    code, _, err = call(sample.main, folder, "--n", 7, "--steps", 3, "--npz", tmp_path / "s.npz",
                        "--out", tmp_path / "s.png")
    assert code == 0, err
    saved = np.load(tmp_path / "s.npz")
    assert saved["images"].shape == (7, 1, 28, 28) and saved["images"].dtype == np.uint8
    assert saved["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6] and (tmp_path / "s.png").stat().st_size > 0


def test_sample_draws_as_its_flags_say(run, tmp_path, monkeypatch):
    folder, _ = run
    drawn = []
    ddim = ("--sampler", "ddim", "--eta")
    for flags, how in (((*ddim, "1"), dict(sampler="ddim", eta=1.0)),
                       ((*ddim, "0"), dict(sampler="ddim", eta=0.0)),
                       (("--sampler", "dpm"), dict(sampler="dpm")),
                       (("--sampler", "dpm", "--threshold", "100"), dict(sampler="dpm", threshold=100))):
        argv = ["sample.py", folder, "--n", 3, "--steps", 4, "--guidance", 0, "--seed", 5,
                "--npz", tmp_path / "s.npz", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        sample.main()
        drawn.append(torch.from_numpy(np.load(tmp_path / "s.npz")["images"]))
        threshold = how.pop("threshold", 0)
        expected = sample.generate(runs.load(folder), torch.arange(3), 3,
                                   ddpm.Sampling(steps=4, guidance=0.0, **how), threshold=threshold,
                                   generator=torch.Generator().manual_seed(5), quiet=True)
        apart = (drawn[-1].int() - expected.int()).abs().max()           # in grey levels
        assert apart <= 1, f"more than a rounding: {flags}"
    for i, j in ((0, 1), (1, 2), (2, 3)):
        assert (drawn[i].int() - drawn[j].int()).abs().max() > 1, "each flag makes a difference"


def test_a_threshold_blackens_what_is_at_most_as_bright_and_leaves_the_rest(run):
    def draw(threshold):
        return sample.generate(runs.load(run[0]), torch.arange(4), 4, ddpm.Sampling(steps=4, guidance=0.0),
                               threshold=threshold, quiet=True, generator=torch.Generator().manual_seed(0))
    plain = draw(0)
    assert torch.equal(draw(120), torch.where(plain <= 120, 0, plain))
    assert ((plain > 0) & (plain <= 120)).any(), "there is something to blacken"


@pytest.mark.parametrize("flags, epsilon, warning, noise", [
    ("--epsilon inf", "inf", "NO PRIVACY", "none"), ("--seed 0", None, "NOT PRIVATE", "not secret"),
    ("", None, "", "secret key")])
def test_plan_privacy_report_and_screen_say_alike_what_is_private(place, flags, epsilon, warning, noise):
    out = f"alike{flags.replace(' ', '')}"
    code, said, err = finetune(*TINY, *where(place, out), *flags.split())
    assert code == 0 and warning in said, err
    facts, last = json.loads((place / out / "privacy.json").read_text()), said[said.rindex("  private "):]
    assert facts["private"] is (not warning) and facts["covers"].startswith("nothing" if warning else "the ")
    assert (facts["epsilon"] == "inf") == (facts["sigma"] == 0) == (epsilon == "inf")
    assert noise in facts["noise"] and (facts["noise"] == "none") == (facts["sigma"] == 0)
    for name in ("private", "noise", "covers"):
        assert f"  {name:<12} {facts[name]}" in last, (name, last)


def test_a_finished_run_is_never_overwritten(run, place):
    folder, _ = run
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    code, _, err = finetune(*TINY, *where(place, "run"))
    assert code == 2 and "already holds a run" in err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_run_that_broke_its_promise_is_refused(monkeypatch):
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)                        # stated beside
    s = train.check(train.Settings())
    sigma = accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    assert privacy_report.after(s, sigma, s.steps)["epsilon"] <= s.epsilon
    with pytest.raises(RuntimeError, match="promised"):
        privacy_report.after(s, sigma, s.steps * 2)


def test_a_run_that_broke_its_promise_publishes_nothing(place, monkeypatch):
    monkeypatch.setattr(accountant, "calibrate", lambda *a: 0.3)
    code, _, err = finetune(*TINY, *where(place, "broken"))
    assert code != 0 and "more than the promised" in err
    assert not {p.name for p in (place / "broken").iterdir()} & set(PUBLISHED)


def test_colour_folders_work_end_to_end(tmp_path):
    make_folder(tmp_path / "pictures")
    base.save(tmp_path / "base.pt", tiny_unet(classes=None, image_channels=3))
    code, _, err = finetune(*TINY, "--N", 6, "--B", 3, "--data", f"folder:{tmp_path / 'pictures'}",
                            "--size", 16, *where(tmp_path, "run"), picture=True)
    assert code == 0, err
    code, _, err = call(sample.main, tmp_path / "run", "--n", 2, "--steps", 2, "--npz", tmp_path / "s.npz")
    assert code == 0, err
    saved = np.load(tmp_path / "s.npz")
    assert saved["images"].shape == (2, 3, 16, 16)
    assert "labels" not in saved.files, "an unconditional model has no labels"


@pytest.mark.parametrize("K", [1, 4])
def test_every_image_has_one_gradient_whatever_K(K):
    """K draws of an image are one row, not K: what is clipped is the image."""
    model = tiny_unet()
    lora.inject(model, 2, 3.0)
    trainable, frozen = lora.split(model)
    s, images = train.Settings(K=K), torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    labels, hashes = torch.tensor([1, 2, 3]), draws.hashes(images)
    lot = train.with_draws(images, labels, hashes, torch.tensor(0), 1, model.classes, s)
    gradients = train.per_image_gradients(model, frozen, s)(trainable, *lot)
    assert all(g.shape == (3, *trainable[name].shape) for name, g in gradients.items())


@pytest.mark.parametrize("how", ddpm.DRAWS)
def test_private_gradients_weight_t_as_declared(how, monkeypatch):
    seen, loss = [], ddpm.loss
    monkeypatch.setattr(ddpm, "loss", lambda *args, **how: (seen.append(how), loss(*args, **how))[1])
    model = tiny_unet()
    lora.inject(model, 2, 3.0)
    trainable, frozen = lora.split(model)
    train.per_image_gradients(model, frozen, train.Settings(draws=how))(trainable, *examples(3, K=2))
    assert seen == [dict(weight=ddpm.DRAWS[how].weight)]


@pytest.mark.parametrize("name", ["base.pt", "base-clothes.pt"])
def test_the_shipped_bases_are_small_and_load(name):
    assert (ROOT / "assets" / name).stat().st_size <= 4_000_000
    public = base.load(ROOT / "assets" / name)
    assert public.coder is None and public.model.config["image_channels"] == 1 and public.model.classes == 10


@pytest.mark.parametrize("epsilon", [1, 10])
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_the_shipped_adapters_load_and_their_privacy_reports_hold(name, epsilon):
    folder = ROOT / "assets" / f"{name}-eps{epsilon}"
    said = json.loads((folder / "privacy.json").read_text())
    ran = [said[name] for name in ("q", "sigma", "steps", "delta")]
    spent = {name: bound(*ran) for name, bound in privacy_report.ACCOUNTANTS.items()}
    assert said["private"] and said["delta"] == 1e-5 and said["epsilon"] <= epsilon
    assert said["epsilon"] == pytest.approx(spent[said["accountant"]])
    assert {name: said[f"epsilon_{name}"] for name in spent} == pytest.approx(spent)
    assert said["q"] == said["B"] / said["N"]
    assert len((folder / "metrics.csv").read_text().splitlines()) == said["steps"] + 1
    public, adapted = (runs.load(folder, public).model for public in (True, False))
    x, labels, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 5]), torch.tensor([500, 500])
    assert (public(x, t, labels) - adapted(x, t, labels)).abs().max() > 1e-3
    apart = lora.load(runs.load(folder, public=True).model, folder)
    # merging changes nothing
    torch.testing.assert_close(adapted(x, t, labels), apart(x, t, labels), rtol=0, atol=1e-4)
    assert not any("lora" in key for key in adapted.state_dict())
