"""Property tests of what people who try the programs on their own images and machines run into."""
import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import accountant
import base
import data
import dpsgd
import evaluate
import lora
import pretrain
import sample
import train
import helpers
from conftest import ROOT, tiny_unet
from helpers import PUBLISHED, call, finetune, make_folder, make_place, stop_after
from machinery import checkpoint, flags, folders, pictures, screen
from support import classes, inception, recipes

COLOUR = "--base colour.pt --size 8 --N 60 --B 15 --steps 2 --seed 1".split()    # after helpers.FLAGS
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Bases, a folder of pictures and arrays with every kind of labels, made once."""
    world = make_place(tmp_path_factory.mktemp("world"))
    base.save(world / "colour.pt", tiny_unet(classes=5, image_channels=3))
    make_folder(world / "pics", sizes=[(9, 8)] * 6, classes=("a", "b"))
    pixels, four = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 4
    np.savez(world / "zero.npz", train_images=pixels, train_labels=four)
    np.savez(world / "first.npz", train_images=pixels[four == 0], train_labels=four[four == 0])
    np.savez(world / "one.npz", train_images=pixels, train_labels=four + 1)
    np.savez(world / "far.npz", train_images=pixels, train_labels=four + 10)
    np.savez(world / "none.npz", train_images=pixels, targets=four)
    return world


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def refused(result) -> str:
    """The one line of a refusal, where notes may stand before it."""
    code, _, err = result
    assert code == 2 and "Traceback" not in err, err
    return err.splitlines()[-1]


# --- images do not vanish without a word

def test_images_of_no_declared_class_are_counted_on_the_screen_and_nowhere_else(here, tmp_path):
    """And the run is, to the last byte, the run on the images that are left."""
    for name in ("zero", "first"):
        code, out, err = finetune(*COLOUR, "--data", f"npz:{name}.npz", "--classes", "a",
                                  "--out", tmp_path / name)
        assert code == 0, err
        said = "45 of 60 images have labels outside the declared classes and count as none" in err
        assert said == (name == "zero") and "45 of 60" not in out
    files = {p.name for p in (tmp_path / "zero").iterdir()}
    for name in files:
        assert (tmp_path / "zero" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    assert "adapter_model.bin" in files


@pytest.mark.parametrize("data_set, declared, got, expected", [
    ("one", "4", "labels go from 1 to 4", "labels - 1"), ("one", "w,x,y,z", "15 of 60 images", "labels - 1"),
    ("far", "4", "none of 60 images", "labels go from 10 to 13"),
    ("zero", "0-3", "--classes 0-3", "their number")])
def test_labels_that_do_not_mean_the_declared_classes_are_refused(data_set, declared, got, expected, here):
    said = refused(finetune(*COLOUR, "--data", f"npz:{data_set}.npz", "--classes", declared, "--out", "run"))
    assert got in said and expected in said, said
    assert not Path("run").exists()


def test_a_declared_class_without_images_and_images_without_labels_are_named(capsys, here):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    classes.in_places(images, torch.tensor([0, 0, 3, -1]), [0, 1, 2, 3], list("abcd"))
    said = capsys.readouterr().err
    assert "no image is of the declared classes b, c" in said and "1 of 4 images have" in said
    assert data.load("npz:none.npz", size=8)[1].unique().tolist() == [0]
    assert "none.npz has no labels, so all its images get the first class" in capsys.readouterr().err


@pytest.mark.parametrize("flag, names", [
    ("3", ["0", "1", "2"]), ('"3"', ["3"]), ("cat,dog", ["cat", "dog"]), (' "a, b" , c', ["a, b", "c"]),
    ("1,2", ["1", "2"]), ('"0-3"', ["0-3"]), ("0-9,10-19", ["0-9", "10-19"]), ("猫,犬", ["猫", "犬"])])
def test_a_class_of_any_name_can_be_declared(flag, names):
    assert classes.listed(flag) == names


@pytest.mark.parametrize("flag", ["0-3", "0..3", "0:3", "0 to 3", "0", "-4", "4.0", "10001", "[0]", "a,a",
                                  "a,,b", ","])
def test_what_is_neither_names_nor_their_number_is_refused(flag):
    with pytest.raises(ValueError, match="--classes .*expected"):
        classes.listed(flag)


def test_a_public_class_whose_name_holds_a_comma_can_be_started_from():
    model = tiny_unet(classes=2)
    model.config["names"] = ["a,b", "c"]
    rows = model.class_embedding.weight.detach().clone()
    lora.new_classes(model, ["x", "y"], '"a,b",c')
    assert torch.equal(model.class_embedding.weight, rows)


@pytest.fixture
def pics(tmp_path):
    make_folder(tmp_path / "pics", sizes=[(9, 8)] * 2, classes=("a", "b"))
    return tmp_path / "pics"


def test_what_computers_add_to_a_folder_is_no_class_and_no_image(pics, capsys):
    for place in ("__MACOSX/a/._0.png", "a/._0.png", "a/__MACOSX/1.png", "a/@eaDir/2.png", ".cache/3.png"):
        (pics / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pics / "a" / "1.png", pics / place)
    assert classes.class_names(f"folder:{pics}") == ["a", "b"]
    for declared in (None, ["a", "b"]):
        assert data.load(f"folder:{pics}", size=8, classes=declared)[1].tolist() == [0, 0, 1, 1]
    said = capsys.readouterr().err
    assert "left out (hidden or made by the system)" in said and "._0.png" in said and "@eaDir" in said
    assert data.load(f"folder:{pics}", size=8, classes=["__MACOSX", "a", "b"])[1].tolist() == [1, 1, 2, 2], \
        "declared, and empty: its files are hidden"


def test_every_picture_that_is_left_out_is_named(pics, capsys):
    shutil.copytree(pics / "b", pics.parent / "elsewhere")
    (pics / "a" / "linked").symlink_to(pics.parent / "elsewhere")
    (pics / "b" / "deep").mkdir()
    shutil.copy(pics / "a" / "1.png", pics / "b" / "deep" / "9.png")
    shutil.copy(pics / "a" / "1.png", pics / "loose.png")
    assert len(data.load(f"folder:{pics}", size=8)[0]) == 5
    said = capsys.readouterr().err
    assert "(a link to a folder): " + str(pics / "a" / "linked") in said
    assert "(a picture in no class's folder): " + str(pics / "loose.png") in said


def test_a_sub_folder_that_may_not_be_read_is_refused(pics, monkeypatch):
    (pics / "a" / "secret").mkdir()
    scan = os.scandir

    def guarded(path):                                                   # root may read everything: pretend
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match="secret cannot be read .Permission denied"):
        data.load(f"folder:{pics}", size=8)


def test_a_folder_of_another_shape_is_refused_with_the_way_to_go_on(pics, tmp_path):
    for name in ("Train", "test"):
        shutil.copytree(pics, tmp_path / "split" / name)
    shutil.copytree(pics, tmp_path / "nested" / "dataset")
    for folder, declared, meant in (("split", None, "split/Train"), ("split", ["a", "b"], "split/Train"),
                                    ("nested", ["a", "b"], "nested/dataset")):
        with pytest.raises(ValueError, match=f"did you mean folder:{tmp_path / meant}\\?"):
            data.load(f"folder:{tmp_path / folder}", size=8, classes=declared)
    with pytest.raises(ValueError, match="2 pictures directly in it.*PATH/class/image.png.*--classes image"):
        data.load(f"folder:{pics / 'a'}", size=8)
    (tmp_path / "count" / "3").mkdir(parents=True)
    with pytest.raises(ValueError, match="""declare a class that is called 3 as '"3"'"""):
        data.load(f"folder:{tmp_path / 'count'}", size=8, classes=["0", "1", "2"])


def test_unreadable_pictures_are_named_ten_at_once(pics):
    for i in range(12):
        (pics / "a" / f"broken-{i}.png").write_bytes(b"no picture")
    (pics / "a" / "broken-0.png").unlink()
    (pics / "a" / "broken-0.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError) as e:
        data.load(f"folder:{pics}", size=8)
    said = str(e.value)
    assert said.startswith("10 pictures are refused, and no further one was read: ") and "\n" not in said
    assert said.count("broken-") == 10 and "broken-0.png is not a readable image (No such file" in said, said
    assert said.endswith("; remove or replace them")


def test_a_class_is_its_name_however_unicode_spells_it(tmp_path):
    """A Mac's folder "café" may have five letters, and what is typed four."""
    make_folder(tmp_path, sizes=[(9, 8)], classes=("cafe\u0301", "the"))
    declared = classes.listed("the,caf\u00e9")
    assert data.load(f"folder:{tmp_path}", size=8, classes=declared)[1].tolist() == [1, 0]
    assert classes.class_names(f"folder:{tmp_path}") == ["caf\u00e9", "the"]


def test_files_that_are_no_pictures_are_named_where_there_is_nothing_else(tmp_path):
    (tmp_path / "my scans" / "a").mkdir(parents=True)
    (tmp_path / "my scans" / "a" / "0.dcm").touch()
    with pytest.raises(ValueError, match="no picture found, but other files: .*0.dcm; expected PATH/class"):
        data.load(f"folder:{tmp_path / 'my scans'}")
    (tmp_path / "x").mkdir()
    shutil.move(tmp_path / "my scans", tmp_path / "x" / "my scans")
    (tmp_path / "x" / "my scans" / "b").mkdir()
    with pytest.raises(ValueError, match="did you mean 'folder:.*my scans'\\?"):
        data.load(f"folder:{tmp_path / 'x'}", classes=["a", "b"])        # as it has to be typed


def test_a_declared_number_far_from_the_images_is_told_of(here, tmp_path):
    for N, told in ((60, False), (600, True)):
        code, out, err = finetune(*COLOUR, "--data", "npz:zero.npz", "--classes", "4", "--N", N,
                                  "--out", tmp_path / str(N))
        assert code == 0 and "found" not in out, err
        assert ("60 images found, and --N declares 600" in err) == told


def test_a_warning_of_pillows_names_its_file(pics, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)                   # these have 72
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.load(f"folder:{pics}", size=8)[0]) == 4
    assert f"read with a warning: {pics / 'a' / '0.png'} (Image size (72 pixels)" in capsys.readouterr().err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(ValueError, match="0.png is not a readable image .Image size"):
        data.load(f"folder:{pics}", size=8)


# --- files with several pictures, and with 16 bits

def test_the_first_of_a_phones_pictures_is_the_picture_and_an_animation_is_none(tmp_path):
    for name, kind in (("phone.jpg", "MPO"), ("slide.tif", "TIFF"), ("moves.gif", "GIF")):
        red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
        red.save(tmp_path / name, format=kind, save_all=True, append_images=[blue])
    assert pictures.picture(tmp_path / "phone.jpg", 16)[:, 8, 8].tolist() == pytest.approx([254, 0, 0], abs=3)
    for name in ("slide.tif", "moves.gif"):
        with pytest.raises(ValueError, match="frames, expected one"):
            pictures.picture(tmp_path / name, 16)


def test_smaller_copies_in_a_tiff_are_no_further_pictures(tmp_path):
    from PIL import TiffImagePlugin
    red, blue = (Image.new("RGB", (16, 16), name) for name in ("red", "blue"))
    small, tags = blue.resize((8, 8)), TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1                                                        # NewSubfileType: reduced resolution
    small.encoderinfo = dict(tiffinfo=tags)
    red.save(tmp_path / "slide.tif", save_all=True, append_images=[small])
    assert pictures.picture(tmp_path / "slide.tif", 16)[:, 8, 8].tolist() == [255, 0, 0]


def twelve_bits(folder, top=4_080):
    """folder/a/0.png .. 5.png: grey of 16 bits, 0 to `top`."""
    (folder / "a").mkdir(parents=True)
    for i in range(6):
        levels = RNG.integers(0, top + 1, (8, 8), dtype=np.uint16)
        levels[0, 0], levels[0, 1] = 0, top
        Image.fromarray(levels).save(folder / "a" / f"{i}.png")
    return folder


def test_twelve_bits_in_sixteen_are_told_of_and_their_white_can_be_declared(tmp_path, capsys):
    folder = twelve_bits(tmp_path / "deep")
    dark = data.load(f"folder:{folder}", size=8, channels=1)[0]
    assert dark.max() == 16 and "say --white 4095" in capsys.readouterr().err
    bright = data.load(f"folder:{folder}", size=8, channels=1, white=4095)[0]
    assert bright.max() == 254 and bright.min() == 0 and not capsys.readouterr().err
    assert data.load(f"folder:{folder}", size=8, channels=1, white=4000)[0].max() == 255
    assert "6 of 6 images of 16 bits have levels above --white 4000" in capsys.readouterr().err
    levels = np.stack([np.asarray(Image.open(folder / "a" / f"{i}.png")) for i in range(6)])
    np.savez(tmp_path / "deep.npz", arr_0=levels)
    for white, pixels in ((65535, dark), (4095, bright)):
        assert torch.equal(data.load(f"npz:{tmp_path / 'deep.npz'}", size=8, white=white)[0], pixels)


def test_twelve_bits_in_colour_are_told_of_and_no_white_is_made_up_for_them(tmp_path, capsys):
    """Pillow reads the upper 8 of 16 bits in colour, so that 12 bits leave 16 levels."""
    from PIL import PngImagePlugin                                       # Pillow alone writes no such file
    def save(place, deep):
        place.mkdir(parents=True)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
        with open(place / "0.png", "wb") as f:
            f.write(b"\x89PNG\r\n\x1a\n")
            PngImagePlugin.putchunk(f, b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
            PngImagePlugin.putchunk(f, b"IDAT", zlib.compress(rows))
            PngImagePlugin.putchunk(f, b"IEND", b"")
    save(tmp_path / "pics" / "a", RNG.integers(0, 4_081, (8, 8, 3), dtype=np.uint16))
    assert data.load(f"folder:{tmp_path / 'pics'}", size=8)[0].max() < 16
    assert "0.png (colour of 16 bits, at most a quarter" in capsys.readouterr().err
    save(tmp_path / "bright" / "a", RNG.integers(0, 65_536, (8, 8, 3), dtype=np.uint16))
    assert data.load(f"folder:{tmp_path / 'bright'}", size=8)[0].max() > 200
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="too few for --white 4095; save it with 8 bits"):
        data.load(f"folder:{tmp_path / 'pics'}", size=8, white=4095)


def test_the_usual_white_gives_the_levels_that_it_always_gave():
    every = np.arange(65_536)
    assert np.array_equal(pictures.eight_bits(every, 65_535), (every + 128) // 257)
    assert np.array_equal(pictures.eight_bits(np.arange(256), 255), np.arange(256))


def test_a_file_that_says_its_own_white_keeps_it(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 8 8 4095\n" + np.full((8, 8), 4095, ">u2").tobytes())
    for white in (65_535, 4095):
        assert pictures.picture(tmp_path / "x.pgm", 8, white=white).unique().tolist() == [255]


def test_the_declared_white_is_the_runs_and_evaluations(here, tmp_path):
    twelve_bits(tmp_path / "deep")
    how = ["--data", f"folder:{tmp_path / 'deep'}", "--classes", "a", "--size", 8, "--white", 4095]
    with stop_after(3):
        assert finetune(*how, "--out", tmp_path / "run")[0] == 1
    said = refused(finetune(*how, "--white", 2047, "--out", tmp_path / "run", "--resume"))
    assert "white: 4095 then, 2047 now" in said
    code, out, err = finetune(*how, "--out", tmp_path / "run", "--resume")
    assert code == 0 and "--white" not in err, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["white"] == 4095
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluate, "measure", lambda *_: {})
        m.setattr(evaluate, "nearest", lambda images, real: seen.append(real) or 1 / 0)
        for more in ([], ["--white", "65535"]):
            call(evaluate.main, tmp_path / "run", *how[:2], "--n", 4, "--steps", 2, "--fast",
                 "--device", "cpu", *more)
    assert [int(real.max()) for real in seen] == [254, 16]
    assert "1 to 65535" in refused(finetune("--white", 0))


# --- arrays

@pytest.mark.parametrize("arrays, says", [
    (dict(images=np.array([np.zeros((2, 2)), np.zeros((3, 3))], dtype=object)), "objects.*np.stack"),
    (dict(arr_0=np.zeros((4, 8, 8))), r"float64.*\(255 \* images\).round"),
    (dict(arr_0=np.zeros((4, 8, 8), np.int64)), r"int64.*astype\(np.uint8\)"),
    (dict(arr_0=np.zeros((4, 8, 8), bool)), r"255 \* images"),
    (dict(images=np.zeros((4, 8, 8), np.uint8)), r"images\[:, None\]"),
    (dict(arr_0=np.zeros((4, 8, 8), np.uint8), arr_1=np.eye(4)), "one-hot.*argmax"),
    (dict(arr_0=np.zeros((4, 8, 8), np.uint8), arr_1=np.zeros(4)), r"astype\(np.int64\)"),
    (dict(arr_0=np.zeros((4, 8, 8), np.uint8), arr_1=np.array(list("abcd"))), "np.unique")])
def test_arrays_of_another_kind_are_refused_with_the_cure(arrays, says, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=says) as e:
        folders.npz_arrays(tmp_path / "x.npz")
    assert "\n" not in str(e.value)


CLASS_NAMES = ("ValueError", "TypeError", "KeyError", "UnpicklingError", "BadZipFile", "EOFError",
               "Unidentified", "RuntimeError", "JSONDecodeError")


def test_no_refusal_of_a_file_shows_an_exceptions_class(here, tmp_path, monkeypatch):
    """A file of zero bytes, half a file, text, a list, a single array in place of every kind of file."""
    whole = Path("colour.pt").read_bytes()
    torch.save([1, 2], tmp_path / "list")
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = [b"", whole[:900], b"text", b"{", (tmp_path / "list").read_bytes(),
                (tmp_path / "array.npy").read_bytes(), b"\xff\xfe\x00", b"PK\x03\x04"]
    (tmp_path / "pics" / "a").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    readers = {
        "base.pt": base.load, "coder.pt": pretrain.autoencoder.load, "x.npz": folders.npz_arrays,
        "pics/a/0.png": lambda path: data.load(f"folder:{path.parent.parent}"),
        "privacy.json": accountant.read_run,
        "cells64.zip": lambda path: data.load("cells", "train", path.parent),
        "checkpoint.pt": lambda path: checkpoint.load(path, {}),
        "run/adapter_model.bin": lambda path: lora.load(tiny_unet(), path.parent),
        "inception.pth": inception.FIDInception}
    (run / "adapter_config.json").write_text(json.dumps(lora.describe("lora", 2, 3.0, True)))
    for name, read in readers.items():
        for content in contents:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError) as e:
                read(tmp_path / name)
            said = str(e.value)
            assert not any(word in said for word in CLASS_NAMES) and "\n" not in said, f"{name}: {said}"



# --- paths

def test_a_tilde_is_the_home_folder_in_every_path(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    typed = ["--data", "folder:~/pics", "--out=~/run", "--base=~/b.pt", "--data-dir=~", "--classes", "~,~a",
             "--start", "~"]
    s = flags.parse(train.Settings, "train.py", "-", typed)
    assert (s.data, s.out) == (f"folder:{tmp_path}/pics", f"{tmp_path}/run")
    assert (s.base, s.data_dir, s.classes, s.start) == (f"{tmp_path}/b.pt", str(tmp_path), "~,~a", "~")
    p = screen.Parser("-")
    for name in ("--npz", "--inception"):
        p.add_argument(name)
    p.add_argument("compose", nargs="*")
    a = p.parse_args(["--npz", "~/s.npz", "--inception=~/i", "~/a", "b/~"])
    assert [a.npz, a.inception] == [f"{tmp_path}/{name}" for name in ("s.npz", "i")]
    assert a.compose == [f"{tmp_path}/a", "b/~"]
    shutil.copytree("pics", tmp_path / "pics")
    code, _, err = finetune(*COLOUR, "--data", "folder:~/pics", "--classes", "a,b", "--out=~/run")
    assert code == 0 and (tmp_path / "run" / "privacy.json").exists() and not Path("~").exists(), err
    assert call(sample.main, "~/run", "--npz=~/s.npz", "--n", 1, "--steps", 1, "--base", "colour.pt")[0] == 0
    assert (tmp_path / "s.npz").exists()


def test_a_kind_that_was_forgotten_is_offered(here):
    for typed, meant in (("zero.npz", "npz:zero.npz"), ("pics", "folder:pics"), ("MNIST", "mnist"),
                         ("cifar-10", "cifar10")):
        for said in (refused(finetune("--data", typed)), refused(call(pretrain.main, "--data", typed)),
                     refused(call(evaluate.main, "zero.npz", "--data", typed))):
            assert f"did you mean {meant}?" in said, said
    for typed, meant in (("folder:zero.npz", "npz:zero.npz"), ("npz:pics", "folder:pics")):
        said = refused(finetune(*COLOUR, "--data", typed, "--classes", "a,b"))
        assert f"did you mean {meant}?" in said, said
    assert "expected one of" in refused(finetune("--data", "folder:"))


def test_sample_writes_arrays_under_a_name_that_evaluate_knows(here, tmp_path):
    assert finetune("--out", tmp_path / "run")[0] == 0
    few = "--n 1 --steps 1 --device cpu --base base.pt".split()
    said = refused(call(sample.main, tmp_path / "run", *few, "--npz", tmp_path / "foo"))
    assert "ends in .npz" in said
    code, out, _ = call(sample.main, tmp_path / "run", *few, "--npz", tmp_path / "A.NPZ")
    assert code == 0 and out.endswith("A.NPZ (1 image)\n")
    shutil.copy(tmp_path / "A.NPZ", tmp_path / "renamed")
    for name in ("A.NPZ", "renamed"):                                    # arrays, of one image: too few
        assert "expected n >= 2" in refused(call(evaluate.main, tmp_path / name))


def test_samples_of_another_data_set_are_told_to_name_it(here, tmp_path):
    np.savez(tmp_path / "cells.npz", images=np.zeros((8, 3, 8, 8), np.uint8), labels=np.arange(8),
             classes=np.array([*data.CELLS[:7], "7"]))
    said = refused(call(evaluate.main, tmp_path / "cells.npz"))
    assert "pass --data" in said and "basophil" in said and "base" not in said.replace("basophil", ""), said


# --- defaults that a small or a large set would make illegal

@pytest.mark.parametrize("argv, B, delta", [
    ("--data folder:x --N 60", 15, 1e-5), ("--data npz:x --N 3", 1, 1e-5),
    ("--data folder:x --N=100000", 1024, 1e-6), ("--data folder:x --N 5000000", 1024, 1e-7),
    ("--data mnist --N 400", 100, 1e-5), ("", 512, 1e-5),
    ("--data cells", 1024, 1e-5), ("--data celeba", 1024, 1e-6), ("--data folder:x --N 60 --B 40", 40, 1e-5)])
def test_defaults_follow_the_declared_number_and_are_legal(argv, B, delta):
    s = train.check(flags.parse(train.Settings, "train.py", "-", argv.split(), recipes.of))
    assert (s.B, s.delta) == (B, delta)
    assert recipes.B == train.Settings.B


def test_what_is_too_little_is_refused_in_words(here, tmp_path):
    make_folder(tmp_path / "one", sizes=[(40, 40)], classes=("a",))
    said = refused(call(pretrain.main, "autoencoder", "--data", f"folder:{tmp_path / 'one'}", "--out",
                        tmp_path / "coder.pt", "--device", "cpu"))
    assert "has 1 image; expected at least 2" in said
    assert "--out : expected a folder" in refused(finetune("--out", ""))


def test_a_number_that_nobody_typed_is_not_held_against_anybody(here):
    said = refused(finetune("--data", "npz:zero.npz", "--N", 0))
    assert "declare the number of its images with --N" in said
    argv = "--data npz:zero.npz --N 60 --classes 4 --base lost.pt --delta 1e-3"
    code, _, err = call(train.main, *argv.split())
    assert code == 2 and "lost.pt" in err and "--B" not in err, "the default B of 60 images is legal"


# --- streams

def program(line: str, here, **environment) -> subprocess.CompletedProcess:
    """A shell's command line, with PYTHON train.py as $TRAIN and PYTHON sample.py as $SAMPLE."""
    run = (f"{sys.executable} {ROOT}/tests/helpers.py --data npz:zero.npz --classes 4 --size 8 "
           f"--base colour.pt --N 60 --steps 2 --rank 2 --delta 1e-3 --device cpu --seed 1")
    draw = f"{sys.executable} {ROOT}/sample.py --n 1 --steps 1 --device cpu"
    return subprocess.run(line, shell=True, capture_output=True, cwd=here, executable="/bin/bash",
                          env=dict(os.environ, TRAIN=run, SAMPLE=draw, **environment))


def test_what_the_encoding_of_a_log_lacks_becomes_backslashes_and_closed_streams_stop_nothing(here, tmp_path):
    """>&- and 2>&-: and what is said goes into no file that happens to get their number."""
    out = tmp_path / "输出"
    line = f"$TRAIN --out {out} && $SAMPLE {out} --base colour.pt --out {tmp_path}/ü输.png >&- 2>&- <&-"
    done = program(line, here, PYTHONIOENCODING="cp1252")
    said = done.stdout.decode("cp1252")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done
    assert r"next: python sample.py" in said and r"\u8f93\u51fa" in said
    assert Image.open(tmp_path / "ü输.png").size
    assert sorted(p.name for p in out.iterdir()) == list(PUBLISHED)


def test_training_with_closed_streams_is_training(here, tmp_path):
    """>&- 2>&- as Python sees it, in a fork of this process: closed descriptors, and no streams."""
    def argv(out):
        how = "--data npz:zero.npz --classes 4 --out".split()
        return [*helpers.FLAGS, *COLOUR, *how, str(tmp_path / out)]
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            for descriptor in (0, 1, 2):
                os.close(descriptor)
            sys.stdout = sys.stderr = None
            sys.argv = ["train.py", *argv("closed")]
            for module, name, value in helpers.QUICK:
                setattr(module, name, value)
            train.main()
            assert os.path.samefile("/dev/fd/1", os.devnull) and os.path.samefile("/dev/fd/2", os.devnull)
            os._exit(0)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    code, _, err = finetune(*argv("open"), picture=True)
    assert code == 0, err
    for name in PUBLISHED:
        assert (tmp_path / "open" / name).read_bytes() == (tmp_path / "closed" / name).read_bytes(), name


def test_the_words_of_a_picture_whose_name_the_encoding_lacks_are_said(here, tmp_path, monkeypatch):
    """In this process, with a stream as Windows has it in a redirected log."""
    assert finetune("--out", tmp_path / "run")[0] == 0
    log = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "run"), *"--n 1 --steps 1 --base base.pt "
                                      "--device cpu --out".split(), str(tmp_path / "ü输.png")])
    sample.main()
    log.flush()
    assert r"\u8f93.png (1 image)" in log.buffer.getvalue().decode("cp1252")
    assert screen.Parser("x").format_help() and log.errors == "backslashreplace"


def screen_alone(line: str) -> subprocess.CompletedProcess:
    return subprocess.run(line.replace("PY ", sys.executable + " "), shell=True, capture_output=True,
                          text=True, cwd=ROOT, executable="/bin/bash")


@pytest.mark.parametrize("line, code, out, err", [
    ("PY accountant.py --help >&-", 0, "", ""), ("PY accountant.py --epsilon x 2>&-", 2, "", ""),
    ("PY accountant.py --epsilon 10 > /dev/full", 2, "", "lost (No space left on device), but its work is"),
    ("PYTHONIOENCODING=ascii PY accountant.py", 0, r"R\xe9nyi", ""),
    ("PYTHONIOENCODING=ascii PY accountant.py compose 输.json", 2, "", r"\u8f93.json is not a privacy.json"),
    ("PY -m machinery.screen 2> >(true) | tail -1", 0, "line 99999 of 100,000", "")])
def test_every_program_speaks_into_any_stream(line, code, out, err):
    done = screen_alone(line)
    assert done.returncode == code and "Traceback" not in done.stderr, done
    assert out in done.stdout and err in done.stderr, done


def test_bars_and_notes_survive_a_terminal_that_is_gone(monkeypatch):
    class Gone(io.StringIO):
        encoding = "cp1252"

        def write(self, text):
            raise OSError(5, "Input/output error")

        def fileno(self):
            return nowhere.fileno()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(Gone()):
        with screen.one_line("x.py", "nothing"):
            folders.note("输")
            assert list(screen.bar(range(3), "输", "thing")) == [0, 1, 2]


# --- signals

def press(number: int, step: int):
    """A context in which the given step of the private run gets a signal, twice."""
    @contextlib.contextmanager
    def context():
        calls, real = [], dpsgd.private_gradient

        def during(*args, **settings):
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(number)
                signal.raise_signal(number)
            return real(*args, **settings)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(dpsgd, "private_gradient", during)
            yield
    return context()


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Also where pytest itself was started with nohup, or by a program that ignores some of them."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(world):
    with pytest.MonkeyPatch.context() as m:
        m.chdir(world)
        assert finetune("--out", "whole", "--seed", 4)[0] == 0
    return world / "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [3, 6])
def test_a_time_limit_and_a_closed_terminal_save_the_step(number, step, whole, here, tmp_path):
    """Sent twice, as a terminal does; also in the last step, after which there are files to write."""
    before, out = signal.getsignal(number), tmp_path / "run"
    with press(number, step):
        code, _, err = finetune("--out", out, "--seed", 4)
    assert code == 1 and f"stopped after step {step} of 6" in err and "--resume" in err, err
    assert [p.name for p in out.iterdir()] == ["checkpoint.pt"] and signal.getsignal(number) == before
    code, _, err = finetune("--out", out, "--seed", 4, "--resume")
    assert code == 0, err
    for name in ("adapter_model.bin", "metrics.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_nohup_is_heard(whole, here, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with press(signal.SIGHUP, 3):
            assert finetune("--out", tmp_path / "run", "--seed", 4)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_samples_are_drawn_ends_the_run_and_resume_finishes_it(number, whole, here, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sample, "generate", lambda *_, **__: signal.raise_signal(number))
        code, _, err = finetune("--out", out, "--seed", 4, picture=True)
    last = err.splitlines()[-1]
    assert code == 1 and last.startswith(f"stopped while the files of {out} were written"), err
    assert "all 6 steps" in err and "--resume finishes the run" in err
    assert (out / "checkpoint.pt").exists() and not (out / "privacy.json").exists()
    assert finetune("--out", out, "--seed", 4, "--resume", picture=True)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == list(PUBLISHED)
    assert (out / "adapter_model.bin").read_bytes() == (whole / "adapter_model.bin").read_bytes()


def test_a_signal_before_the_first_step_leaves_nothing_and_resume_says_so(here, tmp_path):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(folders, "load_npz", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        code, _, err = finetune(*COLOUR, *"--data npz:zero.npz --classes 4 --out".split(), tmp_path / "run")
    assert code == 143 and "interrupted by SIGTERM" in err, err
    assert not (tmp_path / "run").exists()
    assert "no step was saved there" in refused(finetune("--out", tmp_path / "run", "--resume"))


def test_a_process_that_gets_sigterm_saves_its_step(here, tmp_path):
    child = os.fork()                                                    # torch is imported already
    if not child:
        with contextlib.suppress(BaseException):
            code, _, err = finetune("--out", tmp_path / "run", "--steps", 5000)
            (tmp_path / "said").write_text(err)
            os._exit(code)
        os._exit(99)
    deadline = time.time() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)                                       # our own child, by its id
    code, said = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), (tmp_path / "said").read_text()
    assert code == 1 and "stopped after step" in said and "Traceback" not in said, said
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def pretraining(out, **changed) -> pretrain.Settings:
    return pretrain.Settings(**dict(steps=4, batch=2, device="cpu", out=str(out)) | changed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_pretraining_saves_its_step_too(number, tmp_path, monkeypatch):
    real, calls = pretrain.ddpm.draw_t_and_noise, []

    def during(*a, **k):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return real(*a, **k)
    monkeypatch.setattr(pretrain.ddpm, "draw_t_and_noise", during)
    argv = ["--steps", 4, "--batch", 2, "--device", "cpu", "--out", tmp_path / "base.pt"]
    code, _, err = call(pretrain.main, *argv)
    assert code == 1 and "stopped after step 2 of 4; go on with --resume" in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["base.pt.checkpoint"]
    assert call(pretrain.main, *argv, "--resume")[0] == 0 and base.load(tmp_path / "base.pt").model


def test_pretraining_is_saved_by_the_clock_too(tmp_path, monkeypatch):
    saved, save = [], checkpoint.save

    def watched(path, state, **how):
        saved.append(state.get("step"))
        save(path, state, **how)
    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(checkpoint, "SECONDS", -1)
    pretrain.pretrain(pretraining(tmp_path / "base.pt"))
    assert saved == [1, 2, 3, 4, None], "and the base itself"


# --- waits

def test_a_wait_is_told_of_in_a_log_and_not_where_bars_are_hidden(monkeypatch, capsys):
    monkeypatch.setattr(screen, "PATIENCE", 0.05)
    monkeypatch.setattr(screen, "AGAIN", 0.05)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for _ in screen.bar(range(3), "reading pictures", "picture"):
        time.sleep(0.07)
    said = capsys.readouterr().err
    assert "reading pictures takes a while, 0 of 3 (0 s so far)\n" in said and ", 2 of 3" in said, said
    with screen.waiting("drawing samples.png"):
        time.sleep(0.15)
    assert capsys.readouterr().err.startswith("drawing samples.png takes a while (0 s so far)\n")
    monkeypatch.setattr(screen, "PATIENCE", 5)
    with screen.waiting("a moment"):
        time.sleep(0.06)
    assert not capsys.readouterr().err, "a wait of less than five seconds needs no word"
    monkeypatch.setattr(screen, "PATIENCE", 0.02)
    for name, value in (("TQDM_DISABLE", "1"), ("RANK", "1")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            for _ in screen.bar(range(2), "reading", "picture"):
                time.sleep(0.05)
            with screen.waiting("drawing"):
                time.sleep(0.05)
    assert not capsys.readouterr().err
    deadline = time.time() + 5
    while any(thread.name == "waiting" for thread in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "waiting" for thread in threading.enumerate()), "no thread stays behind"


def test_every_long_wait_speaks(here, tmp_path, monkeypatch, capsys):
    """Reading, calibrating, encoding, drawing: with no patience at all, each has its line in a log."""
    monkeypatch.setattr(screen, "PATIENCE", 0.0)
    monkeypatch.setattr(screen, "AGAIN", 0.1)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    code, _, err = finetune(*COLOUR, "--data", "folder:pics", "--classes", "a,b", "--out", tmp_path / "run",
                            picture=True)
    assert code == 0, err
    for what in ("reading pictures takes a while", "finding the noise by --accountant rdp takes a while",
                 f"writing the files of {tmp_path / 'run'}, samples.png among them, takes a while"):
        assert what in err, f"{what}: {err}"
    code, _, err = call(sample.main, tmp_path / "run", "--n", 2, "--steps", 2, "--base", "colour.pt", "--out",
                        tmp_path / "g.png")
    assert code == 0 and "sampling takes a while, 0 of 2" in err, err
