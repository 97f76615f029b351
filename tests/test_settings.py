"""Property tests of other data: the paper's settings, and whole runs on torchvision's layouts in colour."""
import dataclasses
import json
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import accountant
import base
import data
import lora
import pretrain
import train
import unet
from conftest import ROOT, tiny_unet
from helpers import QUICK
from machinery import flags, screen
from support import recipes

PIXELS = np.random.default_rng(0)
RECIPES = (ROOT / "docs" / "recipes.md").read_text().replace("\\\n", " ")
PAGE = RECIPES.partition("\n## The paper's own settings\n")[2]
TABLE = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [[cell.strip() for cell in row] for row in TABLE[2:]]
COMMANDS = re.findall(r"^python train.py (.*)$", PAGE, re.M)


def parsed(*argv) -> train.Settings:
    """As the command line would read it, recipe included."""
    return train.check(flags.parse(train.Settings, "train.py", train.__doc__, list(argv), recipes.of))


def paper(data_set: str) -> train.Settings:
    return parsed(*next(c for c in COMMANDS if f"--data {data_set} " in c).split())


@pytest.mark.parametrize("name, r, K, C, delta, B, epochs", [
    ("mnist", 8, 12, 1e-3, 1e-5, 2000, 200), ("fashion-mnist", 8, 12, 1e-3, 1e-5, 2000, 200),
    ("cifar10", 8, 8, 1e-3, 1e-5, 80, 20), ("celeba", 16, 4, 5e-4, 1e-6, 8192, 20)])
def test_the_commands_are_the_papers_settings(name, r, K, C, delta, B, epochs):
    s = paper(name)
    assert (s.rank, s.K, s.C, s.delta, s.B) == (r, K, C, delta, B)
    assert abs(s.steps - epochs * s.N / B) <= 1 and s.N == data.KNOWN[name].N


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_types_all_that_would_follow_from_its_data(command):
    """So no recipe's base, t or layers slip in under the paper's name. (A known set has the size it has.)"""
    name, flags_typed = re.search(r"--data (\S+)", command)[1], re.findall(r"--([\w-]+)", command)
    assert recipes.of(name).keys() - {"size"} <= set(flags_typed)
    s = parsed(*command.split())
    assert (s.train, s.draws) == ("lora", "paper")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_says_what_the_commands_say_and_the_accountants_noise(row):
    for name in row[0].split(", "):
        s = paper(name)
        used = (s.rank, s.K, s.C, s.delta, s.B, s.steps)
        assert row[1:7] == [f"{x:g}" if x < 1e5 else str(x) for x in used]
    for epsilon, said in ((1, row[8]), (10, row[9])):
        assert said == f"{accountant.calibrate(epsilon, s.delta, s.B / s.N, s.steps):.3f}"


def test_the_celeba_64_settings_have_479232_adapter_weights_and_no_class_embedding():
    with torch.device("meta"):
        model, r = unet.UNet(**pretrain.UNETS["celeba64"]), paper("celeba").rank
        lora.attach(model, lora.describe("lora", r, r, model.classes is not None))
    trainable = lora.split(model)[0]
    assert sum(p.numel() for p in trainable.values()) == 479_232
    assert not any("class" in name for name in trainable)


@pytest.mark.parametrize("shape, name", [("small", "mnist"), ("cifar10", "cifar10"), ("celeba64", "celeba")])
def test_every_unet_takes_its_images(shape, name):
    c, side = data.KNOWN[name].channels, data.KNOWN[name].side
    with torch.device("meta"):
        none = torch.zeros(2, dtype=torch.long)
        out = unet.UNet(**pretrain.UNETS[shape])(torch.zeros(2, c, side, side), none, none)
    assert out.shape == (2, c, side, side)


@pytest.mark.parametrize("settings", [train.Settings, pretrain.Settings])
def test_every_flags_help_is_the_comment_beside_it(settings):
    said = flags.comments(settings)
    assert list(said) == [field.name for field in dataclasses.fields(settings)]
    assert all(map(str.strip, said.values()))


def write_cifar10(root):
    """Five images a file in the layout that torchvision unpacks."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = dict(data=PIXELS.integers(0, 256, (5, 3072), dtype=np.uint8), labels=[0, 1, 2, 3, 9])
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=list("abcdefghij"))))


def write_celeba(root):
    """Six faces, five of them for training, in the layout that torchvision unpacks."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 7)]
    for name in names:
        face = Image.fromarray(PIXELS.integers(0, 256, (218, 178, 3), dtype=np.uint8))
        face.save(folder / "img_align_celeba" / name)
    table = lambda columns: "".join(f"{name} {' '.join(['1'] * columns)}\n" for name in names)
    partition = "".join(f"{name} {int(i == 5)}\n" for i, name in enumerate(names))
    (folder / "list_eval_partition.txt").write_text(partition)
    (folder / "identity_CelebA.txt").write_text(table(1))
    for file, columns in (("list_bbox_celeba.txt", 4), ("list_landmarks_align_celeba.txt", 10),
                          ("list_attr_celeba.txt", 40)):
        (folder / file).write_text(f"6\n{' '.join('c' * columns)}\n" + table(columns))


@pytest.mark.parametrize("name, write, n, side, classes", [
    ("cifar10", write_cifar10, 25, 32, 10), ("celeba", write_celeba, 5, 64, None)])
def test_colour_data_sets_in_torchvisions_layout_run_end_to_end(name, write, n, side, classes, tmp_path,
                                                                monkeypatch):
    from torchvision.datasets import CelebA, cifar
    # the checksums are those of the real files
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(CelebA, "_check_integrity", lambda *_: True)
    write(tmp_path)
    images, labels = data.load(name, "train", tmp_path)
    assert images.shape == (n, 3, side, side) and images.dtype == torch.uint8 and len(labels) == n

    base.save(tmp_path / "base.pt", tiny_unet(classes=classes, image_channels=3))
    monkeypatch.setattr(sys, "argv", [
        "train.py", "--data", name, "--data-dir", str(tmp_path), "--base", str(tmp_path / "base.pt"),
        "--out", str(tmp_path / "run"), "--N", str(n), "--B", "3", "--K", "2", "--steps", "2", "--rank", "2",
        "--delta", "1e-3", "--device", "cpu", "--peek", "1", "--chunk", "6"])
    for module, constant, value in QUICK:
        monkeypatch.setattr(module, constant, value)
    train.main()
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "samples.png").exists() and (tmp_path / "run" / "peek-00002.png").exists()


def test_help_shows_every_default_0_and_1_too():
    parser = screen.Parser("a program")
    for flag, default in (("--none", None), ("--zero", 0), ("--one", 1.0), ("--two", 2)):
        parser.add_argument(flag, default=default, help="a number")
    parser.add_argument("--yes", action="store_true", help="a switch")
    lines = [line for line in parser.format_help().splitlines() if "a number" in line or "a switch" in line]
    assert [line.partition("a ")[2] for line in lines] == [
        "number", "number (default: 0)", "number (default: 1.0)", "number (default: 2)", "switch"]
