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
