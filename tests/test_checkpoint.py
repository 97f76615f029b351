"""Properties of what is read back: a run goes on as it was or not at all, and no file runs code."""
import contextlib
import json
import os
import pickle
import stat
from pathlib import Path

import pytest

import base
import lora
from conftest import tiny_unet
from helpers import Code, finetune, make_place, stop_after
from machinery import checkpoint


# --- a run that is taken up again

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A place with a run that was never stopped."""
    folder = make_place(tmp_path_factory.mktemp("checkpoint"))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        code, _, err = finetune("--out", "whole", "--seed", 4)
    assert code == 0, err
    return folder / "whole"


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_stopped_and_resumed_run_is_the_run_that_was_never_stopped(step, whole, monkeypatch):
    """With a seed: the same lots, noise and ledger. No step has new noise, and none goes uncounted."""
    monkeypatch.chdir(whole.parent)
    out = f"stopped-{step}"
    with stop_after(step):
        code, _, err = finetune("--out", out, "--seed", 4)
    assert code == 1 and f"stopped after step {step}" in err
    code, _, err = finetune("--out", out, "--seed", 4, "--resume")
    assert code == 0, err
    for name in ("adapter_model.bin", "metrics.csv", "privacy.json"):
        assert Path(out, name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("now", [
    dict(sigma=0.5), dict(N=500), dict(rank=4), dict(private_images="others"), dict(new=1)])
def test_a_checkpoint_goes_on_only_under_the_settings_it_was_written_under(now, tmp_path):
    before = dict(sigma=1.0, N=400, rank=2, private_images="these")
    checkpoint.save(tmp_path / "c.pt", dict(settings=before, step=3))
    assert checkpoint.load(tmp_path / "c.pt", before)["step"] == 3
    with pytest.raises(ValueError, match="other settings"):
        checkpoint.load(tmp_path / "c.pt", before | now)


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_checkpoint_is_readable_by_its_owner_alone(left_behind, tmp_path, monkeypatch):
    """Also where an older file of the same name was readable by all."""
    if left_behind:
        for name in ("c.pt", "c.pt.partial"):
            (tmp_path / name).touch(0o644)
    old, seen, fsync = os.umask(0), [], os.fsync

    def watched(descriptor):
        seen.append(os.fstat(descriptor))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", watched)
    try:
        checkpoint.save(tmp_path / "c.pt", dict(settings={}))
    finally:
        os.umask(old)
    modes = [oct(mode.st_mode & 0o777) for mode in seen if stat.S_ISREG(mode.st_mode)]
    assert modes == [oct(0o600)] and (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o600


# --- files from elsewhere

@pytest.mark.parametrize("what", ["base", "adapter", "checkpoint"])
def test_code_inside_a_file_is_refused_and_never_run(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora.describe("lora", 2, 3.0, True)))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Code(), protocol=2))
    read = dict(base=lambda: base.load(tmp_path / "adapter_model.bin"),
                adapter=lambda: lora.load(tiny_unet(), tmp_path),
                checkpoint=lambda: checkpoint.load(tmp_path / "adapter_model.bin", {}))[what]
    with contextlib.suppress(ValueError):
        read()
        pytest.fail("a pickle with code in it was accepted")
    assert not (tmp_path / "executed").exists(), "code from the file was run"
