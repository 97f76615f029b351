"""Tests of what goes wrong: bad input, a full disk, Ctrl-C, kill -9, an image whose loss is no number.

A refusal is exit code 2 and ONE line on stderr that says what was got and what was expected, and nothing on
the disk has changed. `tests/faults/kill.py --kills 20` is the long version of the kill test here.
"""
import contextlib
import gzip
import json
import math
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import accountant
import base
import ddpm
import dpsgd
import lora
import pretrain
import sample
import train
from conftest import ROOT, tiny_unet
from helpers import N, PUBLISHED, Code, call, finetune, make_folder, make_place, stop_after, write_idx
from machinery import checkpoint, draws, screen
from machinery.secret import Secret
from support import runs

PRETRAIN = "--steps 2 --batch 4 --out new.pt --device cpu".split()
SAMPLE = "--n 2 --steps 2 --out new.png --device cpu".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a finished run, one stopped after step 3, and every kind of broken file."""
    world = make_place(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(world)
        with stop_after(3):
            assert finetune("--out", "stopped", "--seed", 4)[0] == 1
        assert finetune("--out", "finished", "--seed", 4, picture=True)[0] == 0
    make_place(world / "elsewhere", seed=1)                              # other images, and another base
    torch.manual_seed(1)
    base.save(world / "other-base.pt", tiny_unet(seed=1))

    images, labels = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
    for name in ("truncated", "unlabelled", "unequal", "too-many-classes", "not-gzip"):
        shutil.copytree(world / "data", world / name)
    (world / "truncated" / images).write_bytes((world / "data" / images).read_bytes()[:3000])
    (world / "unlabelled" / labels).unlink()
    (world / "not-gzip" / images).write_bytes(gzip.decompress((world / "data" / images).read_bytes()))
    write_idx(world / "unequal", np.zeros((7, 8, 8), np.uint8), np.zeros(6, np.uint8))
    write_idx(world / "too-many-classes", np.zeros((200, 8, 8), np.uint8), np.arange(200, dtype=np.uint8))

    good = (world / "base.pt").read_bytes()
    (world / "half.pt").write_bytes(good[:len(good) // 2])
    (world / "empty.pt").write_bytes(b"")
    (world / "code.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    saved = torch.load(world / "base.pt", weights_only=True)
    torch.save(dict(saved, config=dict(saved["config"], channels=16)), world / "other-shape.pt")
    torch.save([1, 2, 3], world / "list.pt")
    (world / "notes.txt").write_text("not a folder")

    make_folder(world / "colour", sizes=((40, 30), (32, 32)))
    make_folder(world / "unreadable", sizes=((40, 30), (32, 32)))
    (world / "unreadable" / "dogs" / "1.png").write_bytes(b"no picture")
    (world / "no-pictures" / "cats").mkdir(parents=True)
    base.save(world / "colour.pt", tiny_unet(image_channels=3))
    make_folder(world / "wild", sizes=((40, 30),), classes=("cats", "wolves"))
    base.save(world / "named.pt", named_unet(["cats", "dogs", "birds"]))
    np.savez(world / "other.npz", pictures=np.zeros(3))
    np.savez(world / "colour.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    np.savez(world / "last.npz", images=np.zeros((9, 8, 8, 3), np.uint8))
    (world / "used").mkdir()
    (world / "used" / ".in-use").write_text(f"process {os.getppid()} on {socket.gethostname()}")

    checkpoints = (("garbage", b"garbage"), ("code", pickle.dumps(Code(), protocol=2)), ("half", None))
    for name, content in checkpoints:
        (world / f"stopped-{name}").mkdir()
        whole = (world / "stopped" / "checkpoint.pt").read_bytes()
        (world / f"stopped-{name}" / "checkpoint.pt").write_bytes(content or whole[:len(whole) // 2])
    for name in ("no-adapter", "garbage-adapter", "code-adapter", "other-adapter", "lost-base",
                 "swapped-base", "no-json", "no-side"):
        shutil.copytree(world / "finished", world / name)
    config = json.loads((world / "finished" / "config.json").read_text())
    (world / "no-adapter" / "adapter_model.bin").unlink()
    (world / "garbage-adapter" / "adapter_model.bin").write_bytes(b"garbage")
    (world / "code-adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Code(), protocol=2))
    (world / "other-adapter" / "adapter_config.json").write_text("{}")
    (world / "lost-base" / "config.json").write_text(json.dumps(config | dict(base="lost.pt")))
    (world / "swapped-base" / "config.json").write_text(json.dumps(config | dict(base="other-base.pt")))
    (world / "no-json" / "config.json").write_text("{")
    (world / "no-side" / "config.json").write_text(json.dumps(dict(base="base.pt")))
    return world


def named_unet(names):
    model = tiny_unet(classes=len(names), image_channels=3)
    model.config["names"] = names
    return model


def snapshot(folder) -> dict[str, bytes | None]:
    """Every file's bytes and every folder's existence."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}


# program, flags (later ones win over the good ones), what was got, what was expected
REFUSED = [
    ("train", "--epsilon 0", "--epsilon 0", "above 0, or inf"),
    ("train", "--epsilon -1", "--epsilon -1", "above 0, or inf"),
    ("train", "--epsilon nan", "--epsilon nan", "above 0, or inf"),
    ("train", "--epsilon ten", "'ten'", "float"),
    ("train", "--epsilon 1e-9 --delta 1e-30", "epsilon = 1e-09", "ask for more"),
    ("train", "--delta 0", "--delta 0", "above 0"),
    ("train", "--delta 1", "--delta 1", "below 1/N"),
    ("train", "--delta nan", "--delta nan", "below 1/N"),
    ("train", "--delta 0.0025", "--delta 0.0025", "below 1/N = 0.0025"),
    ("train", "--B 0", "--B 0", "at least 1"),
    ("train", "--B -4", "--B -4", "at least 1"),
    ("train", "--B 401", "--B 401", "at most N = 400"),
    ("train", "--B 1.5", "'1.5'", "int"),
    ("train", "--N -3", "--N -3", "the declared number"),
    ("train", "--N 0 --data folder:colour", "--N 0", "at least 1"),
    ("train", "--K 0", "--K 0", "at least 1"),
    ("train", "--rank 0", "--rank 0", "at least 1"),
    ("train", "--rank 17", "17", "1 to 16"),
    ("train", "--C 0", "--C 0", "above 0"),
    ("train", "--C -1", "--C -1", "above 0"),
    ("train", "--C 1e-41", "--C 1e-41", "1e-40 to 1e30"),
    ("train", "--C 1e31", "--C 1e+31", "1e-40 to 1e30"),
    ("train", "--C nan", "--C nan", "above 0"),
    ("train", "--C inf", "--C inf", "--epsilon inf"),
    ("train", "--steps 0", "--steps 0", "at least 1"),
    ("train", "--steps 1e3", "'1e3'", "int"),
    ("train", "--lr 0", "--lr 0", "above 0"),
    ("train", "--lr nan", "--lr nan", "above 0"),
    ("train", "--lr inf", "--lr inf", "above 0"),
    ("train", "--chunk 0", "--chunk 0", "at least 1"),
    ("train", "--seed -1", "--seed -1", "0 to 2^32 - 1"),
    ("train", "--seed 4294967296", "--seed 4294967296", "0 to 2^32 - 1"),
    ("train", "--seed x", "'x'", "int"),
    ("train", "--size 4", "--size 4", "at least 8"),
    ("train", "--peek -1", "--peek -1", "at least 0"),
    ("train", "--speed 3", "--speed 3", "unrecognized arguments"),
    ("train", "--draws late", "--draws late", "paper, middle, even, middle-even"),
    ("train", "--accountant gdp", "--accountant gdp", "rdp, pld"),
    ("train", "--train everything", "everything", "lora, lora+embed, lora+conv, attention, full"),
    ("train", "--device tpu", "'tpu'", "cpu"),
    ("train", "--device cpu:x", "'cpu:x'", "cpu"),
    ("train", "--device cpu:", "'cpu:'", "cpu"),
    ("train", "--device cpu:999", "'cpu:999'", "cpu"),
    ("train", "--start mean", "--start mean", "a base in latents"),
    ("train", "--data mnits", "mnits", "mnist, fashion-mnist"),
    ("train", "--data-dir nowhere", "nowhere", "expected"),
    ("train", "--data-dir notes.txt", "notes.txt", "expected"),
    ("train", "--data-dir truncated", "truncated/train-images", "fetch it again"),
    ("train", "--data-dir not-gzip", "not-gzip/train-images", "fetch it again"),
    ("train", "--data-dir unlabelled", "unlabelled/train-labels", "expected"),
    ("train", "--data-dir unequal", "7 images but 6 labels", "fetch the files again"),
    ("train", "--classes cats,dogs --data folder:colour", "3 channels", "expected grey, 1 channel"),
    ("train", "--classes cats,dogs --data folder:unreadable --base colour.pt",
     "unreadable/dogs/1.png", "remove or replace it"),
    ("train", "--classes cats,dogs --data folder:no-pictures --base colour.pt",
     "no-pictures", "PATH/class/image.png"),
    ("train", "--classes cats,dogs --data folder:nowhere --base colour.pt",
     "nowhere", "PATH/class/image.png"),
    ("train", "--classes cats,dogs --data folder:notes.txt --base colour.pt",
     "notes.txt", "PATH/class/image.png"),
    ("train", "--classes cats,dogs --data folder:colour --base colour.pt --size 18",
     "side 18", "a side that 4 divides"),
    ("train", "--classes cats,dogs --data folder:colour --base colour.pt --size 9",
     "side 9", "a side that 4 divides"),
    ("train", "--data folder:colour", "--data folder:colour", "--classes NAME,NAME"),
    ("train", "--data folder:colour --classes cats", "sub-folders dogs", "declared classes cats"),
    ("train", "--data folder:colour --classes cats,cats", "--classes cats,cats", "different names"),
    ("train", "--data folder:colour --base named.pt --classes cats,wolves",
     "cats, wolves", "cats, dogs, birds"),
    ("train", "--data folder:colour --base named.pt --classes a,b,c,d", "a, b, c, d", "at most 3 new ones"),
    ("train", "--data folder:wild --base named.pt",
     "sub-folders wolves", "declared classes cats, dogs, birds"),
    ("train", "--classes 0,1", "--classes 0,1", "folder: or npz:"),
    ("train", "--data npz:lost.npz", "lost.npz is missing", "train_images"),
    ("train", "--data npz:notes.txt", "notes.txt", "train_images"),
    ("train", "--data npz:other.npz", "other.npz has the arrays pictures", "train_images"),
    ("train", "--data npz:colour.npz --size 8", "3 channels", "expected 1 channels"),
    ("train", "--data npz:last.npz", "channels come first", "transpose(0, 3, 1, 2)"),
    ("train", "--out used", "used is in use by process", "choose another place"),
    ("train", "--resume --out used", "used is in use by process", "choose another place"),
    ("train", "--delta 1e-320", "--delta 1e-320", "at least 1e-300"),
    ("train", "--base lost.pt", "lost.pt", "pretrain.py"),
    ("train", "--base data", "data", "pretrain.py"),
    ("train", "--base half.pt", "half.pt", "expected a file written by"),
    ("train", "--base empty.pt", "empty.pt", "expected a file written by"),
    ("train", "--base list.pt", "list.pt", "expected a file written by"),
    ("train", "--base other-shape.pt", "other-shape.pt", "expected a file written by"),
    ("train", "--base notes.txt", "notes.txt", "expected a file written by"),
    ("train", "--base code.pt", "code.pt", "expected a file written by"),
    ("train", "--out finished", "finished already holds a run", "choose another --out"),
    ("train", "--out stopped", "stopped already holds a run", "--resume goes on with it"),
    ("train", "--out notes.txt", "notes.txt", "expected"),
    ("train", "--out notes.txt/run", "notes.txt/run", "expected"),
    ("train", "--out /proc/run", "/proc/run", "expected"),
    ("train", "--resume", "nothing to resume", "run/checkpoint.pt"),
    ("train", "--resume --out finished", "nothing to resume", "a finished run deletes its checkpoint"),
    ("train", "--resume --out stopped --epsilon 20", "epsilon: 10.0 then, 20.0 now", "the same flags"),
    ("train", "--resume --out stopped --B 30", "B: 40 then, 30 now", "the same flags"),
    ("train", "--resume --out stopped --N 500", "N: 400 then, 500 now", "the same flags"),
    ("train", "--resume --out stopped --C 0.2", "C: 0.02 then, 0.2 now", "the same flags"),
    ("train", "--resume --out stopped --K 2", "K: 1 then, 2 now", "the same flags"),
    ("train", "--resume --out stopped --steps 9", "steps: 6 then, 9 now", "the same flags"),
    ("train", "--resume --out stopped --rank 3", "rank: 2 then, 3 now", "the same flags"),
    ("train", "--resume --out stopped --train full", "train: 'lora' then, 'full' now", "the same flags"),
    ("train", "--resume --out stopped --data-dir elsewhere/data", "private_images", "the same flags"),
    ("train", "--resume --out stopped --base other-base.pt", "base", "the same flags"),
    ("train", "--resume --out stopped-garbage", "stopped-garbage/checkpoint.pt", "nothing was changed"),
    ("train", "--resume --out stopped-half", "stopped-half/checkpoint.pt", "nothing was changed"),
    ("train", "--resume --out stopped-code", "stopped-code/checkpoint.pt", "nothing was changed"),
    ("pretrain", "--steps 0", "--steps 0", "at least 1"),
    ("pretrain", "--batch 0", "--batch 0", "at least 1"),
    ("pretrain", "--batch many", "'many'", "int"),
    ("pretrain", "--lr 0", "--lr 0", "above 0"),
    ("pretrain", "--lr nan", "--lr nan", "above 0"),
    ("pretrain", "--seed -1", "--seed -1", "0 to 2^32 - 1"),
    ("pretrain", "--epsilon 1", "--epsilon 1", "unrecognized arguments"),
    ("pretrain", "--device tpu", "'tpu'", "cpu"),
    ("pretrain", "--unet imagenet", "--unet imagenet", "small, photos"),
    ("pretrain", "--data mnits", "--data mnits", "glyphs, clothes, smears, faces, mnist"),
    ("pretrain", "--draws late", "--draws late", "paper, middle, even, middle-even"),
    ("pretrain", "--data folder:colour", "3 channels", "expected grey, 1 channel"),
    ("pretrain", "--data folder:nowhere --out new/base.pt", "folder:nowhere", "PATH/class/image.png"),
    ("pretrain", "--base lost.pt", "lost.pt", "pretrain.py"),
    ("pretrain", "--mix mnist --data-dir data", "--mix mnist", "the same shape"),
    ("pretrain", "--data glyphs --flip", "--flip", "images on disk"),
    ("pretrain", "--size 7", "--size 7", "at least 8"),
    ("pretrain", "--crop 16", "--crop 16", "`python pretrain.py autoencoder`"),
    ("pretrain", "autoencoder --flip", "--flip True", "`python pretrain.py`"),
    ("pretrain", "autoencoder --data folder:colour --crop 10", "--crop 10", "a multiple of 4"),
    ("pretrain", "--autoencoder lost.pt", "lost.pt", "pretrain.py autoencoder"),
    ("pretrain", "--autoencoder base.pt", "base.pt holds no autoencoder", "pretrain.py autoencoder"),
    ("pretrain", "--resume", "nothing to resume", "new.pt.checkpoint"),
    ("pretrain", "--out data", "--out data", "choose another --out"),
    ("pretrain", "--out base.pt", "--out base.pt exists", "choose another --out"),
    ("pretrain", "--out notes.txt/base.pt", "notes.txt", "expected"),
    ("pretrain", "--out /proc/base.pt", "/proc", "expected"),
    ("sample", "no-run", "no-run", "written by train.py"),
    ("sample", "data", "data", "written by train.py"),
    ("sample", "no-json", "no-json", "written by train.py"),
    ("sample", "no-side", "no-side", "written by train.py"),
    ("sample", "no-adapter", "adapter_model.bin is missing", "train.py"),
    ("sample", "garbage-adapter", "garbage-adapter", "train it again"),
    ("sample", "code-adapter", "code-adapter", "train it again"),
    ("sample", "other-adapter", "other-adapter", "train it again"),
    ("sample", "lost-base", "lost.pt", "pretrain.py"),
    ("sample", "swapped-base", "other-base.pt is not the base", "expected the one whose weights have"),
    ("sample", "finished --n 0", "--n 0", "at least 1"),
    ("sample", "finished --n many", "'many'", "int"),
    ("sample", "finished --batch 0", "--batch 0", "at least 1"),
    ("sample", "finished --steps 0", "--steps 0", "1 to 1000"),
    ("sample", "finished --steps 1001", "--steps 1001", "1 to 1000"),
    ("sample", "finished --eta -1", "--eta -1", ">= 0"),
    ("sample", "finished --eta nan", "--eta nan", ">= 0"),
    ("sample", "finished --threshold 256", "--threshold 256", "0 to 255"),
    ("sample", "finished --guidance -1", "--guidance -1", ">= 0"),
    ("sample", "finished --guidance nan", "--guidance nan", ">= 0"),
    ("sample", "finished --guidance inf", "--guidance inf", ">= 0"),
    ("sample", "finished --sampler euler", "--sampler euler", "ddim, ddpm, dpm"),
    ("sample", "finished --base lost.pt", "lost.pt", "pretrain.py"),
    ("sample", "finished --base other-base.pt", "other-base.pt is not the base", "the one whose weights"),
    ("sample", "stopped", "stopped is not finished", "train.py --resume"),
    ("sample", "finished --seed 36893488147419103232", "36893488147419103232", "expected"),
    ("sample", "finished --device tpu", "'tpu'", "cpu"),
    ("sample", "finished --out nowhere/grid.png", "nowhere/grid.png", "no folder"),
    ("sample", "finished --out notes.txt/grid.png", "notes.txt/grid.png", "no folder"),
    ("sample", "finished --out data", "data", "cannot write"),
    ("sample", "finished --out /proc/grid.png", "cannot write in /proc", "expected a folder"),
    ("sample", "finished --out grid.xyz", "grid.xyz", ".png"),
    ("sample", "finished --npz /proc/s.npz", "cannot write in /proc", "expected a folder"),
    ("sample", "finished --npz data", "cannot write data", "expected a file"),
]


def no_network(*_, **__):
    raise urllib.error.URLError("no network in the tests")


@pytest.mark.parametrize("program, flags, got, expected", REFUSED,
                         ids=[f"{p} {flags}" for p, flags, *_ in REFUSED])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(program, flags, got, expected, world,
                                                                 monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(screen, "PATIENCE", 600)                         # seconds: the machine may be busy
    before, flags = snapshot(world), flags.split()
    if program == "sample":
        code, _, err = call(sample.main, flags[0], *SAMPLE, *flags[1:])
    elif program == "pretrain":
        stage = flags[:flags[0] == "autoencoder"]
        code, _, err = call(pretrain.main, *stage, *PRETRAIN, *flags[len(stage):])
    else:
        code, _, err = finetune("--out", "run", *flags)
    after = snapshot(world)
    changed = {name for name in after.keys() | before.keys()
               if name not in after or before.get(name, 0) != after[name]}
    for name in changed - before.keys():                                 # the next input finds a clean world
        shutil.rmtree(world / name) if (world / name).is_dir() else (world / name).unlink(missing_ok=True)
    assert code == 2, err or "it was accepted"
    refusals = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(refusals) == 1 and got in refusals[0] and expected in refusals[0], err
    fingerprints = [word for word in err.split() if len(word.strip("'")) == 64]
    assert not fingerprints, f"a fingerprint of private images: {err}"
    assert not changed, f"written or changed: {sorted(changed)}"


def test_a_refusal_is_the_same_from_a_shell(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--epsilon", "0"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("train.py: --epsilon 0.0: expected") and not list(tmp_path.iterdir())


def test_without_a_network_the_missing_data_are_named_in_one_line(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    code, _, err = finetune("--out", tmp_path / "run", "--data-dir", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and str(tmp_path) in err and "pass --data-dir" in err, err


@pytest.mark.parametrize("steps", [1, 20])
def test_pretraining_of_any_length_ends(steps, tmp_path):
    """20 steps: 5% of them are one, a warm-up of zero length."""
    code, _, err = call(pretrain.main, *PRETRAIN, "--steps", steps, "--out", tmp_path / "base.pt")
    assert code == 0 and base.load(tmp_path / "base.pt").model, err


# --- interrupted

def test_a_run_killed_at_random_moments_ends_as_if_it_never_was():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "faults" / "kill.py"), "--kills", "2"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "bit for bit" in done.stdout, done.stdout + done.stderr


def test_ctrl_c_saves_says_the_epsilon_spent_and_is_resumed(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    out = tmp_path / "run"
    with stop_after(3):                                                  # SAVE_EVERY is 2: saved by Ctrl-C
        code, _, err = finetune("--out", out, "--seed", 4)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    spent = accountant.epsilon(40 / N, state["settings"]["sigma"], 3, 1e-3)[0]
    assert code != 0 and f"stopped after step 3 of 6, epsilon spent so far {spent:.4f}" in err, err
    assert err.splitlines()[-1].startswith("stopped"), "a line of its own, not the end of the progress bar"
    assert "Traceback" not in err and state["step"] == len(state["metrics"]) == 3
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt"]
    assert finetune("--out", out, "--seed", 4, "--resume", picture=True)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == list(PUBLISHED)
    for name in set(PUBLISHED) - {"config.json"}:
        assert (out / name).read_bytes() == (world / "finished" / name).read_bytes(), name


def test_the_checkpoint_is_its_owners_alone_and_gone_at_the_end(world, tmp_path, monkeypatch):
    """Also the half-written one, at every save of a run."""
    monkeypatch.chdir(world)
    modes, fsync = [], os.fsync

    def watched(descriptor):
        modes.extend(p.stat().st_mode & 0o777 for p in (tmp_path / "run").glob("checkpoint.pt*"))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", watched)
    assert finetune("--out", tmp_path / "run")[0] == 0
    assert len(modes) >= 5 and set(modes) == {0o600}, [oct(m) for m in modes]
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_of_two_runs_in_one_folder_the_second_is_refused_until_the_first_ends(tmp_path):
    """The first holds it in another process; killed without a chance to clean up, it holds it no more."""
    code = ("import sys, time, pathlib\nfrom machinery import checkpoint\n"
            "with checkpoint.alone(pathlib.Path(sys.argv[1]) / '.in-use'):\n"
            "    print('mine', flush=True), time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")],
                             stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert first.stdout.readline() == b"mine\n"
        with pytest.raises(ValueError, match=f"in use by process {first.pid} on"):
            with checkpoint.alone(tmp_path / "run" / ".in-use"):
                pytest.fail("two at once")
    finally:
        first.kill()
        first.wait()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".in-use"], "kill -9 leaves the lock"
    with checkpoint.alone(tmp_path / "run" / ".in-use"):
        assert str(os.getpid()) in (tmp_path / "run" / ".in-use").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_is_held_although_its_process_id_means_nothing_here(tmp_path):
    """As one is that a program in another container holds: process ids there are other ones."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    with checkpoint._new(tmp_path / ".in-use", f"process {ended.pid} on {socket.gethostname()}"):
        with pytest.raises(ValueError, match="in use"):
            with checkpoint.alone(tmp_path / ".in-use"):
                pytest.fail("two at once")


def test_many_that_find_an_abandoned_lock_at_once_get_it_one_at_a_time(tmp_path):
    """In processes of their own; each holds the folder for a moment and would see another's file in it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock, inside = tmp_path / ".in-use", tmp_path / "inside"

    def child():
        for _ in range(30):
            with contextlib.suppress(ValueError), checkpoint.alone(lock):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))        # FileExistsError: two at once
                inside.unlink()
            with contextlib.suppress(OSError):                           # a lock as a crash leaves it
                descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                os.write(descriptor, f"process {ended.pid} on {socket.gethostname()}".encode())
                os.close(descriptor)

    children = []
    for _ in range(4):
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                child()
                os._exit(0)
            os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4


@pytest.mark.parametrize("free", ["--peek 2", "--data-dir ./data",
                                  "--chunk 7", "--device auto"])
def test_a_run_goes_on_with_other_settings_of_memory_pictures_and_places(free, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    shutil.copytree(world / "stopped", tmp_path / "run")
    code, _, err = finetune("--out", tmp_path / "run", "--seed", 4, "--resume", *free.split())
    assert code == 0, err
    for name in ("metrics.csv", "privacy.json"):
        assert (tmp_path / "run" / name).read_bytes() == (world / "finished" / name).read_bytes(), name


def test_a_folder_that_cannot_be_synced_is_no_reason_to_stop(tmp_path, monkeypatch):
    """Windows cannot open a folder to flush it; the file itself was flushed."""
    real = os.open

    def windows(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *mode)
    monkeypatch.setattr(os, "open", windows)
    checkpoint.write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


# --- what a program says

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"), MemoryError(),
    torch.OutOfMemoryError("Allocation on device 0"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_that_says_what_to_lower(error, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)

    def full(*_, **__):
        raise error
    monkeypatch.setattr(dpsgd, "private_gradient", full)
    code, _, err = finetune("--out", tmp_path / "run")
    assert code == 1 and len(err.splitlines()) == 1 and "out of memory" in err and "lower --chunk" in err, err
    monkeypatch.setattr(dpsgd, "private_gradient", lambda *_, **__: 1 / 0)
    assert "Traceback" in finetune("--out", tmp_path / "other")[2], "an error of our own keeps its traceback"


def test_ctrl_c_while_sampling_is_one_line_and_leaves_no_file(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)

    def press(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setitem(ddpm.SAMPLERS, ddpm.Sampling().sampler, press)
    code, _, err = call(sample.main, "finished", *SAMPLE, "--out", tmp_path / "grid.png")
    assert code == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("sample.py: interrupted"), err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_does_not_end_the_work():
    line = f"{sys.executable} -m machinery.screen | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT, executable="/bin/bash")
    assert done.stdout.splitlines() == ["line 0 of 100,000", "0"], done
    assert done.stderr == "all 100,000 lines were printed, whether or not they were read\n"


def test_a_bar_is_shown_unless_the_screen_is_a_file_or_somebody_asks(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert screen.hide_bar() is None, "None: tqdm looks whether stderr is a terminal"
    assert screen.hide_bar(False) is True
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert screen.hide_bar() is True


@pytest.mark.parametrize("steps, lines", [(110, 10), (6, 6), (11, 5)])
def test_a_log_file_is_told_of_every_tenth_of_the_steps_and_a_terminal_has_its_bar(steps, lines, monkeypatch,
                                                                                   capsys):
    def said():
        for step in range(1, steps + 1):
            screen.tell_a_log(step, steps, f"epsilon_rdp={step / 10:.3f}")
        return capsys.readouterr().err.splitlines()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    last = steps - steps % 2
    in_a_file = said()
    assert len(in_a_file) == lines and in_a_file[-1] == f"step {last} of {steps}, epsilon_rdp={last / 10:.3f}"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not said(), "the bar is there"
    monkeypatch.undo()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not said(), "somebody asked for none"


def test_what_ships_is_found_from_any_directory(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base.load("assets/base.pt").model.config["names"] == list("0123456789")
    found, public = runs.load(world / "finished").model, base.load(world / "base.pt").model
    assert torch.equal(found.conv_in.weight, public.conv_in.weight), \
        "base.pt of config.json was found above the run's folder"


# --- the disk is full

class FullDisk:
    """While inside, no file can grow beyond `limit` bytes: the kernel refuses, half-way through a write."""

    def __init__(self, limit: int):
        self.limit = limit

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def no_space(descriptor):
    """os.fsync on a disk that fills up while a file is written to it."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["no space", "file too large"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(how, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    out, save, disk, saves = tmp_path / "run", checkpoint.save, FullDisk(10_000), []

    def second_time_full(path, state):
        saves.append(state["step"])
        with pytest.MonkeyPatch.context() as m:
            if len(saves) == 2 and how == "no space":
                m.setattr(os, "fsync", no_space)
            elif len(saves) == 2:
                disk.__enter__()
            try:
                save(path, state)
            finally:
                if len(saves) == 2 and how != "no space":
                    disk.__exit__()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoint, "save", second_time_full)
        code, _, err = finetune("--out", out, "--seed", 4)
    assert code == 2 and "Traceback" not in err, err
    assert {"no space": "No space left", "file too large": "File too large"}[how] in err.splitlines()[-1], err
    assert "checkpoint.pt" in err.splitlines()[-1], f"which file could not be written: {err.splitlines()[-1]}"
    assert [p.name for p in out.iterdir()] == ["checkpoint.pt"], "a partial file remains"
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2
    code, _, err = finetune("--out", out, "--seed", 4, "--resume")
    assert code == 0, err
    assert (out / "adapter_model.bin").read_bytes() == (world / "finished" / "adapter_model.bin").read_bytes()


def save_adapter(folder):
    lora.save(folder, {"w.lora_A": torch.zeros(9, 999)}, lora.describe("lora", 2, 3.0, True))


WRITERS = {
    "adapter": save_adapter,
    "base": lambda folder: base.save(folder / "base.pt", tiny_unet()),
    "text": lambda folder: checkpoint.write_text(folder / "privacy.json", "x" * 20_000),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_file_that_cannot_be_written_is_an_os_error_and_leaves_the_old_one(what, tmp_path):
    WRITERS[what](tmp_path)
    before = snapshot(tmp_path)
    with FullDisk(1_000), pytest.raises(OSError, match="File too large"):
        WRITERS[what](tmp_path)
    assert snapshot(tmp_path) == before


def test_a_disk_that_is_full_at_the_start_is_refused_before_any_work(tmp_path):
    with FullDisk(0), pytest.raises(ValueError, match=f"cannot write in {tmp_path}"):
        checkpoint.try_writing(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_programs_may_start_in_one_folder_at_the_same_moment(tmp_path):
    with ThreadPoolExecutor(4) as programs:                              # list() raises what one raised
        list(programs.map(lambda _: checkpoint.try_writing(tmp_path), range(2_000)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["train", "pretrain", "sample"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(program, world, tmp_path, monkeypatch):
    """The run's last files, the base, the pictures: exit code 2, and what remains is whole."""
    monkeypatch.chdir(world)
    if program == "train":                                               # full from the end of the loop on
        publish = train.publish

        def full(*a):
            with FullDisk(1_500):
                publish(*a)
        monkeypatch.setattr(train, "publish", full)
        code, _, err = finetune("--out", tmp_path / "run", "--seed", 4, picture=True)
        left = {"checkpoint.pt", *PUBLISHED} - {"privacy.json", "adapter_model.bin", "samples.png"}
        written = {p.name for p in (tmp_path / "run").iterdir()}
        assert written <= left, "no partial file, no privacy report without an adapter"
        monkeypatch.undo()
        monkeypatch.chdir(world)
        again = finetune("--out", tmp_path / "run", "--seed", 4, "--resume")
        assert again[0] == 0, "the run can still be finished"
    else:
        argv = dict(pretrain=[pretrain.main, *PRETRAIN, "--out", tmp_path / "base.pt"],
                    sample=[sample.main, "finished", *SAMPLE, "--n", 50, "--out", tmp_path / "grid.png"])
        with FullDisk(1_500):
            code, _, err = call(*argv[program])
        assert not list(tmp_path.iterdir())
    assert code == 2 and "Traceback" not in err and "File too large" in err.splitlines()[-1], err


# --- an image whose loss is no number

@pytest.mark.parametrize("what", ["lora", "lora+embed", "lora+conv", "attention"])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 1e30, 1e38])
def test_a_loss_that_is_no_number_counts_for_at_most_C(factor, what, monkeypatch):
    """uint8 images hold no NaN, but a network that diverges on one of them gives its loss one.

    The others still count.
    """
    model, C = tiny_unet(), 0.01
    lora.attach(model, lora.describe(what, 2, 3.0, True))
    trainable, frozen = lora.split(model)
    images, labels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.arange(4)
    images[:, 0, 0, 0] = torch.tensor([0, 0, 255, 0])                    # the third one is the strange one
    loss = ddpm.loss

    def strange(model, x0, *rest, **how):
        return loss(model, x0, *rest, **how) * torch.where(x0[:, 0, 0, 0] == 1, factor, 1.0)
    monkeypatch.setattr(ddpm, "loss", strange)
    s = train.Settings(K=2, train=what)
    gradients = train.per_image_gradients(model, frozen, s)
    lot = train.with_draws(images, labels, draws.hashes(images), torch.tensor(0), 1, 10, s)
    each = gradients(trainable, *lot)
    total = dpsgd.clip_and_sum(each, C)
    others = dpsgd.clip_and_sum({name: g[[0, 1, 3]] for name, g in each.items()}, C)
    assert all(g.isfinite().all() for g in total.values()) and any(g.any() for g in others.values())
    moved = math.sqrt(sum((total[name] - others[name]).square().sum().item() for name in total))
    assert moved <= C, f"moved the sum by {moved / C:.3f} C"
    normals = Secret(bytes(32)).normals(1, sum(p.numel() for p in trainable.values()))
    step = dpsgd.private_gradient(gradients, trainable, lot, C=C, sigma=1.0, B=4, normals=normals)
    assert all(g.isfinite().all() for g in step.values())
