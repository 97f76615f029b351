"""Property tests of pretrain.py: a base that loads; an interrupted run is the run that was not."""
import functools

import pytest
import torch

import autoencoder
import base
import data
import pretrain
from conftest import tiny_unet
from helpers import make_folder


def settings(tmp_path, **changed):
    quick = dict(steps=2, batch=4, device="cpu", out=str(tmp_path / "base.pt"))
    return pretrain.Settings(**dict(quick, **changed))


def test_pretraining_makes_a_base_that_loads(tmp_path):
    pretrain.pretrain(settings(tmp_path))
    assert sum(p.numel() for p in base.load(tmp_path / "base.pt").model.parameters()) < 1_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["base.pt"]


@pytest.mark.parametrize("drawn", ["glyphs", "clothes"])
def test_pretraining_goes_on_from_the_base_it_is_given(drawn, tmp_path):
    """Two steps of a vanishing rate leave the given weights where they were.

    Without --base they start elsewhere.
    """
    base.save(tmp_path / "given.pt", tiny_unet())
    before = base.load(tmp_path / "given.pt").model.state_dict()
    for name, given in (("on", str(tmp_path / "given.pt")), ("new", "")):
        pretrain.pretrain(settings(tmp_path, data=drawn, base=given, lr=1e-9, out=str(tmp_path / name)))
    on, new = (base.load(tmp_path / name).model.state_dict() for name in ("on", "new"))
    assert all(torch.allclose(before[name], on[name], atol=1e-6) for name in before)
    assert any(before[name].shape != new[name].shape or not torch.allclose(before[name], new[name])
               for name in before)


def test_compiled_training_makes_the_same_weights(tmp_path, monkeypatch):
    """Up to rounding. The backend `eager` needs no compiler of C++, which may be missing here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    made = {}
    for compiled in (False, True):
        pretrain.pretrain(settings(tmp_path, compile=compiled, out=str(tmp_path / str(compiled))))
        made[compiled] = base.load(tmp_path / str(compiled)).model.state_dict()
    assert made[False].keys() == made[True].keys()
    assert all(torch.allclose(made[False][name], made[True][name], atol=1e-5) for name in made[True])


class Interrupt:
    """An event that is set from the given step on: what the first Ctrl-C does."""
    def __init__(self, step):
        self.left = step

    def is_set(self):
        self.left -= 0.5                                                 # asked twice a step
        return self.left < 0.75


def test_an_interrupted_run_leaves_no_base_and_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    pretrain.pretrain(settings(tmp_path, steps=4))
    whole = torch.load(tmp_path / "base.pt", weights_only=True)["model"]
    (tmp_path / "base.pt").unlink()
    monkeypatch.setattr(pretrain.checkpoint, "stop_cleanly", lambda: Interrupt(2))
    with pytest.raises(SystemExit, match="stopped after step 2 of 4"):
        pretrain.pretrain(settings(tmp_path, steps=4))
    assert [p.name for p in tmp_path.iterdir()] == ["base.pt.checkpoint"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--resume"):
        pretrain.pretrain(settings(tmp_path, steps=4))
    pretrain.pretrain(settings(tmp_path, steps=4, resume=True))
    again = torch.load(tmp_path / "base.pt", weights_only=True)["model"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_disk_that_is_full_at_the_end_costs_no_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")
    monkeypatch.setattr(base, "save", full)
    with pytest.raises(OSError):
        pretrain.pretrain(settings(tmp_path))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot resume .*glyphs.*clothes"):
        pretrain.pretrain(settings(tmp_path, data="clothes", resume=True))   # another run's images
    pretrain.pretrain(settings(tmp_path, resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["base.pt"]


def test_a_base_of_latents_carries_its_autoencoder_and_its_scale(tmp_path, monkeypatch):
    make_folder(tmp_path / "photos")
    how = dict(data=f"folder:{tmp_path / 'photos'}", size=16, crop=8, batch=2)
    pretrain.train_autoencoder(settings(tmp_path, out=str(tmp_path / "autoencoder.pt"), **how))
    tiny = dict(image_channels=4, channels=8, multipliers=(1, 2), classes=5, patch=1)
    monkeypatch.setitem(pretrain.UNETS, "tiny", tiny)
    pretrain.pretrain(settings(tmp_path, unet="tiny", autoencoder=str(tmp_path / "autoencoder.pt"), flip=True,
                               **how))
    alone, bundled = autoencoder.load(tmp_path / "autoencoder.pt"), autoencoder.load(tmp_path / "base.pt")
    assert alone.state_dict().keys() == bundled.state_dict().keys()
    assert all(torch.equal(alone.state_dict()[name], p) for name, p in bundled.state_dict().items())
    images, _ = data.load(how["data"], "train", None, 16)
    made = base.load(tmp_path / "base.pt").model
    assert made.config["image_channels"] == 4
    assert (made.classes, made.config["names"]) == (2, ["cats", "dogs"])
    assert autoencoder.to_latents(bundled, images).std().item() == pytest.approx(1, abs=0.2)

    # smears, drawn once, as latents: other classes, so a table of their own
    monkeypatch.setattr(pretrain, "POOL", 8)
    pretrain.pretrain(settings(tmp_path, base=str(tmp_path / "base.pt"), data="smears",
                               out=str(tmp_path / "cells.pt")))
    on = base.load(tmp_path / "cells.pt").model
    assert on.classes == 8 and on.config["names"] == list(data.CELLS)
