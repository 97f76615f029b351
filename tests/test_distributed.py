"""Theorems about several processes: the same gradient, the noise once, one statement."""
import json
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import accountant
import dpsgd
from machinery import distributed
from conftest import ROOT
from test_train import TINY, place  # noqa: F401  (a fixture)

STEP = dict(C=0.5, sigma=1.3, B=4)


def squares(params, x):
    """Per-example gradients of ||w - x||^2 / 2, in two tensors."""
    return {"w": params["w"] - x[:, :3], "v": (params["v"] - x[:, 3:]).view(len(x), 1, 2)}


def problem():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    return {"w": torch.zeros(3), "v": torch.zeros(1, 2)}, x


def one_rank(rank, folder, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    params, x = problem()
    start = {"w": torch.full((3,), float(rank)), "key": torch.tensor(rank)}
    distributed.same_everywhere(start)
    results[rank, "start"] = start["w"].tolist() + [start["key"].item()]
    for name, mine in (("lots", x[rank::2]), ("only rank 1", x[:rank * 3]), ("empty", x[:0])):
        generator = torch.Generator().manual_seed(10 + 5 * rank)
        g = dpsgd.private_gradient(squares, params, (mine,), **STEP, generator=generator)
        results[rank, name] = torch.cat([v.flatten() for v in g.values()])
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one_and_the_noise_once(tmp_path):
    """With the same lot and rank 0's noise; also when a rank's lot, or all of them, are empty."""
    with mp.Manager() as manager:
        results = manager.dict()
        how = "fork" if sys.platform == "linux" else "spawn"             # torch is imported already
        mp.start_processes(one_rank, (str(tmp_path), results), nprocs=2, start_method=how)
        results = dict(results)
    assert results[0, "start"] == results[1, "start"] == [0, 0, 0, 0], "all ranks start where rank 0 does"
    params, x = problem()
    for name, lot in (("lots", x), ("only rank 1", x[:3]), ("empty", x[:0])):
        generator = torch.Generator().manual_seed(10)
        alone = dpsgd.private_gradient(squares, params, (lot,), **STEP, generator=generator)
        alone = torch.cat([v.flatten() for v in alone.values()])
        for rank in (0, 1):
            torch.testing.assert_close(results[rank, name], alone, atol=1e-6, rtol=1e-5,
                                       msg=lambda m: f"{name}, rank {rank}: {m}")


def torchrun(*argv, **how):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(ROOT / "tests/helpers.py"), *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True, **how)


def test_a_run_on_two_ranks_counts_one_mechanism(place):  # noqa: F811
    run = torchrun(*TINY, "--data-dir", place, "--base", place / "base.pt", "--out", place / "two")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    facts = json.loads((place / "two" / "privacy.json").read_text())
    assert facts["epsilon"] == accountant.epsilon(0.1, facts["sigma"], 6, 1e-3)[0] and facts["steps"] == 6
    assert said.count("unit_of_privacy") == 1, "rank 0 alone speaks"


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
