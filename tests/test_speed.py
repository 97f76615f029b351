"""The benchmark compares like with like, and its tables hold numbers; nothing here depends on the machine."""
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("what, by_copies", [("lora", True), ("lora", False), ("attention", False)])
def test_the_timed_private_step_without_clipping_and_noise_is_the_timed_ordinary_step(what, by_copies):
    model, trainable, frozen, example = speed.setting(CPU, 3, K=2, rank=2, what=what)
    losses = speed.losses_of(model, frozen, CPU, "float32")
    ordinary = speed.ordinary_step(losses, trainable, example, chunk=2)()
    private = speed.private_step(losses, trainable, example, 2, by_copies, C=float("inf"), sigma=0.0)()
    for name, a, b in zip(trainable, ordinary, private.values()):
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-6, f"{name}: {(a - b).norm():.1g}, {a.norm():.1g}"
    assert any(g.abs().max() > 1e-4 for g in ordinary), "all gradients are 0: nothing was compared"


def test_a_round_runs_every_step_once_in_turn_and_the_first_round_is_not_counted():
    ran = []
    seconds = speed.measure({name: lambda name=name: ran.append(name) for name in "ab"}, 2, CPU)
    assert ran == list("ababab") and [len(s) for s in seconds.values()] == [2, 2]


@pytest.mark.parametrize("bound, value, met", [
    ("<= 1.05", 1.05, True), ("<= 1.05", 1.051, False),
    (">= 10,000", 9_999, False), (">= 10,000", 10_000, True)])
def test_a_target_is_met_exactly_when_its_bound_holds(bound, value, met):
    assert speed.verdict("x", bound, value).endswith("| yes |" if met else "| **no** |")


def test_a_target_that_was_not_measured_is_neither_met_nor_missed():
    assert speed.verdict("x", "<= 1", None, "--train") == "| x | <= 1 | not measured (--train) | - |"


def test_the_table_of_steps_holds_positive_numbers(capsys):
    found = speed.table_of_steps(4, 2, 1, CPU, peers=False)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == sum(map(len, found.values()))
    assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)
    assert all(min(s) > 0 for seconds in found.values() for s in seconds.values())


def test_growth_is_relative_to_its_base_point():
    groups = {"rank": [dict(rank=16), dict(rank=2)], "trained": [dict(what="full")],
              "side": [dict(side=32)], "width": [dict(channels=16)],
              "latents": [dict(side=16, file="smears.pt")]}
    rows = speed.growth(groups, 1, 1, CPU)
    assert [row[:2] for row in rows] == [
        ("rank", 16), ("rank", 2), ("trained", "full"), ("side", 32), ("width", 16),
        ("latents", "smears.pt")]
    assert rows[0][3] == 1 and all(min(row[2:]) > 0 for row in rows)


def test_every_shape_changes_the_base_point_in_settings_that_exist():
    for n in (1, 64):
        for change in sum(speed.shapes(n).values(), []):
            assert set(change) <= {"images", "K", "rank", "side", "what", "channels", "file"}
            assert change.get("images", 1) >= 1


def test_peak_memory_and_calibration_are_positive():
    assert speed.peak_of_a_lot(3, 2, 4, CPU) > 2**20
    assert speed.seconds_of_calibrations(speed.train.check(speed.train.Settings()), peers=False)["ours"] > 0
