"""Property tests of several processes: one lot, one noise, one report, and no start on different data."""
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import accountant
import base
import data
import dpsgd
import helpers
from conftest import ROOT, tiny_unet
from helpers import finetune, make_place, write_idx
from machinery import distributed
from machinery.secret import Secret, new_key
from test_train import TINY, place  # noqa: F401  (a fixture)

STEP = dict(C=0.5, sigma=1.3, B=4)


def squares(params, x):
    """Per-example gradients of ||w - x||^2 / 2, in two tensors."""
    return {"w": params["w"] - x[:, :3], "v": (params["v"] - x[:, 3:]).view(len(x), 1, 2)}


def problem():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    return {"w": torch.zeros(3).double(), "v": torch.zeros(1, 2).double()}, x    # float32 hides last bits


def one_rank(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    params, x = problem()
    start = {"w": torch.full((3,), float(rank)), "key": torch.tensor(rank)}
    distributed.same_everywhere(start)
    results[rank, "start"] = start["w"].tolist() + [start["key"].item()]
    for name, mine in (("lots", x[rank::2]), ("only rank 1", x[:rank * 3]), ("empty", x[:0])):
        normals = Secret(new_key(10 + rank)).normals(1, 5)               # another noise on each rank
        g = dpsgd.private_gradient(squares, params, (mine,), **STEP, normals=normals)
        results[rank, name] = torch.cat([v.flatten() for v in g.values()])
    dist.destroy_process_group()


@pytest.mark.parametrize("device, said", [("mps", "cannot share mps"), ("cuda:1", "a GPU of its own"),
                                          ("cuda", "here are 0")])
def test_processes_that_would_share_a_device_are_refused(device, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=said):
        distributed.start(torch.device(device))


def test_two_ranks_give_the_gradient_of_one_and_the_noise_once(tmp_path):
    """To the last bit, with the same lot and rank 0's noise; also when one rank's lot is empty, or all are.
    """
    with mp.Manager() as manager:
        results = manager.dict()
        how = "fork" if sys.platform == "linux" else "spawn"             # torch is imported already
        mp.start_processes(one_rank, (str(tmp_path), results), nprocs=2, start_method=how)
        results = dict(results)
    assert results[0, "start"] == results[1, "start"] == [0, 0, 0, 0], "all ranks start where rank 0 does"
    (params, x), normals = problem(), Secret(new_key(10)).normals(1, 5)
    for name, lot in (("lots", x), ("only rank 1", x[:3]), ("empty", x[:0])):
        alone = dpsgd.private_gradient(squares, params, (lot,), **STEP, normals=normals)
        alone = torch.cat([v.flatten() for v in alone.values()])
        for rank in (0, 1):
            assert torch.equal(results[rank, name], alone), f"{name}, rank {rank}"


# -----------------------------------------------------------------------------
# whole runs of two ranks, as torchrun would start them, but forked from a process that has imported torch and
# has run nothing, for autograd does not survive a fork

FORKED = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        multiprocessing.set_forkserver_preload(["helpers", "torch._dynamo"])
        yield


def as_rank(rank, port, commands, dies, results):
    """finetune in this process as rank `rank`, in commands[rank] = (folder, flags).

    dies: the step in whose midst all ranks lose power
    """
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(commands)),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    folder, flags = commands[rank]
    os.chdir(folder)
    torch.set_num_threads(1)
    seen, real = [], dpsgd.private_gradient

    def spy(*args, normals, **how):
        if len(seen) + 1 == dies:
            os._exit(0)
        gradient = real(*args, normals=normals, **how)
        seen.append([hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in (normals, *gradient.values())])
        return gradient
    dpsgd.private_gradient = spy
    results[rank] = (*finetune(*flags), seen)


def on_two_ranks(*commands, dies=None) -> dict:
    """rank -> (exit code, stdout, stderr, hashes of each step's normals and gradient), if it did not die."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(as_rank, (port, commands, dies, results), nprocs=2, start_method=FORKED)
        return dict(results)


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def seeded(server, tmp_path_factory):
    """A run of one rank that was never stopped, and checkpoints of step 2, written by one rank and by two."""
    here = make_place(tmp_path_factory.mktemp("seeded"))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(here)
        code, _, err = finetune("--out", "whole", "--seed", 7)
        assert code == 0, err
        with helpers.stop_after(2):
            assert finetune("--out", "1", "--seed", 7)[0] == 1
    died = on_two_ranks(*[(here, ["--out", "2", "--seed", 7])] * 2, dies=4)
    assert not died and set(files(here / "1")) == {"checkpoint.pt"} <= set(files(here / "2"))
    for ranks in "12":
        assert torch.load(here / ranks / "checkpoint.pt", weights_only=True)["step"] == 2
    return here


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 2)])
def test_a_seeded_run_goes_on_with_any_number_of_ranks_and_is_the_run_that_was_never_stopped(
        before, after, seeded, monkeypatch):
    """The same bytes in every file: neither lots nor sums nor noise depend on the number of ranks."""
    monkeypatch.chdir(seeded)
    out = f"{before}-then-{after}"
    shutil.copytree(str(before), out)
    Path(out, ".in-use").unlink(missing_ok=True)                         # of the ranks that lost power
    flags = ["--out", out, "--seed", 7, "--resume"]
    ended = on_two_ranks(*[(seeded, flags)] * 2) if after == 2 else {0: finetune(*flags)}
    for rank, (code, _, err, *_) in ended.items():
        assert code == 0, f"rank {rank}: {err}"
    assert files(out) == files("whole")


def test_a_run_on_two_ranks_counts_one_mechanism(server, tmp_path):
    """Two processes take part in each step, which is one step of one mechanism, and rank 0 alone speaks."""
    here = make_place(tmp_path)
    ended = on_two_ranks(*[(here, ["--out", "two"])] * 2)
    assert [ended[rank][0] for rank in (0, 1)] == [0, 0], ended
    facts = json.loads((here / "two" / "privacy.json").read_text())
    assert facts["epsilon"] == accountant.epsilon(0.1, facts["sigma"], 6, 1e-3)[0] and facts["steps"] == 6
    assert "2 x cpu" in ended[0][1] and "private" in ended[0][1] and ended[1][1:3] == ("", "")


def test_without_a_seed_all_ranks_have_one_secret_key_and_one_gradient(server, tmp_path):
    """Or an image's coin would depend on its rank; a private run of two ranks is resumed with a fresh key."""
    here = make_place(tmp_path)
    on_two_ranks(*[(here, ["--out", "run"])] * 2, dies=4)
    (here / "run" / ".in-use").unlink(missing_ok=True)
    shutil.copytree(here / "run", here / "copy")
    seen = []
    for out in ("run", "copy"):
        ended = on_two_ranks(*[(here, ["--out", out, "--resume"])] * 2)
        assert [ended[rank][0] for rank in (0, 1)] == [0, 0], ended
        assert ended[0][3] == ended[1][3] and len(ended[0][3]) == 4, "two ranks took different steps"
        seen.append([normals for normals, *_ in ended[0][3]])
        said = json.loads((here / out / "privacy.json").read_text())
        assert said["private"] is True and said["steps"] == 6
    assert not set(seen[0]) & set(seen[1]), "two continuations of one checkpoint have noise in common"


def lacks_the_first(there):
    images, labels = data.load("mnist", "train", there / "data")
    write_idx(there / "data", images[1:, 0].numpy(), labels[1:].numpy().astype(np.uint8))


@pytest.mark.parametrize("change, flags, named", [
    (lacks_the_first, (), "private_images"),
    (lambda there: base.save(there / "base.pt", tiny_unet(seed=1)), (), "base"),
    (None, ("--C", 0.03), "C"), (None, ("--B", 41), "B, sigma"), (None, ("--seed", 2), "seed")],
    ids=["data", "base", "C", "B", "seed"])
def test_ranks_that_differ_in_data_base_or_settings_refuse_to_start(change, flags, named, server, tmp_path):
    """In one line that names what differs. If one copy lacks the first image, each rank takes images that the
    other takes, too: an image is sampled twice, at twice the rate that epsilon was computed for.
    """
    here, there = make_place(tmp_path / "one"), make_place(tmp_path / "other")
    if change is not None:
        change(there)
    mine = ["--out", "run", "--seed", 1]
    ended = on_two_ranks((here, mine), (there, [*mine, *flags]))
    for rank, (code, _, err, seen) in ended.items():
        assert code == 2 and f"the ranks differ in {named}; expected" in err and err.count("\n") == 1, err
        assert not seen, "a step was taken"
    assert len(ended) == 2 and not list(here.glob("run/*")) and not list(there.glob("run/*"))


def test_ranks_that_have_different_checkpoints_refuse_to_go_on(server, tmp_path, monkeypatch):
    """A machine that kept an older one: its images would be sampled for another step, at other weights."""
    commands = []
    for step in (2, 3):
        commands.append((make_place(tmp_path / str(step)), ["--out", "run", "--seed", 1, "--resume"]))
        monkeypatch.chdir(commands[-1][0])
        with helpers.stop_after(step):
            assert finetune("--out", "run", "--seed", 1)[0] == 1
    for rank, (code, _, err, seen) in on_two_ranks(*commands).items():
        assert code == 2 and "the ranks differ in checkpoint; expected" in err and err.count("\n") == 1, err
        assert not seen, "a step was taken"


# -----------------------------------------------------------------------------
# torchrun itself


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(ROOT / "tests/helpers.py"), *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True)


def test_a_rank_that_dies_ends_the_run_with_a_clear_message_and_the_last_checkpoint(place):  # noqa: F811
    flags = [*TINY, "--steps", 5000, "--data-dir", place, "--base", place / "base.pt",
             "--out", place / "dies"]
    run = torchrun(*flags)
    checkpoint = place / "dies" / "checkpoint.pt"
    try:
        deadline = time.time() + 100
        while not checkpoint.exists() and time.time() < deadline:
            time.sleep(0.1)
        asked = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
        os.kill(int(asked.stdout.split()[-1]), signal.SIGKILL)
        said, _ = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode != 0 and "another rank died" in said, said
    assert torch.load(checkpoint, weights_only=True)["step"] >= 2
