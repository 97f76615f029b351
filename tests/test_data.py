"""Theorems about the images: the public ones are drawn, deterministic and framed; the private ones are read or refused."""
import gzip

import numpy as np
import pytest
import torch

import data


def test_glyphs_have_the_documented_shape_range_and_frame():
    images, labels = data.glyphs(2000, torch.Generator().manual_seed(0))
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
    draw = lambda seed: data.glyphs(50, torch.Generator().manual_seed(seed))[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_each_digit_is_written_in_several_ways():
    assert all(len(ways) >= 3 for ways in data.STROKES.values()) and set(data.STROKES) == set(range(10))


def test_mnist_ships_whole():
    for split, n in (("train", 60_000), ("test", 10_000)):
        images, labels = data.load("mnist", split)
        assert images.shape == (n, 1, 28, 28) and images.dtype == torch.uint8 and labels.shape == (n,)
        assert torch.bincount(labels).min() > 0.08 * n
    assert data.KNOWN["mnist"][0] == 60_000


def test_uint8_and_float_are_inverse():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(data.to_uint8(data.to_float(x)), x)
    assert data.to_float(x).min() == -1 and data.to_float(x).max() == 1


def write_idx(folder, images, labels, prefix="train"):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
def test_gzipped_fashion_files_are_found_in_data_dir(tmp_path, where):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_idx(folder, x, np.arange(5, dtype=np.uint8))
    images, labels = data.load("fashion-mnist", "train", tmp_path)
    assert np.array_equal(images[:, 0].numpy(), x) and labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage, says", [
    (lambda b: b[:len(b) // 2], "truncated"), (lambda b: b"hello", "truncated or not a gzip"),
    (lambda b: gzip.compress(gzip.decompress(b)[:-1]), "not an idx file"), (lambda b: gzip.compress(b"\0\0\x0d\3" + bytes(90)), "not an idx file"),
    (lambda b: gzip.compress(b""), "not an idx file")])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage, says):
    write_idx(tmp_path, np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=says) as e:
        data.load("mnist", "train", tmp_path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def make_folder(path, sizes=((40, 30), (32, 32), (50, 70)), classes=("cats", "dogs")):
    from PIL import Image
    rng = np.random.default_rng(0)
    for c in classes:
        (path / c).mkdir(parents=True)
        for i, (w, h) in enumerate(sizes):
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path / c / f"{i}.png")


def test_a_folder_of_pictures_is_resized_cropped_and_labelled(tmp_path):
    make_folder(tmp_path / "pictures")
    images, labels = data.load(f"folder:{tmp_path / 'pictures'}", size=24)
    assert images.shape == (6, 3, 24, 24) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 1]


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
