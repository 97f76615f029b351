"""Properties of the privacy report: it counts what ran."""
import dataclasses
import json
from pathlib import Path

import pytest

import accountant
import pld
import sample
import train
from helpers import N, finetune, make_place
from support import privacy_report


def test_the_report_counts_the_steps_in_the_ledger_not_the_steps_wanted(tmp_path, monkeypatch):
    """Had a run really taken 4 of its 6 steps, or 7, the report would say so."""
    monkeypatch.chdir(make_place(tmp_path))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "publish", lambda *arguments: m.setattr(train, "kept", arguments, raising=False))
        code, _, err = finetune("--out", "ledger", "--epsilon", 20)
        assert code == 0, err
        run, sigma, trainable, metrics = train.kept
    monkeypatch.setattr(sample, "before_and_after", lambda *_: None)
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)                         # not what is asked here
    roomy = dataclasses.replace(run.settings, epsilon=40.0)              # for a seventh step
    for rows in (metrics[:4], metrics + [[7, None, None]]):
        Path("ledger", "checkpoint.pt").touch()
        train.publish(dataclasses.replace(run, settings=roomy), sigma, trainable, rows)
        said = json.loads(Path("ledger", "privacy.json").read_text())
        assert said["steps"] == len(rows)
        assert said["epsilon"] == accountant.epsilon(40 / N, sigma, len(rows), 1e-3)[0]


@pytest.mark.parametrize("flags", [("--epsilon", 1000), ("--delta", 1e-60)])
def test_a_run_whose_delta_rests_on_the_longest_normals_is_refused(flags, tmp_path, monkeypatch):
    """At epsilon = 1000 an image moves the sum by more than twice as far as the noise can carry it."""
    monkeypatch.chdir(make_place(tmp_path))
    code, _, err = finetune("--out", "run", *flags)
    assert code == 2 and "normals beyond 11.8 standard deviations" in err.splitlines()[-1], err
    assert not Path("run").exists()


def test_the_report_of_a_seeded_run_does_not_call_its_key_secret():
    said = privacy_report.after(train.check(train.Settings(seed=0)), 5.0, 110)
    assert "key made of --seed, not secret" in said["noise"] and "secret key" not in said["noise"]
