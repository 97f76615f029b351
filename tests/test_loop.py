"""Property tests of the private loop: what is published, what ranks share, what --resume takes up.

The mechanism (dpsgd.private_gradient) is private. These tests say that the loop around it adds nothing to
what it returned.
"""
import json
import os
import shutil
import types
from pathlib import Path

import pytest
import torch

import accountant
import base
import data
import ddpm
import dpsgd
import evaluate
import helpers
import lora
import pld
import sample
import train
import unet
from conftest import ROOT, tiny_unet
from helpers import (IMAGES, N, PUBLISHED, call, finetune, make_folder, make_place, stop_after, watch,
                     write_idx)
from machinery import checkpoint, devices, draws, secret
from support import privacy_report, runs

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
    """200 images of all classes, and 3 of two, so that most lots are empty; the same noise is returned: the
    same folder.
    """
    published = []
    for images in (IMAGES, 3):
        monkeypatch.chdir(make_place(tmp_path / str(images), images, seed=images))
        if images == 3:
            x = data.load("mnist", "train", "data")[0]
            write_idx(Path("data"), x[:, 0].numpy(), torch.tensor([9, 9, 4]).byte().numpy())
        monkeypatch.setattr(dpsgd, "private_gradient", ignorant())
        code, _, err = finetune("--out", "run", "--seed", 5, "--peek", 3, picture=True)
        assert code == 0, err
        published.append(files("run"))
    assert set(published[0]) == {*PUBLISHED, "peek-00003.png", "peek-00006.png"}
    for name, content in published[0].items():
        assert content == published[1][name], f"{name} depends on private images beside the mechanism"


def test_no_published_byte_and_no_word_on_the_screen_depends_on_the_keys_but_through_private_gradient(
        monkeypatch):
    """Two runs with other keys of the operating system, but the same gradients: a number made of a key, as a
    normal of each step, would differ. A log is somebody's to read, too.
    """
    told = []
    for out in ("run-1", "run-2"):
        torch.manual_seed(0)                                             # of the factors A
        monkeypatch.setattr(dpsgd, "private_gradient", ignorant())
        code, said, err = finetune("--out", out, "--peek", 3, picture=True)
        assert code == 0, err
        told.append(files(out) | dict(screen=said.replace(out, "run"), log=err))
    assert {*PUBLISHED, "peek-00003.png"} < set(told[0])
    assert [name for name in told[0] if told[0][name] != told[1][name]] == []


def test_settings_of_the_machine_reach_no_published_byte(monkeypatch):
    """Some of them, such as --chunk, may tell how large the lots were."""
    published = []
    for out, flags in (("one", ()), ("other", ("--chunk", 7, "--peek", 3))):
        monkeypatch.setattr(dpsgd, "private_gradient", ignorant())
        code, _, err = finetune("--out", out, "--seed", 5, *flags, picture=True)
        assert code == 0, err
        published.append(files(out))
    assert [name for name in PUBLISHED if published[0][name] != published[1][name]] == []


def test_no_published_byte_names_a_place_on_the_machine_where_the_run_was_made(tmp_path, monkeypatch):
    """All paths are absolute; of the images their kind, of the base its file's name, may be published."""
    places = {name: tmp_path / f"kept-in-{name}" for name in ("pictures", "bases", "results")}
    make_folder(places["pictures"] / "ward-7", classes=("cats", "dogs"))
    places["bases"].mkdir()
    base.save(places["bases"] / "colour.pt", tiny_unet(image_channels=3))
    code, _, err = finetune("--data", f"folder:{places['pictures'] / 'ward-7'}", "--classes", "cats,dogs",
                            "--size", 16, "--base", places["bases"] / "colour.pt", "--peek", 6,
                            "--data-dir", tmp_path / "data", "--out", places["results"] / "run", picture=True)
    assert code == 0, err
    published = files(places["results"] / "run")
    assert set(published) == {*PUBLISHED, "peek-00006.png"}
    config = json.loads(published["config.json"])
    assert (config["data"], config["base"], config["classes"]) == ("folder", "colour.pt", ["cats", "dogs"])
    for word in ("kept-in", "ward-7", str(tmp_path), tmp_path.name):
        for name, content in published.items():
            assert word.encode() not in content, f"{word} is in {name}"


def test_the_adapter_is_the_average_and_not_the_last_weights(monkeypatch):
    made, EMA = [], ddpm.EMA
    monkeypatch.setattr(ddpm, "EMA", lambda *a: made.append(EMA(*a)) or made[-1])
    seen = spied(monkeypatch)
    assert finetune("--out", "run")[0] == 0
    adapted = lora.split(lora.load(base.load(Path("base.pt")).model, Path("run")))[0]
    assert len(made) == 1 and made[0].updates == 6 and made[0].decay == train.EMA_DECAY
    assert all(torch.equal(p, made[0].shadow[name]) for name, p in adapted.items())
    assert any(not torch.equal(p, seen[-1][0][name]) for name, p in adapted.items())


def test_privacy_json_says_exactly_this(monkeypatch):
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)                         # whatever the bound is, it is stated
    s = train.check(train.Settings(N=400, B=40, steps=6, delta=1e-3, C=0.02, K=3))
    sigma = accountant.calibrate(10.0, 1e-3, Q, 6)
    rdp, order = accountant.epsilon(Q, sigma, 6, 1e-3)
    assert privacy_report.after(s, sigma, 6) == {
        "private": True, "epsilon": rdp, "delta": 1e-3,
        "neighbours": "add or remove one image", "unit_of_privacy": "one image",
        "N": 400, "B": 40, "q": 0.1, "C": 0.02, "K": 3, "sigma": sigma, "steps": 6,
        "mechanism": "Poisson-sampled Gaussian, one noise draw a step",
        "noise": "SHAKE-256 of a 256-bit secret key; float64 normals of at most 13.3 standard deviations "
                 "(Box & Muller), added to an exact sum, rounded to a fixed grid and to the weights' "
                 "precision",
        "accountant": "rdp", "epsilon_rdp": rdp, "epsilon_pld": pld.pld_epsilon(Q, sigma, 6, 1e-3),
        "best_order": order,
        "covers": "the finished run's folder: the adapter, tables and pictures, and every image ever drawn "
                  "with it",
        "does_not_cover": [
            "a person with several images: the unit is ONE image",
            "other runs on the same images: privacy losses add up (python accountant.py compose "
            "A/privacy.json ...)",
            "choices made by looking at the private images before the run, such as hyper-parameters tuned "
            "on them",
            "N, the names of the classes and the data set's existence: they are declared, and public",
            "figures computed from private images afterwards, such as the FID and nearest neighbours",
            "what the curator, who holds the images, sees: the screen, log, exit code, times of steps and "
            "of files",
            "a run that was not finished, or was continued twice: each continuation is another look at the "
            "images",
            "the network between the processes of a run: the key of the noise and sums without noise cross "
            "it",
            "attacks on the arithmetic (float64 noise is no exact Gaussian); whoever breaks SHAKE-256 or "
            "has its key",
            "rounding: on a GPU the last bits of latents and gradients may depend on other images, which "
            "epsilon ignores",
            "what the public base learnt: those that ship saw drawings made by code, ImageNet photographs, "
            "or both",
            "whoever can read checkpoint.pt, which holds a fingerprint of the private images, or the memory "
            "of the process (also in core files and swap), which holds the key",
            "a crash that depends on the batch (memory, time): --resume then draws that step's batch again"]}
    for public in (train.check(train.Settings(epsilon=float("inf"))), train.check(train.Settings(seed=0))):
        said = privacy_report.after(public, 0.0 if public.seed is None else 5.0, 110)
        assert (said["private"], said["covers"]) == (False, "nothing")


# --- what a step is made of

def test_a_step_runs_with_the_settings_that_are_stated_and_its_own_images_and_labels(monkeypatch):
    """One key of the operating system makes the lots and the noise; labels stay with their images."""
    asked, sampled, new_key, poisson_sample = [], [], train.new_key, dpsgd.poisson_sample
    monkeypatch.setattr(train, "new_key", lambda seed: asked.append((seed, new_key(seed))) or asked[-1][1])
    monkeypatch.setattr(dpsgd, "poisson_sample", lambda *a: sampled.append(a) or poisson_sample(*a))
    seen = spied(monkeypatch)
    assert finetune("--out", "run", "--C", 0.03, "--B", 37)[0] == 0      # q = 0.0925: no round number
    (seed, key), = asked
    own, numbers = secret.Secret(key), sum(p.numel() for p in seen[0][0].values())
    said = json.loads(Path("run", "privacy.json").read_text())
    assert seed is None and len(seen) == len(sampled) == said["steps"] == 6
    for step, ((_, (x0, labels, t, noise), how), (coins, q)) in enumerate(zip(seen, sampled), 1):
        assert torch.equal(coins, own.coins(step, IMAGES)) and q == said["q"]
        assert torch.equal(how["normals"], own.normals(step, numbers))
        assert (how["C"], how["sigma"], how["B"]) == (0.03, said["sigma"], said["B"]) and said["C"] == 0.03
        number = ((x0[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert number.tolist() == (coins < said["q"]).nonzero()[:, 0].tolist()
        own_label = labels == number % 10
        assert (own_label | (labels == 10)).all() and own_label.float().mean() > 0.5
        assert len(x0) == len(t) == len(noise)


@pytest.mark.parametrize("rate", [1, 0.5])
def test_a_lot_of_unbalanced_classes_beyond_B_is_summed_whole_with_weight_1_for_each_image(
        rate, monkeypatch):
    """200 images where 40 are declared, nine tenths of them of one class. The lot is all images whose coins
    are below q: none is cut off at B, no class is balanced, and no gradient is weighted by how rare its class
    is.
    """
    labels = torch.where(torch.arange(IMAGES) % 10 == 0, 1 + torch.arange(IMAGES) // 10 % 9, 0)
    images = data.load("mnist", "train", "data")[0]
    write_idx(Path("data"), images[:, 0].numpy(), labels.byte().numpy())
    N, B, C = 40, int(40 * rate), 0.02
    sums, own, sizes, plain, real = [], [], [], [], dpsgd.private_gradient
    make = train.per_image_gradients
    monkeypatch.setattr(train, "per_image_gradients", lambda *a: plain.append(make(*a)) or plain[-1])
    monkeypatch.setattr(dpsgd.distributed, "sum_over_ranks", lambda total: sums.append(total) or total)

    def spy(per_sample, params, examples, **how):
        """Each image's gradient, clipped by the formula, in float64."""
        total = {name: 0.0 for name in params}
        for start in range(0, len(examples[0]), 20):
            part = plain[0](params, *(e[start:start + 20] for e in examples))
            norms = torch.cat([g.flatten(1).double() for g in part.values()], dim=1).norm(dim=1)
            for name, g in part.items():
                clipped = g.flatten(1).double() / (norms / C).clamp(min=1)[:, None]
                total[name] = total[name] + clipped.sum(0).view(g.shape[1:])
        own.append(total)
        sizes.append(len(examples[0]))
        return real(per_sample, params, examples, **how)
    monkeypatch.setattr(dpsgd, "private_gradient", spy)
    code, _, err = finetune("--out", "run", "--N", N, "--B", B, "--steps", 2, "--seed", 5)
    assert code == 0, err
    coins = [secret.Secret(secret.new_key(5)).coins(step, IMAGES) for step in (1, 2)]
    assert sizes == [int((u < rate).sum()) for u in coins] and min(sizes) > 2 * B
    for total, expected in zip(sums, own):
        for name, g in total.items():
            torch.testing.assert_close(dpsgd.value(g, C), expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_an_empty_lot_is_not_drawn_again(tmp_path, monkeypatch):
    """Nor is a small one: the lots are those of the coins, of which most are empty with 3 images."""
    monkeypatch.chdir(make_place(tmp_path / "few", 3))
    seen, own = spied(monkeypatch), secret.Secret(secret.new_key(5))
    code, _, err = finetune("--out", "run", "--seed", 5)
    assert code == 0, err
    sizes = [len(examples[0]) for _, examples, _ in seen]
    assert sizes == [int((own.coins(step, 3) < Q).sum()) for step in range(1, 7)] and sizes.count(0) > 2


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


def test_the_lots_of_two_ranks_together_are_the_lot_of_one_and_draws_of_t_are_in_common(monkeypatch):
    """One Poisson lot, whatever the number of ranks: no image is in two shares and no coin is used twice."""
    keys, streams = set(), draws.streams
    monkeypatch.setattr(draws, "streams", lambda *a: keys.add(int(a[0])) or streams(*a))
    alone, parts = [lot for lot, _ in watch("alone", "--seed", 3)], []
    for rank in (0, 1):
        on_rank(monkeypatch, rank)
        parts.append([lot for lot, _ in watch(f"rank-{rank}", "--seed", 3)])
    assert [sorted(one + other) for one, other in zip(*parts)] == alone and keys == {3}


def test_all_ranks_start_from_rank_0s_factors_and_keys(monkeypatch):
    """Rank 0's factors A, key of the draws and key of lots and noise; its own are of no use to a rank."""
    def marked(tensors):
        assert tensors["key"].dtype == torch.int64
        for p in tensors.values():
            p.data.fill_(1)
    asked, streams, the_first = [], draws.streams, bytes(range(secret.KEY_BYTES))
    monkeypatch.setattr(draws, "streams", lambda *a: asked.append(int(a[0])) or streams(*a))
    monkeypatch.setattr(train.distributed, "same_everywhere", marked)
    monkeypatch.setattr(train.distributed, "bytes_of_the_first", lambda own: the_first)
    seen = spied(monkeypatch)
    assert finetune("--out", "run")[0] == 0
    assert set(asked) == {1} and all((p == 1).all() for p in seen[0][0].values())
    normals = [how["normals"] for _, _, how in seen]
    assert all(torch.equal(z, secret.Secret(the_first).normals(i, len(z))) for i, z in enumerate(normals, 1))


def test_ranks_compare_what_the_rounding_of_a_gradient_depends_on(monkeypatch):
    """Where the first image is taken out, all others move to another rank, which must have the same bits."""
    compared = []
    monkeypatch.setattr(train.distributed, "agree", compared.append)
    assert finetune("--out", "run", "--steps", 1)[0] == 0
    kind = devices.kind(torch.device("cpu"))
    assert kind.items() <= compared[0].items() and compared[0]["code"] == runs.code()
    assert {"device", "bfloat16", "torch", "build", "processor", "capability", "threads"} <= kind.keys()


def test_a_run_goes_on_only_by_the_code_that_began_it(monkeypatch):
    """Its report describes the noise of today's code, and would say so of the steps before, too."""
    stopped("run")
    monkeypatch.setattr(runs, "code", lambda: "another version")
    code, _, err = finetune("--out", "run", "--resume")
    assert code == 2 and "code has changed" in err and "same version" in err, err


@pytest.mark.parametrize("name", runs.STEP)
def test_the_code_of_a_step_is_all_of_its_files(name, tmp_path, monkeypatch):
    for other in runs.STEP:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes((ROOT / other).read_bytes())
    before = runs.code()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.code() == before
    with open(tmp_path / name, "a") as file:
        file.write("\n")
    assert runs.code() != before


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("fault", [0, 1e-6])
def test_a_run_keeps_its_threads_only_if_an_images_place_changes_no_bit(fault, three_threads, monkeypatch):
    """It is found out with noise in place of an image, and a network whose adapters are not 0."""
    real, seen = dpsgd.per_sample_grads_by_copies, []

    def by_place(losses, params, x0, *rest):
        seen.append((params, x0, torch.get_num_threads()))
        place = torch.arange(len(x0))
        return {name: g + fault * place.view(-1, *[1] * (g.ndim - 1))
                for name, g in real(losses, params, x0, *rest).items()}
    monkeypatch.setattr(dpsgd, "per_sample_grads_by_copies", by_place)
    code, _, err = finetune("--out", "run", "--steps", 1)
    assert code == 0, err
    (params, x0, before), (_, _, after) = seen[:2]
    assert (before, after) == (3, 1 if fault else 3) and ("one thread" in err) == bool(fault)
    assert torch.equal(x0, x0[:1].expand_as(x0)) and x0.min() < -1, "no image has such values"
    assert all(p.abs().max() > 0 for p in params.values()) and len(x0) % 3 == 0


@pytest.mark.parametrize("found, expected", [([0.0, 0.0], 3), ([0.0, 1e-9], 1)])
def test_several_threads_stay_only_if_equal_examples_get_equal_rows(found, expected, three_threads):
    devices.one_thread_unless_equal(torch.device("cpu"), lambda: [torch.ones(2, 4), torch.tensor(found)])
    assert torch.get_num_threads() == expected
    devices.one_thread_unless_equal(torch.device("meta"), lambda: pytest.fail("no CPU"))


@pytest.mark.parametrize("hardware, pixels, latents", [
    ("units", "bfloat16", "bfloat16"), ("instructions", "bfloat16", "float32"), ("", "float32", "float32")])
def test_the_precision_follows_from_hardware_and_network_and_a_flag_comes_first(hardware, pixels, latents,
                                                                                monkeypatch):
    monkeypatch.setattr(devices, "hardware", lambda device: hardware)
    cpu = torch.device("cpu")
    for patch, expected in ((2, pixels), (1, latents)):
        network = unet.UNet(channels=16, patch=patch)
        assert devices.precision(cpu, network) == expected
        for asked in ("float32", "bfloat16"):
            assert devices.precision(cpu, network, asked) == asked
            with devices.autocast(cpu, network, asked):
                assert torch.is_autocast_enabled("cpu") == (asked == "bfloat16")


def test_the_precision_is_written_down_and_a_resumed_run_keeps_it():
    stopped("run", "--precision", "float32")
    code, _, err = finetune("--out", "run", "--precision", "bfloat16", "--resume")
    assert code == 2 and "precision: 'float32' then, 'bfloat16' now" in err
    assert finetune("--out", "run", "--precision", "float32", "--resume")[0] == 0
    assert json.loads(Path("run/config.json").read_text())["precision"] == "float32"


def test_the_factors_A_start_from_bytes_that_private_images_have_no_part_in(tmp_path, monkeypatch):
    """Two data sets with nothing in common, one seed: the same start. One made of images would be a leak."""
    starts = []
    for images in (IMAGES, 7):
        monkeypatch.chdir(make_place(tmp_path / str(images), images, seed=images))
        seen = spied(monkeypatch)
        code, _, err = finetune("--out", "run", "--seed", 5, "--steps", 1)
        assert code == 0, err
        starts.append({name: p.numpy().tobytes() for name, p in seen[0][0].items()})
    assert any(name.endswith("lora_A") for name in starts[0]) and starts[0] == starts[1]


# --- stopped, killed, resumed

def stopped(out="run", *flags):
    with stop_after(3):
        assert finetune("--out", out, *flags)[0] == 1


def exchange_the_base():
    base.save(Path("base.pt"), tiny_unet(seed=1))


def exchange_two_labels():
    images, labels = data.load("mnist", "train", "data")
    labels[[3, 4]] = labels[[4, 3]]                                      # the images, and the counts, stay
    write_idx(Path("data"), images[:, 0].numpy(), labels.byte().numpy())


def add_an_image():
    shutil.rmtree("data")
    make_place(Path("."), IMAGES + 1)


@pytest.mark.parametrize("exchange, changed", [
    (exchange_the_base, "base"), (exchange_two_labels, "private_images"), (add_an_image, "private_images")],
    ids=["base", "labels", "images"])
def test_a_run_does_not_go_on_with_other_weights_images_or_labels_under_the_same_name(exchange, changed):
    """One run is one mechanism. What differs is named; no fingerprint of private images is shown."""
    stopped()
    before = Path("run", "checkpoint.pt").read_bytes()
    exchange()
    code, _, err = finetune("--out", "run", "--resume")
    assert code == 2 and f"({changed} has changed)" in err and err.count("\n") == 1, err
    assert torch.load("run/checkpoint.pt", weights_only=True)["settings"][changed] not in err
    assert Path("run", "checkpoint.pt").read_bytes() == before


def test_a_resumed_run_draws_from_the_key_it_had(monkeypatch):
    """Or t and noise of the later steps would be others; no seed, so that a new key would be another one."""
    asked, streams = [], draws.streams
    monkeypatch.setattr(draws, "streams", lambda *a: asked.append((int(a[0]), a[1])) or streams(*a))
    stopped()
    assert finetune("--out", "run", "--resume")[0] == 0
    assert [step for _, step in asked] == [1, 2, 3, 4, 5, 6] and len({key for key, _ in asked}) == 1


def test_two_continuations_of_one_private_checkpoint_have_neither_lots_nor_noise_in_common():
    """With the same noise on other lots, the difference of the two folders would have no noise at all."""
    stopped()
    shutil.copytree("run", "copy")
    one, other = watch("run", "--resume"), watch("copy", "--resume")
    assert len(one) == len(other) == 3
    for (lot, noise), (lot2, noise2) in zip(one, other):
        assert lot != lot2
        z, z2 = (torch.cat([g.flatten() for g in x.values()]) for x in (noise, noise2))
        assert not (z == z2).any() and abs(torch.corrcoef(torch.stack([z, z2]))[0, 1]) < 5.5 / len(z) ** 0.5


def test_a_private_run_goes_on_with_noise_of_its_steps_and_weights_of_its_checkpoint():
    """The ledger goes on at the step after the last one saved: none is left out, none is counted twice."""
    stopped()
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert saved["step"] == 3 and finetune("--out", "run", "--resume")[0] == 0
    rows = [line.split(",")[0] for line in Path("run", "metrics.csv").read_text().splitlines()[1:]]
    assert rows == ["1", "2", "3", "4", "5", "6"]
    assert json.loads(Path("run", "privacy.json").read_text())["private"] is True


def test_seed_0_is_a_seed():
    """It makes the run reproducible and not private, as any other seed does; `if seed:` would not see it."""
    for out, seed in (("one", 0), ("other", 0), ("third", 1)):
        code, said, err = finetune("--out", out, "--seed", seed)
        assert code == 0 and "NOT PRIVATE" in said, err
        said = json.loads(Path(out, "privacy.json").read_text())
        assert (said["private"], said["covers"]) == (False, "nothing")
    assert files("one") == files("other")
    assert files("one")["adapter_model.bin"] != files("third")["adapter_model.bin"]


@pytest.mark.parametrize("before, now", [(None, 0), (0, None), (0, 1)])
def test_a_run_does_not_go_on_with_another_seed(before, now):
    """Half a run with a seed is no private run; half a seeded run without it is not reproducible."""
    flags = {None: (), 0: ("--seed", 0), 1: ("--seed", 1)}
    stopped("run", *flags[before])
    code, _, err = finetune("--out", "run", "--resume", *flags[now])
    assert code == 2 and f"(seed: {before} then, {now} now)" in err and err.count("\n") == 1, err
    assert not Path("run", "privacy.json").exists()
    assert finetune("--out", "run", "--resume", *flags[before])[0] == 0


def test_the_checkpoint_holds_the_key_of_the_draws_and_not_the_secret_key(monkeypatch):
    """Who reads it, now or on an old disk, cannot compute the noise of the steps that were published."""
    keys, new_key = [], train.new_key
    monkeypatch.setattr(train, "new_key", lambda seed: keys.append(new_key(seed)) or keys[-1])
    stopped()
    held, path = Path("run", "checkpoint.pt").read_bytes(), Path("run", "checkpoint.pt")
    (key,), state = keys, torch.load(path, weights_only=True)
    assert len(key) == secret.KEY_BYTES
    as_bytes, as_list = key.decode("latin1").encode(), b"".join(b"K%c" % byte for byte in key)   # as pickled
    for form in (key, key[::-1], key.hex().encode(), as_bytes, as_list, key[:8], key[-8:]):
        assert form not in held
    assert state["key"].numpy().tobytes() in held, "what is held is found by its bytes"
    assert set(state) == {"settings", "step", "metrics", "trainable", "average", "optimizer", "key"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_checkpoint_is_overwritten_before_it_is_removed(monkeypatch):
    """A second name of the same file shows what is left on the disk."""
    shred, held = checkpoint.shred, []

    def watched(path):
        os.link(path, "second-name")
        held.append(Path(path).read_bytes())
        shred(path)
    monkeypatch.setattr(checkpoint, "shred", watched)
    assert finetune("--out", "run")[0] == 0
    assert not Path("run", "checkpoint.pt").exists() and any(held[0])
    assert Path("second-name").read_bytes() == bytes(len(held[0]))


def killed_while_removing(monkeypatch, how_far: str):
    """A run that is killed between privacy.json and the removal of its checkpoint, or in the midst of it."""
    class Killed(BaseException):
        pass
    real = checkpoint.shred

    def kill(path):
        if how_far == "overwritten":                                     # in part: the first page
            Path(path).write_bytes(bytes(4096) + Path(path).read_bytes()[4096:])
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "shred", kill)
        with pytest.raises(Killed):
            finetune("--out", "run")
    assert checkpoint.shred is real and Path("run", "privacy.json").exists()


@pytest.mark.parametrize("when", ["after three steps", "after privacy.json", "overwritten"])
def test_a_folder_with_a_checkpoint_is_refused_by_its_readers_and_finished_by_resume(when, monkeypatch):
    """In one line that says what to do. What was written before is what is there in the end."""
    if when == "after three steps":
        stopped()
    else:
        killed_while_removing(monkeypatch, when)
    before = files("run")
    for main, flags in ((sample.main, ["--n", 1, "--out", "x.png"]),
                        (evaluate.main, ["--fast", "--data", "mnist", "--data-dir", "data"])):
        code, said, err = call(main, "run", *flags)
        assert code == 2 and "run is not finished" in err and "--resume" in err and err.count("\n") == 1, err
        assert files("run") == before and not Path("x.png").exists()
    code, _, err = finetune("--out", "run", "--resume")
    if when == "overwritten":
        assert code == 2 and "the run is finished" in err and err.count("\n") == 1, err
    else:
        assert code == 0, err
    assert set(files("run")) == set(PUBLISHED) - {"samples.png"}
    if when != "after three steps":
        del before["checkpoint.pt"]
        assert files("run") == before, "not a step was taken again"
    code, _, err = call(sample.main, "run", "--n", 1, "--steps", 1, "--out", "x.png")
    assert code == 0 and Path("x.png").exists(), err


@pytest.mark.parametrize("seconds, steps", [(40.0, [2, 4, 5]), (70.0, [1, 2, 3, 4, 5]), (1.0, [5])])
def test_a_slow_run_of_few_steps_saves_every_minute(seconds, steps, monkeypatch):
    """A crash costs a minute of work or SAVE_EVERY steps, whatever is less."""
    saved, save = [], checkpoint.save
    monkeypatch.setattr(helpers, "QUICK", [quick for quick in helpers.QUICK if quick[1] != "SAVE_EVERY"])
    assert checkpoint.SAVE_EVERY > 5 and 40 < checkpoint.SECONDS < 70
    seen = spied(monkeypatch)
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=lambda: seconds * len(seen)))
    monkeypatch.setattr(checkpoint, "save", lambda path, state, *a, **how: (
        saved.append(state.get("step")), save(path, state, *a, **how)))
    code, _, err = finetune("--out", "run", "--steps", 5)
    assert code == 0 and saved[:-1] == steps, err                        # the last is the adapter
    assert saved[-1] is None


def test_a_strip_is_shown_only_of_a_step_that_is_saved(monkeypatch):
    """So that what was shown is on the path that --resume goes on with, even after kill -9."""
    saved, strips, save = [], [], checkpoint.save

    def watched(path, state, **how):
        saved.append(state.get("step"))
        save(path, state, **how)
    monkeypatch.setattr(helpers, "QUICK", [quick for quick in helpers.QUICK if quick[1] != "SAVE_EVERY"])
    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(sample, "class_strip", lambda run, path: strips.append((path.name, saved[-1])))
    assert finetune("--out", "run", "--peek", 3)[0] == 0
    assert strips == [("peek-00003.png", 3), ("peek-00006.png", 6)] and 1 not in saved


@pytest.mark.parametrize("mine", ["metrics.csv", "samples.png", "adapter_config.json", "neighbours.png",
                                  "evaluation.json"])
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
    monkeypatch.setattr(privacy_report, "after", broken)
    code, _, err = finetune("--out", "run")
    assert code != 0 and "spent epsilon = 12 > promised 10" in err and "another rank" not in err, err


def test_an_unanswered_collective_is_a_lost_rank(monkeypatch):
    def unanswered(*_, **__):
        raise ConnectionError("an all-reduce that nobody answered")
    monkeypatch.setattr(dpsgd, "private_gradient", unanswered)
    code, _, err = finetune("--out", "run")
    assert code == 1 and "another rank died" in err and "Traceback" not in err, err
