"""Theorems about the private loop itself: what is published, what ranks share, what --resume takes up.

The mechanism (dpsgd.private_gradient) is private; these theorems say that the loop around it adds nothing to
what it returned.
"""
import json
from pathlib import Path

import pytest
import torch

import base
import accountant
import data
import ddpm
import dpsgd
import lora
import sample
import train
import unet
import pld
from machinery import checkpoint, draws
from support import privacy_report
from conftest import tiny_unet
from test_data import write_idx
from helpers import IMAGES, N, PUBLISHED, finetune, make_place, stop_after, watch

Q = 40 / N


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(make_place(tmp_path))


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def ignorant():
    """A stand-in for private_gradient: noise from a seed, whatever the images are."""
    own = torch.Generator().manual_seed(8)

    def gradient(per_sample, params, examples, **settings):
        return {name: 0.01 * torch.randn(p.shape, generator=own) for name, p in params.items()}
    return gradient


def spied(monkeypatch):
    """private_gradient's (params, examples, settings) of every step, a list that fills while a run lasts."""
    seen, real = [], dpsgd.private_gradient

    def spy(per_sample, params, examples, **settings):
        seen.append(({name: p.detach().clone() for name, p in params.items()}, examples, settings))
        return real(per_sample, params, examples, **settings)
    monkeypatch.setattr(dpsgd, "private_gradient", spy)
    return seen


# --- what one image reaches

def test_every_backward_pass_of_a_run_has_one_size_whatever_its_lots(monkeypatch):
    """Sums of another size round otherwise, and an image would move the others' gradients."""
    sizes, real = [], train.per_image_gradients

    def spy(*args):
        per_sample = real(*args)
        return lambda params, *part: sizes.append(len(part[0])) or per_sample(params, *part)
    monkeypatch.setattr(train, "per_image_gradients", spy)
    seen = spied(monkeypatch)
    code, _, err = finetune("--out", "run", "--seed", 1, "--chunk", 7)
    assert code == 0, err
    lots = [len(examples[0]) for _, examples, _ in seen]
    assert len({n % 7 for n in lots} - {0}) > 1, "all lots of this seed are whole chunks: none was filled up"
    assert sizes == [7] * sum(-(-n // 7) for n in lots)


# --- what is published

def test_all_published_bytes_are_a_function_of_public_constants_and_of_what_private_gradient_returned(
        tmp_path, monkeypatch):
    """200 images, and 3 others, so that most lots are empty; the same noise is returned: the same folder."""
    published = []
    for images in (IMAGES, 3):
        monkeypatch.chdir(make_place(tmp_path / str(images), images, seed=images))
        monkeypatch.setattr(dpsgd, "private_gradient", ignorant())
        code, _, err = finetune("--out", "run", "--seed", 5, "--peek", 3, picture=True)
        assert code == 0, err
        published.append(files("run"))
    assert set(published[0]) == {*PUBLISHED, "peek-00003.png", "peek-00006.png"}
    for name, content in published[0].items():
        assert content == published[1][name], f"{name} depends on private images beside the mechanism"


def test_the_adapter_is_the_average_and_not_the_last_weights(monkeypatch):
    made, EMA = [], ddpm.EMA
    monkeypatch.setattr(ddpm, "EMA", lambda *a: made.append(EMA(*a)) or made[-1])
    seen = spied(monkeypatch)
    assert finetune("--out", "run")[0] == 0
    adapted = lora.split(lora.load(base.load(Path("base.pt")).model, Path("run")))[0]
    assert len(made) == 1 and made[0].updates == 6
    assert all(torch.equal(p, made[0].shadow[name]) for name, p in adapted.items())
    assert any(not torch.equal(p, seen[-1][0][name]) for name, p in adapted.items())


def test_privacy_json_says_exactly_this(monkeypatch):
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)                         # whatever the bound is, it is stated
    s = train.check(train.Settings(N=400, B=40, steps=6, delta=1e-3, C=0.02, K=3))
    sigma = accountant.calibrate(10.0, 1e-3, Q, 6)
    rdp, order = accountant.epsilon(Q, sigma, 6, 1e-3)
    assert privacy_report.after(s, sigma, 6, 1000) == {
        "private": True, "epsilon": rdp, "delta": 1e-3,
        "neighbours": "add or remove one image", "unit_of_privacy": "one image",
        "N": 400, "B": 40, "q": 0.1, "C": 0.02, "K": 3, "sigma": sigma, "steps": 6,
        "mechanism": "Poisson-sampled Gaussian, one noise draw a step",
        "noise": "float64 normals, added in float64, rounded once", "tail": dpsgd.tail(Q, sigma, 6, 1000),
        "accountant": "rdp", "epsilon_rdp": rdp, "epsilon_pld": pld.pld_epsilon(Q, sigma, 6, 1e-3),
        "best_order": order,
        "covers": "the finished run's folder: the adapter, tables and pictures, and every image ever drawn "
                  "with it",
        "does_not_cover": [
            "a person with several images: the unit is ONE image",
            "other runs on the same images: losses add up (python accountant.py compose A/privacy.json ...)",
            "choices made by looking at the private images before the run, such as hyper-parameters tuned on "
            "them",
            "N, the names of the classes and the data set's existence: they are declared, and public",
            "figures computed from private images afterwards: accuracy, FID, nearest neighbours",
            "what the curator alone sees: the screen, the log, the exit code, how long each step takes, "
            "files' times",
            "a run that was not finished: its checkpoint.pt stays, and holds the state of the noise",
            "two folders that went on from copies of one checkpoint: they have the same noise, so publish "
            "one",
            "the network between ranks: clipped sums cross it before the noise is added",
            "attacks on the arithmetic: float64 noise is no exact Gaussian, and its generator is not "
            "cryptographic",
            "rounding: in bfloat16 or on a GPU a gradient may move with who else is in the lot; epsilon "
            "ignores that",
            "what the public base learnt: shipped ones saw drawings made by code, or ImageNet photographs, "
            "or both",
            "anyone who can read checkpoint.pt while the run lasts: it holds the state of the noise"]}
    for public in (train.check(train.Settings(epsilon=float("inf"))), train.check(train.Settings(seed=1))):
        said = privacy_report.after(public, 0.0 if public.seed is None else 5.0, 110, 1000)
        assert (said["private"], said["covers"]) == (False, "nothing")


# --- what a step is made of

def test_a_step_runs_with_the_settings_that_are_stated_and_its_own_images_and_labels(monkeypatch):
    """One generator, seeded by the operating system, makes lots and noise; labels stay with their images."""
    sampled, sample = [], dpsgd.poisson_sample
    monkeypatch.setattr(dpsgd, "poisson_sample", lambda *a: sampled.append(a) or sample(*a))
    seen = spied(monkeypatch)
    assert finetune("--out", "run", "--C", 0.03)[0] == 0
    said = json.loads(Path("run", "privacy.json").read_text())
    assert len(seen) == len(sampled) == said["steps"] == 6
    for (_, (x0, labels, t, noise), how), (count, q, generator) in zip(seen, sampled):
        assert (count, q) == (IMAGES, said["q"]) and generator is how["generator"]
        assert generator.device.type == "cpu"
        assert (how["C"], how["sigma"], how["B"]) == (0.03, said["sigma"], said["B"]) and said["C"] == 0.03
        number = ((x0[:, 0, 0, 0] + 1) * 127.5).round().long()
        own = labels == number % 10
        assert (own | (labels == 10)).all() and own.float().mean() > 0.5
        assert len(x0) == len(t) == len(noise)
    seeded = torch.Generator().manual_seed(generator.initial_seed())
    assert not torch.equal(seeded.get_state()[24:], generator.get_state()[24:])


def test_an_image_is_in_a_lot_exactly_if_its_uniform_number_is_below_q(monkeypatch):
    """The rate to 0.2%: uniform numbers just above q put nobody into the lot, just below q everybody."""
    for q in (0.001, 0.1, 0.9):
        for factor, size in ((1.002, 0), (0.998, 50)):
            close = torch.full((50,), factor * q, dtype=torch.float64)
            monkeypatch.setattr(torch, "rand", lambda n, **_: close)
            assert len(dpsgd.poisson_sample(50, q)) == size


def test_every_step_draws_t_and_noise_anew_from_the_runs_key(monkeypatch):
    asked, streams = [], draws.streams
    monkeypatch.setattr(draws, "streams", lambda *a: asked.append((int(a[0]), a[1])) or streams(*a))
    for out in ("a", "b"):
        assert finetune("--out", out)[0] == 0
    assert [step for _, step in asked] == 2 * [1, 2, 3, 4, 5, 6] and len({key for key, _ in asked}) == 2


def test_an_image_without_a_class_of_the_base_counts_as_no_image(tmp_path, monkeypatch):
    """Whether such an image is there changes no published byte, nor does it end the run."""
    code, _, err = finetune("--out", "run", "--seed", 5, picture=True)
    assert code == 0, err
    without = files("run")
    monkeypatch.chdir(make_place(tmp_path / "more", IMAGES + 1))
    images, labels = data.load("mnist", "train", "data")
    labels[-1] = 11
    write_idx(Path("data"), images[:, 0].numpy(), labels.byte().numpy())
    code, _, err = finetune("--out", "run", "--seed", 5, picture=True)
    assert code == 0 and files("run") == without, err


def test_no_image_at_all_is_a_legal_run(tmp_path, monkeypatch):
    monkeypatch.chdir(make_place(tmp_path / "none", 0))
    code, _, err = finetune("--out", "run")
    assert code == 0 and json.loads(Path("run", "privacy.json").read_text())["steps"] == 6, err


# --- several ranks, in this process: each is told its number, and nothing is summed

def on_rank(monkeypatch, rank):
    monkeypatch.setattr(train.distributed, "start", lambda device: (rank, 2, device))


def test_at_q_1_the_lots_of_two_ranks_are_all_images_once(monkeypatch):
    lots = []
    for rank in (0, 1):
        on_rank(monkeypatch, rank)
        lots.append([lot for lot, _ in watch(f"rank-{rank}", "--B", N)])
    for one, other in zip(*lots):
        assert sorted(one + other) == list(range(IMAGES)), "an image is nobody's, or two ranks': q is doubled"


def test_ranks_draw_their_lots_independently_and_their_draws_of_t_in_common(monkeypatch):
    lots, keys, streams = [], set(), draws.streams
    monkeypatch.setattr(draws, "streams", lambda *a: keys.add(int(a[0])) or streams(*a))
    for rank in (0, 1):
        on_rank(monkeypatch, rank)
        lots.append([[number // 2 for number in lot] for lot, _ in watch(f"rank-{rank}", "--seed", 3)])
    assert all(one != other for one, other in zip(*lots)), "equal places in both shares: not one Poisson lot"
    assert keys == {3}


def test_all_ranks_start_from_rank_0s_factors_and_key(monkeypatch):
    def marked(tensors):
        assert tensors["key"].dtype == torch.int64
        for p in tensors.values():
            p.data.fill_(1)
    asked, streams = [], draws.streams
    monkeypatch.setattr(draws, "streams", lambda *a: asked.append(int(a[0])) or streams(*a))
    monkeypatch.setattr(train.distributed, "same_everywhere", marked)
    seen = spied(monkeypatch)
    assert finetune("--out", "run")[0] == 0
    assert set(asked) == {1} and all((p == 1).all() for p in seen[0][0].values())


# --- stopped, killed, resumed

def stopped(out="run", *flags):
    with stop_after(3):
        assert finetune("--out", out, *flags)[0] == 1


def test_a_run_does_not_go_on_with_another_number_of_ranks(monkeypatch):
    stopped()
    on_rank(monkeypatch, 0)
    code, _, err = finetune("--out", "run", "--resume")
    assert code == 2 and "ranks: 1 then, 2 now" in err, err


def test_a_run_does_not_go_on_from_other_weights_under_the_bases_name():
    stopped()
    base.save(Path("base.pt"), tiny_unet(seed=1))
    code, _, err = finetune("--out", "run", "--resume")
    assert code == 2 and "base has changed" in err, err


def test_a_resumed_run_draws_from_the_key_it_had(monkeypatch):
    """Or t and noise of the later steps would be others; no seed, so that a new key would be another one."""
    asked, streams = [], draws.streams
    monkeypatch.setattr(draws, "streams", lambda *a: asked.append((int(a[0]), a[1])) or streams(*a))
    stopped()
    assert finetune("--out", "run", "--resume")[0] == 0
    assert [step for _, step in asked] == [1, 2, 3, 4, 5, 6] and len({key for key, _ in asked}) == 1


def test_a_strip_is_shown_only_of_a_step_that_is_saved(monkeypatch):
    """So that what was shown is on the path that --resume goes on with, even after kill -9."""
    saved, strips, save = [], [], checkpoint.save

    def watched(path, state, **how):
        saved.append(state.get("step"))
        save(path, state, **how)
    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(sample, "class_strip", lambda *a, path: strips.append((path.name, saved[-1])))
    real = checkpoint.Run.after

    def rarely(*a):
        monkeypatch.setattr(checkpoint, "SAVE_EVERY", 100)
        real(*a)
    monkeypatch.setattr(checkpoint.Run, "after", rarely)
    assert finetune("--out", "run", "--peek", 3)[0] == 0
    assert strips == [("peek-00003.png", 3), ("peek-00006.png", 6)]


@pytest.mark.parametrize("mine", ["metrics.csv", "samples.png", "adapter_config.json"])
def test_a_folder_with_what_a_run_would_replace_is_refused_before_an_image_is_read(mine, monkeypatch):
    Path("run").mkdir()
    Path("run", mine).write_text("somebody's")
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("read"))
    code, _, err = finetune("--out", "run")
    assert code == 2 and f"already holds a run ({mine})" in err and len(err.splitlines()) == 1, err
    assert [p.name for p in Path("run").iterdir()] == [mine] and Path("run", mine).read_text() == "somebody's"


def test_a_folder_with_strips_of_a_killed_run_is_refused():
    Path("run").mkdir()
    Path("run", "peek-00003.png").touch()
    code, _, err = finetune("--out", "run")
    assert code == 2 and "already holds a run (peek-00003.png)" in err and len(err.splitlines()) == 1, err


def test_a_broken_promise_is_no_lost_rank(monkeypatch):
    """Under torchrun, too, its own words are said."""
    def broken(*_):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        raise RuntimeError("spent epsilon = 12 > promised 10")
    monkeypatch.setattr(statement, "after", broken)
    code, _, err = finetune("--out", "run")
    assert code != 0 and "spent epsilon = 12 > promised 10" in err and "another rank" not in err, err


def test_an_unanswered_collective_is_a_lost_rank(monkeypatch):
    def unanswered(*_, **__):
        raise ConnectionError("an all-reduce that nobody answered")
    monkeypatch.setattr(dpsgd, "private_gradient", unanswered)
    code, _, err = finetune("--out", "run")
    assert code == 1 and "another rank died" in err and "Traceback" not in err, err
