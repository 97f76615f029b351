"""Property tests of private runs on latents: the guarantee is the one in pixels, and E and D stay public."""
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoder
import base
import data
import ddpm
import dpsgd
import lora
import sample
import train
import unet
from conftest import ROOT
from helpers import call, finetune, stop_after
from machinery import draws
from support import classes, privacy_report, recipes, runs

NAMES = [f"public {i}" for i in range(12)]
PHOTOS = torch.randint(256, (30, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
FLAGS = ("--data", "npz:private.npz", "--size", 64, "--classes", "a,b,c", "--B", 12, "--N", 60, "--steps", 3,
         "--chunk", 12)
C, B = 0.001, 12


def public_base(path: Path, classes=12, names=NAMES) -> None:
    """A tiny base of latents, with its autoencoder, as pretrain.py would write it."""
    torch.manual_seed(0)
    coder = autoencoder.Autoencoder(channels=8, blocks=(1, 1))
    autoencoder.measure_scale(coder, PHOTOS)
    model = unet.UNet(image_channels=4, channels=8, heads=2, classes=classes, patch=1, names=names)
    for p in (model.conv_out.weight, model.middle[0][1].proj.weight):    # they start at 0
        torch.nn.init.normal_(p, std=0.1)
    base.save(path, model, coder=coder)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public_base(Path("base.pt"))
    write_private(PHOTOS)


def write_private(images: torch.Tensor, name: str = "private.npz") -> None:
    """In MedMNIST's layout: (N, H, W, C), labels (N, 1)."""
    labels = np.arange(len(images))[:, None] % 3
    np.savez(name, train_images=images.permute(0, 2, 3, 1).numpy(), train_labels=labels)


def settings(**changed) -> train.Settings:
    quick = dict(data="npz:private.npz", classes="a,b,c", size=64, base="base.pt", B=B, N=60, C=C)
    return train.Settings(**dict(quick, device="cpu", **changed))


def loaded(s: train.Settings):
    """What finetune has before its first step, but no adapter: (network, autoencoder, latents, labels)."""
    model, coder, _ = base.load(Path(s.base))
    declared = classes.declared_classes(s.data, s.classes, model, own=True)
    lora.new_classes(model, declared["classes"], s.start)
    run = runs.Run(s, model, coder, "", **declared)
    images, labels, _ = runs.private_images(run)
    return model, coder, autoencoder.to_latents(coder, images), labels


# --- what one image can do

@pytest.mark.parametrize("extreme", ["ordinary", "NaN", "1e6"])
@pytest.mark.parametrize("K", [1, 4])
def test_one_image_moves_a_step_on_latents_by_at_most_C(K, extreme):
    s = settings(K=K, draws="middle")
    model, _, latents, labels = loaded(s)
    latents = latents.clone()
    latents[0] = dict(ordinary=latents[0], NaN=latents[0] * torch.nan, **{"1e6": latents[0] * 1e6})[extreme]
    lora.attach(model, lora.describe("lora", 2, 2, True))
    trainable, frozen = lora.split(model)
    for p in trainable.values():
        torch.nn.init.normal_(p, std=0.1)
    per_sample, key = train.per_image_gradients(model, frozen, s), draws.new_key(3)

    def step(members):
        hashes = draws.hashes(PHOTOS)[members]
        examples = train.with_draws(latents[members], labels[members], hashes, key, 1, model.classes, s)
        return dpsgd.private_gradient(per_sample, trainable, examples, C=C, sigma=0.0, B=1, chunk=4)
    with_it, without = step(torch.arange(9)), step(torch.arange(1, 9))
    moved = torch.cat([(with_it[name] - without[name]).flatten() for name in trainable]).norm().item()
    assert moved <= C * (1 + 1e-4)
    if extreme == "NaN":
        assert moved <= C * 1e-4                                         # counts as no image
    if extreme == "ordinary":
        assert moved > 0.5 * C, "the image has no gradient: this test could not fail"


def test_draws_belong_to_the_image_not_to_its_latent(monkeypatch):
    """On a GPU a latent is the same only up to rounding: its last bit may not give the image other draws."""
    to_latents, seen = autoencoder.to_latents, []
    monkeypatch.setattr(dpsgd, "private_gradient", lambda per_sample, params, examples, **how: (
        seen.append(examples), {name: torch.zeros_like(p) for name, p in params.items()})[1])
    for out, rounding in (("one", 0.0), ("other", 1e-6)):
        monkeypatch.setattr(autoencoder, "to_latents", lambda *a: to_latents(*a) * (1 + rounding))
        code, _, err = finetune("--out", out, "--seed", 1, *FLAGS)
        assert code == 0, err
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert not torch.equal(one[0], other[0]) and all(map(torch.equal, one[1:], other[1:]))


def test_the_scale_is_the_bases_constant_whatever_the_private_images_are():
    public = base.load(Path("base.pt")).coder
    for images in (PHOTOS[:9], PHOTOS[:9] // 8, torch.zeros_like(PHOTOS[:9])):
        write_private(images)
        _, coder, latents, _ = loaded(settings())
        assert torch.equal(coder.scale, public.scale)
        for image, z in zip(images, latents):                            # alone in the world
            assert torch.equal(autoencoder.to_latents(public, image[None])[0], z)


def test_latents_once_are_the_latents_of_each_step(monkeypatch):
    """Every x0 that meets private_gradient is E of one private image in whatever company, bit for bit."""
    seen, real = [], dpsgd.private_gradient

    def spy(per_sample, params, examples, **how):
        seen.extend(examples[0])
        return real(per_sample, params, examples, **how)
    monkeypatch.setattr(dpsgd, "private_gradient", spy)
    code, _, err = finetune("--out", "run", *FLAGS)
    assert code == 0 and seen, err
    coder = base.load(Path("base.pt")).coder
    company = torch.cat([PHOTOS // 8, PHOTOS])
    latents = {z.numpy().tobytes() for z in autoencoder.to_latents(coder, company)[len(PHOTOS):]}
    assert {x.numpy().tobytes() for x in seen} <= latents


# --- what is trained, and what is published

def test_encoder_and_decoder_stay_frozen(monkeypatch):
    """In the run itself, even if all weights of the network are trained."""
    made, begin = [], runs.begin
    monkeypatch.setattr(runs, "begin", lambda *a: made.append(begin(*a)) or made[-1])
    code, _, err = finetune("--out", "run", *FLAGS, "--train", "full")
    assert code == 0, err
    adapter = torch.load("run/adapter_model.bin", weights_only=True)
    assert not any("encoder" in name or "decoder" in name or "scale" in name for name in adapter)
    before, after = base.load(Path("base.pt")).coder, made[0].coder
    assert not any(p.requires_grad for p in after.parameters())
    for name, p in before.state_dict().items():
        assert torch.equal(p, after.state_dict()[name])


def test_the_published_folder_is_a_function_of_public_constants_and_of_what_private_gradient_returned(
        monkeypatch):
    published = []
    for images in (PHOTOS, PHOTOS[:4] // 4):
        write_private(images)
        own = torch.Generator().manual_seed(8)

        def ignorant(per_sample, params, examples, **how):
            return {name: 0.01 * torch.randn(p.shape, generator=own) for name, p in params.items()}
        monkeypatch.setattr(dpsgd, "private_gradient", ignorant)
        out = f"run-{len(images)}"
        code, _, err = finetune("--out", out, *FLAGS, "--seed", 5, picture=True)
        assert code == 0, err
        published.append({p.name: p.read_bytes() for p in Path(out).iterdir()})
    one, other = published
    assert [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)] == []


def test_private_classes_have_a_table_of_their_own_and_the_samples_their_names():
    code, plan, err = finetune("--out", "run", *FLAGS, "--start", "null")
    assert code == 0, err
    assert "on base.pt" in plan and "autoencoder; class embeddings start from: null" in plan
    table = torch.load("run/adapter_model.bin", weights_only=True)["base_model.model.class_embedding.weight"]
    assert len(table) == 4                                               # three classes, and null
    code, _, err = call(sample.main, "run", "--n", 4, "--steps", 2, "--npz", "s.npz", "--device", "cpu")
    assert code == 0, err
    with np.load("s.npz") as f:
        assert f["images"].shape == (4, 3, 64, 64) and f["classes"].tolist() == ["a", "b", "c"]
        assert f["labels"].tolist() == [0, 1, 2, 0]


def test_images_without_classes_are_one_class_and_their_samples_have_no_labels():
    np.savez("faces.npz", images=PHOTOS.numpy())
    code, _, err = finetune("--out", "run", *FLAGS[2:], "--data", "npz:faces.npz", "--classes", "face")
    assert code == 0, err
    code, _, err = call(sample.main, "run", "--n", 2, "--steps", 2, "--npz", "s.npz", "--out", "grid.png",
                        "--device", "cpu")
    assert code == 0, err
    with np.load("s.npz") as f:
        assert f.files == ["images"]
    with Image.open("grid.png") as grid:
        assert grid.width > grid.height, "one image a row"


def test_a_base_of_latents_without_classes_makes_a_run_without_labels():
    public_base(Path("no-classes.pt"), None, None)
    code, _, err = finetune("--data", "npz:private.npz", "--size", 64, "--B", 12, "--N", 60, "--steps", 2,
                            "--chunk", 12, "--base", "no-classes.pt", "--out", "run", picture=True)
    assert code == 0, err
    code, _, err = call(sample.main, "run", "--n", 2, "--steps", 2, "--npz", "s.npz")
    assert code == 0 and "labels" not in np.load("s.npz").files, err


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32)])
def test_grey_and_small_private_images_are_sampled_in_their_own_shape(channels, side):
    np.savez("private.npz", images=PHOTOS[:, :channels, :side, :side].numpy())
    code, _, err = finetune("--out", "run", *FLAGS, "--size", side)
    assert code == 0, err
    images = sample.generate(runs.load(Path("run")), torch.arange(3), 3, ddpm.Sampling(steps=2))
    assert images.shape == (3, channels, side, side)


# --- what is refused

def broken(change) -> None:
    saved = torch.load("base.pt", weights_only=True)
    change(saved)
    torch.save(saved, "base.pt")


def test_a_base_whose_autoencoder_is_missing_foreign_or_another_is_refused_in_one_line():
    assert finetune("--out", "run", *FLAGS)[0] == 0
    whole = Path("base.pt").read_bytes()
    for change, expected in [
            (lambda base: base["autoencoder"]["model"].popitem(), "not a base model"),
            (lambda base: base["autoencoder"].update(config=dict(channels=16)), "not a base model"),
            (lambda base: base["autoencoder"]["model"]["scale"].mul_(2), "not the base that"),
            (lambda base: base.pop("autoencoder"), "not the base that")]:
        broken(change)
        code, _, err = call(sample.main, "run", "--n", 1, "--steps", 1, "--out", "grid.png")
        assert code == 2 and expected in err and err.count("\n") == 1, err
        Path("base.pt").write_bytes(whole)


def test_a_run_does_not_go_on_with_another_autoencoder_in_the_base_of_the_same_name():
    """The latents of the later steps would be others: not the mechanism that the checkpoint is of."""
    with stop_after(1):
        assert finetune("--out", "run", *FLAGS)[0] == 1
    whole = Path("base.pt").read_bytes()
    broken(lambda base: base["autoencoder"]["model"]["scale"].mul_(2))
    code, _, err = finetune("--out", "run", "--resume", *FLAGS)
    assert code == 2 and "(base has changed)" in err and err.count("\n") == 1, err
    Path("base.pt").write_bytes(whole)
    assert finetune("--out", "run", "--resume", *FLAGS)[0] == 0


@pytest.mark.parametrize("flags, expected", [
    (("--classes", ""), "declare them"),
    (("--classes", "a,b,c", "--start", "public 1,public 2"), "expected own, mean"),
    (("--classes", "a,b,c", "--start", "zebra,public 1,public 2"), "unknown to the base: zebra"),
    (("--size", 68), "a side that 8 divides"),
])
def test_what_does_not_fit_the_base_is_refused_in_one_line_before_the_first_step(flags, expected):
    code, _, err = finetune("--out", "run", *FLAGS, *flags)
    assert code == 2 and expected in err and err.count("\n") == 1, err
    assert not Path("run/privacy.json").exists()


def test_a_number_of_classes_stands_for_their_names():
    assert classes.declared("npz:x", "3", None) == ["0", "1", "2"]


# --- what follows from --data

def test_a_typed_flag_comes_before_the_recipe_and_the_recipe_before_the_default(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "finetune", seen.append)
    call(train.main, "--data", "cells", "--B", 77)
    call(train.main)
    cells, mnist = seen
    recipe = recipes.of("cells")
    assert cells.B == 77 != recipe["B"] and (cells.base, cells.out) == ("assets/smears.pt", "runs/cells")
    assert cells.steps == recipe["steps"] and cells.rank == mnist.rank == train.Settings().rank
    assert mnist == train.check(train.Settings())


@pytest.mark.parametrize("name", [*data.KNOWN, "folder:x", "npz:x"])
def test_every_recipe_is_made_of_settings_that_run_and_names_a_base_that_ships(name):
    s = train.check(train.Settings(data=name, **recipes.of(name), N=0 if name in data.KNOWN else 5_000))
    assert (ROOT / s.base).is_file()


@pytest.mark.parametrize("name, classes, side", [
    ("cells-eps1", data.CELLS, 64), ("cells-eps10", data.CELLS, 64), ("cifar10-eps1", data.CIFAR10, 32),
    ("cifar10-eps10", data.CIFAR10, 32), ("faces-eps1", ["face"], 64), ("faces-eps10", ["face"], 64)])
def test_the_colour_run_that_ships_opens_and_its_privacy_report_holds(name, classes, side):
    folder = ROOT / "assets" / name
    run = runs.load(folder)
    assert run.classes == list(classes) and run.shape == (3, side, side)
    assert (ROOT / run.settings.base).stat().st_size <= 16e6
    said = json.loads((folder / "privacy.json").read_text())
    ran = [said[name] for name in ("q", "sigma", "steps", "delta")]
    spent = privacy_report.ACCOUNTANTS[said["accountant"]](*ran)
    assert said["private"] and spent == pytest.approx(said["epsilon"]) and spent <= int(name.split("eps")[1])


def test_the_cells_that_ship_are_as_many_as_declared_and_named():
    known = data.KNOWN["cells"]
    images, labels = data.load("cells", "test")
    assert images.shape == (2_843, known.channels, known.side, known.side)
    assert len(labels.unique()) == len(data.CELLS) and known.classes == data.CELLS
    with zipfile.ZipFile(ROOT / "assets" / "cells" / "cells64.zip") as archive:
        train_images = [name.split("/")[1] for name in archive.namelist() if name.startswith("train/")]
    assert len(train_images) == known.N and set(train_images) == set(data.CELLS)


def test_a_truncated_or_missing_zip_is_refused_in_one_line(tmp_path):
    whole = (ROOT / "assets" / "cells" / "cells64.zip").read_bytes()
    with pytest.raises(ValueError, match="missing"):
        data.load("cells", data_dir=tmp_path)
    for content in (whole[:1000], whole[-2_000_000:], b""):
        (tmp_path / "cells64.zip").write_bytes(content)
        with pytest.raises(ValueError, match="truncated or another file"):
            data.load("cells", data_dir=tmp_path)


# --- what is drawn

@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm"])
def test_the_sampler_reaches_latents_beyond_1_as_no_pixel_is(sampler, monkeypatch):
    """With the exact noise of one latent as the network, sampling ends at that latent, uncut."""
    z = torch.linspace(-3, 3, 4 * 16 * 16).view(1, 4, 16, 16)

    class Exact(torch.nn.Linear):                                       # for its parameters: on which device?
        classes = None

        def forward(self, x, t, labels):
            a = ddpm.LINEAR.alpha_bar[t[0]]
            return (x - a.sqrt() * z) / (1 - a).sqrt()
    drawn = []
    monkeypatch.setattr(autoencoder, "to_images", lambda coder, z, shape: drawn.append(z) or data.to_uint8(z))
    coder = autoencoder.Autoencoder(channels=8, blocks=(1, 1))
    run = runs.Run(None, Exact(1, 1), coder, "", None, None, shape=(3, 64, 64))
    sample.generate(run, None, 1, ddpm.Sampling(sampler, steps=20), quiet=True)
    torch.testing.assert_close(drawn[0], z, rtol=1e-3, atol=1e-3)
