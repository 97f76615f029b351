"""Property tests of the images.

The public ones are drawn, deterministic and framed; the private ones are read or refused.
"""
import gzip

import numpy as np
import pytest
import torch
from PIL import Image

import base
import data
import unet
from conftest import tiny_unet
from drawings import glyphs
from helpers import make_folder, write_idx
from machinery import pictures
from support import classes, runs


def test_glyphs_have_the_documented_shape_range_and_frame():
    images, labels = glyphs.draw(2000, torch.Generator().manual_seed(0))
    assert images.shape == (2000, 1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() >= -1 and images.max() <= 1
    assert sorted(labels.unique().tolist()) == list(range(10))
    ink = (images + 1) / 2
    assert ink.flatten(1).sum(1).min() > 10, "no image is empty"
    axis = torch.arange(28.0)
    for side in (2, 3):
        centre = (ink.sum(5 - side) * axis).sum(-1) / ink.sum((2, 3))
        assert (centre - 13.5).abs().mean() < 1.0, "centre of mass in the middle"
    rim = torch.ones(28, 28, dtype=torch.bool)
    rim[2:-2, 2:-2] = False
    assert (ink[:, 0][:, rim].mean() < 0.02), "the ink stays in the middle box"


def test_glyphs_depend_on_the_generator_alone():
    draw = lambda seed: glyphs.draw(50, torch.Generator().manual_seed(seed))[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_each_digit_is_written_in_several_ways():
    assert set(glyphs.STROKES) == set(range(10))
    assert all(len(ways) >= 3 for ways in glyphs.STROKES.values())


def test_mnist_ships_whole():
    for split, n in (("train", 60_000), ("test", 10_000)):
        images, labels = data.load("mnist", split)
        assert images.shape == (n, 1, 28, 28) and images.dtype == torch.uint8 and labels.shape == (n,)
        assert torch.bincount(labels).min() > 0.08 * n
    assert data.KNOWN["mnist"].N == 60_000


def test_uint8_and_float_are_inverse():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(x)), x)
    assert data.to_float(x).min() == -1 and data.to_float(x).max() == 1


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
def test_gzipped_fashion_files_are_found_in_data_dir(tmp_path, where):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(folder, x, np.arange(5, dtype=np.uint8))
    images, labels = data.load("fashion-mnist", "train", tmp_path)
    assert np.array_equal(images[:, 0].numpy(), x) and labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist"])
def test_files_in_the_folder_of_all_data_sets_are_not_taken_for_those_of_another(name, tmp_path, monkeypatch):
    """The files of MNIST, Fashion-MNIST and KMNIST have the same names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    write_idx(tmp_path / "datasets", np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8))
    monkeypatch.setattr(data, "read_torchvision", lambda kind, *_: pytest.fail(f"downloads {kind}"))
    with pytest.raises(pytest.fail.Exception, match="downloads"):
        data.load(name)


@pytest.mark.parametrize("damage, says", [
    (lambda b: b[:len(b) // 2], "truncated"), (lambda b: b"hello", "truncated or not a gzip"),
    (lambda b: gzip.compress(gzip.decompress(b)[:-1]), "not an idx file"),
    (lambda b: gzip.compress(b"\0\0\x0d\3" + bytes(90)), "not an idx file"),
    (lambda b: gzip.compress(b""), "not an idx file")])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, says):
    write_idx(tmp_path, np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=says) as e:
        data.load("mnist", "train", tmp_path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_a_folder_of_pictures_is_resized_cropped_and_labelled(tmp_path):
    make_folder(tmp_path / "pictures")
    images, labels = data.load(f"folder:{tmp_path / 'pictures'}", size=24)
    assert images.shape == (6, 3, 24, 24) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_unreadable_picture_or_an_empty_folder_is_named(tmp_path):
    make_folder(tmp_path / "pictures")
    (tmp_path / "pictures" / "cats" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0.png is not a readable image"):
        data.load(f"folder:{tmp_path / 'pictures'}")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="expected PATH/class/image.png"):
            data.load(f"folder:{path}")


@pytest.mark.parametrize("name, split", [("mnits", "train"), ("mnist", "validation"), ("", "train")])
def test_unknown_names_are_refused(name, split):
    with pytest.raises(ValueError, match="expected"):
        data.load(name, split)


def test_classes_without_a_name_are_called_by_their_numbers():
    model = tiny_unet(classes=5)
    model.config["names"] = ["cat", "dog"]
    run = runs.Run(None, model, None, "", classes=["red", "green", "blue"], labels=[0, 1, 2])
    assert runs.class_names(run) == ["red", "green", "blue", "3", "4"]


# --- what a viewer shows is what is trained

def saved(path, pixels, mode=None, **how):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path, **how)
    return path


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    pixels = np.full((16, 16), 257 * 100, np.uint16)
    assert pictures.picture(saved(tmp_path / "deep.png", pixels), 16).unique().tolist() == [100]


def test_transparency_lies_on_white(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)                              # black, and wholly transparent
    assert pictures.picture(saved(tmp_path / "clear.png", clear), 16).unique().tolist() == [255]
    clear[..., 3] = 255
    assert pictures.picture(saved(tmp_path / "solid.png", clear), 16).unique().tolist() == [0]


def test_a_photograph_stands_as_its_exif_says(tmp_path):
    from PIL import Image
    pixels, exif = np.zeros((16, 16, 3), np.uint8), Image.Exif()
    pixels[:8] = 255                                                     # the upper half is white
    exif[0x0112] = 6                                                     # to be turned right by a quarter
    turned = pictures.picture(saved(tmp_path / "photo.png", pixels, exif=exif), 16)
    assert turned[:, :, 8:].min() == 255 and turned[:, :, :8].max() == 0, "the right half is white"


@pytest.mark.parametrize("name, pixels, says", [
    ("float.tif", np.full((16, 16), 0.5, np.float32), "floating-point"),
    ("colour.png", np.eye(3, dtype=np.uint8)[None] * 255, "3 channels")])
def test_a_picture_whose_grey_levels_are_not_known_is_refused_by_name(name, pixels, says, tmp_path):
    with pytest.raises(ValueError, match=f"{name} .*{says}"):
        pictures.picture(saved(tmp_path / name, pixels), 16, channels=1)


def test_a_grey_folder_is_read_as_grey(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    saved(tmp_path / "a" / "grey.png", pixels)
    saved(tmp_path / "a" / "same.png", np.stack([pixels] * 3, 2))     # stored as colour, all channels alike
    images, _ = data.load(f"folder:{tmp_path}", size=16, channels=1)
    assert images.shape == (2, 1, 16, 16) and torch.equal(images[0], images[1])
    assert np.array_equal(images[0, 0].numpy(), pixels)


# --- whose class is it

def test_hidden_folders_are_no_classes_and_numbers_are_counted_as_people_do(tmp_path):
    make_folder(tmp_path, sizes=((20, 20),), classes=[str(i) for i in range(12)])
    make_folder(tmp_path, sizes=((20, 20),), classes=[".ipynb_checkpoints"])
    (tmp_path / "3" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "3" / ".ipynb_checkpoints" / "0.png").write_bytes((tmp_path / "3" / "0.png").read_bytes())
    assert classes.class_names(f"folder:{tmp_path}") == [str(i) for i in range(12)]
    assert data.load(f"folder:{tmp_path}", size=16)[1].tolist() == list(range(12))


def test_what_is_left_out_and_what_is_there_twice_is_named_on_the_screen(tmp_path, capsys):
    make_folder(tmp_path, sizes=((20, 20), (20, 30)), classes=["a"])
    (tmp_path / "a" / "copy.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    (tmp_path / "a" / "scan.xyz").touch()
    from PIL import Image
    Image.open(tmp_path / "a" / "1.png").save(tmp_path / "a" / "2.gif")     # not on torchvision's list
    assert len(data.load(f"folder:{tmp_path}", size=16)[0]) == 4
    said = capsys.readouterr().err
    assert "left out (no picture that can be read here): " in said and "scan.xyz" in said
    assert "exact copies of other files, 1 of them" in said and "copy.png = " in said


def test_a_class_is_found_by_its_declared_name_whatever_sub_folders_exist(tmp_path):
    make_folder(tmp_path, sizes=((20, 20),), classes=["dog", "horse"])
    known = ["cat", "dog", "horse"]
    labels = data.load(f"folder:{tmp_path}", size=16, classes=known)[1]
    assert labels.tolist() == [1, 2], "not 0 and 1: dogs are no cats"
    assert classes.declared(f"folder:{tmp_path}", "", known) == known
    assert classes.place(known, known, 3) == [0, 1, 2]
    assert classes.place(["horse", "cat"], known, 3) == [2, 0], "by name"
    for base_names in (known, None):
        assert classes.place(["goat", "cow"], base_names, 3) == [0, 1], "in order"
    for names in (["dog", "cow"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match="do not fit"):
            classes.place(names, known, 3)


def test_a_label_below_0_is_of_no_declared_class_and_its_image_counts_as_none(tmp_path):
    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.array([[0], [-1], [1]]))
    everything, labels = data.load(f"npz:{tmp_path / 'x.npz'}", size=8)
    kept, numbers = classes.in_places(everything, labels, [4, 5])
    assert torch.equal(kept, torch.from_numpy(images[[0, 2], None])) and numbers.tolist() == [4, 5]
    with pytest.raises(ValueError, match="labels from -1 to 1; expected 0 to 9"):
        base.fits(unet.UNet(), everything, labels, "x")                  # where no class is declared


# --- arrays

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
NPZ = {
    "sample.py": (dict(images=PIXELS.transpose(0, 3, 1, 2), labels=np.arange(5)), [0, 1, 2, 3, 4]),
    "MedMNIST": (dict(train_images=PIXELS, train_labels=np.arange(5, dtype=np.uint8)[:, None],
                      test_images=PIXELS[:1], test_labels=np.full((1, 1), 4, np.uint8)), [0, 1, 2, 3, 4]),
    "guided-diffusion": (dict(arr_0=PIXELS), [0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", NPZ)
def test_arrays_of_every_kind_are_read(kind, tmp_path):
    arrays, expected = NPZ[kind]
    np.savez(tmp_path / "a.npz", **arrays)
    images, labels = data.load(f"npz:{tmp_path / 'a.npz'}", size=16)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PIXELS) and labels.tolist() == expected
    assert data.load(f"npz:{tmp_path / 'a.npz'}", size=8)[0].shape == (5, 3, 8, 8)
    if kind == "MedMNIST":
        assert data.load(f"npz:{tmp_path / 'a.npz'}", "test", size=16)[1].tolist() == [4]


def test_unpacked_files_of_mnist_are_read_too(tmp_path):
    write_idx(tmp_path, np.full((5, 28, 28), 7, np.uint8), np.arange(5, dtype=np.uint8))
    for file in list(tmp_path.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    images, labels = data.load("mnist", "train", tmp_path)
    assert images.unique().tolist() == [7] and labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("images, labels", [
    (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)),        # floats, of whatever range
    (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
    (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
    (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4)),
    (np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64))])
def test_a_reader_that_returns_something_else_is_refused_by_name(images, labels, tmp_path, monkeypatch):
    mine = data.DataSet(4, 1, 8, ("a",), lambda root, split: (images, labels))
    monkeypatch.setitem(data.KNOWN, "mine", mine)
    with pytest.raises(ValueError, match=r"the reader of mine returned .*expected a uint8 tensor \(N, C, H"):
        data.load("mine", "train", tmp_path)


def test_a_bug_in_a_reader_is_not_called_a_missing_file(tmp_path, monkeypatch):
    def wrong(root, split):
        return nonsense                                                  # noqa: F821
    monkeypatch.setitem(data.KNOWN, "mine", data.DataSet(4, 1, 8, ("a",), wrong))
    with pytest.raises(NameError):
        data.load("mine", "train", tmp_path)


@pytest.mark.parametrize("kind, bits", [("mnist", 8), ("folder", 8), ("folder", 16), ("npz", 8), ("npz", 16)])
def test_an_image_is_read_the_same_in_any_company(kind, bits, tmp_path):
    """Black, white or a size taken from all images would let one of them change the others."""
    rng, white, dtype = np.random.default_rng(1), 2**bits - 1, f"uint{bits}"
    dull = [rng.integers(white // 3, white // 2, (8, 8)).astype(dtype) for _ in range(3)]
    larger = (12, 10) if kind == "folder" else (8, 8)
    company = [np.zeros(larger, dtype), np.full(larger, white, dtype)]

    def read(name, images):
        (tmp_path / name / "a").mkdir(parents=True)
        if kind == "mnist":
            write_idx(tmp_path / name, np.stack(images), np.zeros(len(images), np.uint8))
            return data.load("mnist", "train", tmp_path / name)[0]
        if kind == "npz":
            np.savez(tmp_path / name / "x.npz", images=np.stack(images)[:, None])
            return data.load(f"npz:{tmp_path / name / 'x.npz'}", size=8)[0]
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / "a" / f"{i}.png")
        return data.load(f"folder:{tmp_path / name}", size=8, channels=1)[0]
    alone, together = read("alone", dull), read("together", dull + company)
    assert torch.equal(alone, together[:3]) and [x.unique().tolist() for x in together[3:]] == [[0], [255]]
