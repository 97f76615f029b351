"""Property tests of benchmarks/ablations.py: no run twice, no row half there, a balanced grid."""
import math
import sys

import numpy as np
import pytest
import torch

import base
import lora
from conftest import ROOT, tiny_unet
from helpers import write_idx
from support import privacy_report

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations  # noqa: E402

EVALUATION = dict(scale="laptop", images=20, sample_steps=1, epochs=1)
NAMES = list(ablations.EXPERIMENTS)


def fake(calls):
    """A runner that keeps what it was asked; the accuracy depends on the cell, and falls with the rate."""
    def run(cell):
        calls.append(cell)
        return dict(weights=25_280, sigma=0.5, epsilon_rdp=cell["epsilon"], recognised=0.9,
                    classifier_FID=20.0 + cell["seed"] ** 2, CNN=0.9 - cell["lr"] + 0.01 * cell["seed"],
                    seconds=1.5, device="cpu x 1", torch="2")
    return run


def go(path, calls, names=NAMES, seeds=2, **kw):
    ablations.work(path, lambda rows: ablations.grid(names, seeds, EVALUATION, rows), fake(calls), **kw)
    return ablations.read(path)


def test_a_row_that_is_there_is_not_run_again(tmp_path):
    first, again, more = [], [], []
    rows = go(tmp_path / "a.csv", first)
    assert go(tmp_path / "a.csv", again) == rows and again == []
    assert len(go(tmp_path / "a.csv", more, seeds=3)) > len(rows) and {cell["seed"] for cell in more} == {2}


def test_a_run_of_another_experiment_is_copied_not_repeated(tmp_path):
    calls = []
    rows = go(tmp_path / "a.csv", calls)
    runs = [tuple(cell[c] for c in ablations.SETTINGS) for cell in calls]
    assert len(runs) == len(set(runs)) < len(rows)
    assert {tuple(row[c] for c in ablations.SETTINGS) for row in rows} == set(runs)


@pytest.mark.parametrize("lost", [1, 9, 60])
def test_half_a_row_at_the_end_is_tolerated_and_run_again(tmp_path, lost):
    path, calls = tmp_path / "a.csv", []
    rows = go(path, [], names=["epsilon"])
    whole = path.read_text()
    path.write_text(whole[:-lost])
    assert ablations.read(path) == rows[:-1], f"{lost} bytes lost"
    assert go(path, calls, names=["epsilon"]) == rows and len(calls) == 1 and path.read_text() == whole


def test_seed_0_of_everything_comes_first_and_experiments_in_their_order(tmp_path):
    rows = go(tmp_path / "a.csv", [], seeds=3)
    assert [row["seed"] for row in rows] == sorted(row["seed"] for row in rows)
    for seed in range(3):
        names = [row["experiment"] for row in rows if row["seed"] == seed]
        assert set(names) == set(NAMES) and names == sorted(names, key=NAMES.index), seed
    assert [sum(row["seed"] == seed for row in rows) for seed in range(3)] == [43, 33, 33]


def test_only_the_rate_that_was_best_for_seed_0_goes_on(tmp_path):
    for row in go(tmp_path / "a.csv", [], names=["components"]):
        assert row["seed"] == 0 or row["lr"] == min(ablations.COMPONENTS[row["train"]][1]), row


def test_no_run_starts_after_the_minutes_are_over(tmp_path):
    assert go(tmp_path / "a.csv", [], minutes=0) == []


def test_K_is_compared_at_equal_computation_and_at_equal_batch():
    for scale, point in ablations.SCALES.items():
        cells = ablations.grid(["k"], 1, EVALUATION | dict(scale=scale), [])
        found = {(cell["K"], cell["B"]) for cell in cells}
        equal = point["B"] * point["K"]
        assert found == {(K, equal // K) for K in (1, 4, 16)} | {(K, equal // 4) for K in (1, 4, 16)}


def test_the_tables_mean_and_spread_are_numpys(tmp_path):
    for values in ([0.3], [0.91, 0.93, 0.9], list(np.random.default_rng(0).normal(size=7))):
        mean, spread = ablations.mean_and_spread(values)
        assert mean == pytest.approx(np.mean(values))
        assert spread == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0)
    text = ablations.table(go(tmp_path / "a.csv", [], names=["epsilon"], seeds=3))
    accuracy, distance = [88.0, 89.0, 90.0], [20.0, 21.0, 24.0]
    for epsilon in ("0.2", "1", "3", "10", "inf"):
        assert (f"| {epsilon} | 25,280 | 0.500 | 90.0 ± 0.0 | "
                f"{np.mean(accuracy):.1f} ± {np.std(accuracy, ddof=1):.1f} | "
                f"{np.mean(distance):.2f} ± {np.std(distance, ddof=1):.2f} | 2 ± 0 | 3 |") in text, text
    assert "±" not in ablations.table(go(tmp_path / "b.csv", [], seeds=1)).rpartition("\nMean")[0]


@pytest.mark.parametrize("argv, word", [
    (["--only", "ranks"], "--only"), (["--images", "1"], "--images"), (["--seeds", "x"], "--seeds"),
    (["--csv", "a", "b"], "--csv"),
    (["--csv", str(ROOT / "README.md"), "--table"], "README.md"),
    (["--csv", "nowhere.csv", "--table"], "nowhere.csv")])
def test_bad_input_gets_one_clear_line(argv, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablations.py", *argv])
    with pytest.raises(SystemExit) as stop:
        ablations.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and word in said, said


def test_real_runs_end_to_end_train_what_their_rows_say(tmp_path, monkeypatch):
    """Tiny, but the real programs' own functions: what train.py does not offer, and no noise."""
    base.save(tmp_path / "base.pt", tiny_unet())
    for prefix in ("train", "t10k"):
        write_idx(tmp_path, np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8),
                  np.arange(100, dtype=np.uint8) % 10, prefix)
    # reported beside; it takes longer than all the rest
    monkeypatch.setitem(privacy_report.ACCOUNTANTS, "pld", lambda *a: 0.0)
    monkeypatch.setattr(ablations, "WORK", tmp_path / "runs" / "ablations")
    monkeypatch.setattr(ablations, "OTHERS", dict(data="mnist", data_dir=str(tmp_path),
                                                  base=str(tmp_path / "base.pt"), N=100, delta=1e-3))
    monkeypatch.setitem(ablations.SCALES, "laptop", ablations.LAPTOP | dict(rank=2, B=4, steps=1))
    describe, path, run = lora.describe, tmp_path / "a.csv", ablations.real_runner(torch.device("cpu"))

    def todo(rows):
        cells = ablations.grid(["components", "epsilon"], 1, EVALUATION, rows)
        return [c for c in cells if c["epsilon"] == math.inf or c["epsilon"] == 10
                and c["train"] in ("qkv", "qkv+proj", "lora") and c["experiment"] == "components"]
    ablations.work(path, todo, run)
    rows, model = ablations.read(path), tiny_unet()
    assert lora.describe is describe and [row["train"] for row in rows] == ["qkv", "qkv+proj", "lora", "lora"]
    sides = [a.qkv.in_features for a in model.modules() if hasattr(a, "qkv")]
    qkv = 2 * sum(d + 3 * d for d in sides)                              # the rank times d_in + d_out
    proj = 2 * sum(d + d for d in sides)
    embedding = model.class_embedding.weight.numel()
    everything = qkv + proj + embedding
    assert [row["weights"] for row in rows] == [qkv, qkv + proj, everything, everything]
    for row in rows:
        assert row["epsilon_rdp"] <= row["epsilon"] and (row["sigma"] > 0) == (row["epsilon"] < math.inf), row
        assert 0 <= row["CNN"] <= 1 and 0 <= row["recognised"] <= 1 and row["classifier_FID"] >= 0, row
    kept = sorted(p.name for p in (tmp_path / "runs" / "ablations").iterdir())
    assert kept == ["strip-10.png", "strip-inf.png"], "strips of the base point alone; run folders are gone"
    again = run({c: rows[0][c] for c in ablations.CELL})
    assert [c for c in again if again[c] != rows[0][c] and c != "seconds"] == [], "the seed decides"
