"""data.py -- read images from disk as uint8 tensors.

It reads data sets such as MNIST and blood cells, a folder of pictures, or an .npz file. The training images
of a private run are read by train.py, by evaluate.py and by attacks/ alone; some demonstrations show test
images. support/classes.py says what the classes are called and which of them a run uses. Public drawings are
in drawings/.

  $ python data.py            # the data sets that have a name, and a sheet of the first: runs/mnist.png
"""
import difflib
import functools
import gzip
import math
import zlib
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from machinery import folders, screen
from machinery.folders import few
from machinery.pictures import WHITE

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"
DEFAULT = "datasets"                     # the folder of the data sets that do not ship

# -----------------------------------------------------------------------------
# 1. readers: (folder, "train" or "test") -> uint8 images (N, C, H, W), int64 labels (N,)


def read_idx(path: Path) -> np.ndarray:
    """One of MNIST's files, gzipped or not, as uint8 (N, 28, 28) or (N,).   [yann.lecun.com/exdb/mnist]

    Errors: a file that is missing, truncated, or of another length than its header says -> ValueError
    """
    path = Path(path)
    plain = path.with_suffix("")                                         # the same file, unpacked
    try:
        if not path.exists() and plain.exists():
            path, raw = plain, plain.read_bytes()
        else:
            with gzip.open(path) as f:
                raw = f.read()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected MNIST's own file there, as .gz or unpacked") from None
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is truncated or not a gzip file ({e}); fetch it again") from None
    dimensions = raw[3] if len(raw) >= 4 and raw[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(raw[4 + 4 * i:8 + 4 * i], "big") for i in range(dimensions)]
    start = 4 + 4 * dimensions
    if dimensions not in (1, 3) or len(raw) - start != math.prod(shape):
        raise ValueError(f"{path} is not an idx file of bytes: {len(raw)} bytes, header {raw[:4].hex()} "
                         f"and shape {shape}; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_mnist_files(kind: str, root: Path, split: str) -> tuple[Tensor, Tensor]:
    """MNIST's four files in torchvision's root/KIND/raw, to which torchvision downloads them.

    They may also lie in root itself, unless it is the default folder of all data sets: the files of MNIST,
    Fashion-MNIST and KMNIST have the same names.
    """
    prefix = "train" if split == "train" else "t10k"
    places = [root / kind / "raw"]
    if root.name != DEFAULT:
        places.append(root)
    for folder in places:
        if not any((folder / f"train-images-idx3-ubyte{end}").exists() for end in (".gz", "")):
            continue
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels; "
                             f"fetch the files again")
        return torch.tensor(images)[:, None], torch.tensor(labels).long()
    return read_torchvision(kind, root, split)


def read_torchvision(kind: str, root: Path, split: str) -> tuple[Tensor, Tensor]:
    """One of torchvision's data sets, by the name of its class. It is downloaded to `root` if needed."""
    from torchvision import datasets
    with screen.waiting(f"reading {kind}", has_bar=True):                # torchvision shows a download's bar
        found = getattr(datasets, kind)(str(root), train=split == "train", download=True)
    images = torch.as_tensor(found.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(found.targets)


def read_celeba(root: Path, split: str) -> tuple[Tensor, Tensor]:
    from torchvision import datasets, transforms
    crop = transforms.Compose([transforms.CenterCrop(140), transforms.Resize(64), transforms.PILToTensor()])
    try:
        faces = datasets.CelebA(str(root), split, target_type="identity", transform=crop, download=True)
    except Exception as e:
        raise RuntimeError(f"{screen.cause(e)}; celeba is downloaded by gdown: pip install gdown") from None
    images = [faces[i][0] for i in screen.bar(range(len(faces)), "reading celeba", "picture")]
    return torch.stack(images), torch.zeros(len(faces), dtype=torch.int64)


def read_cells(root: Path, split: str) -> tuple[Tensor, Tensor]:
    return folders.load_zip(root / "cells64.zip", split, CELLS)


# -----------------------------------------------------------------------------
# 2. the data sets that have a name; to add one, add a row to KNOWN


class DataSet(NamedTuple):
    """What the publication of a data set says about it: public constants, so no run counts private images."""
    N: int                               # declared number of training images
    channels: int
    side: int                            # pixels
    classes: tuple[str, ...] | None      # their names in the order of the labels; None: there are no classes
    read: Callable                       # (root, split) -> images, labels
    ships: str = ""                      # the folder in assets/ that holds its files; "": they do not ship
    base: str = ""                       # the public base made for it; "": the default for grey or for colour


DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt-top", "trouser", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CELLS = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")

KNOWN = {
    "mnist": DataSet(60_000, 1, 28, DIGITS, functools.partial(read_mnist_files, "MNIST"), ships="mnist"),
    "fashion-mnist": DataSet(60_000, 1, 28, GARMENTS, functools.partial(read_mnist_files, "FashionMNIST"),
                             base="assets/base-clothes.pt"),
    "kmnist": DataSet(60_000, 1, 28, DIGITS, functools.partial(read_mnist_files, "KMNIST")),
    # N: 17,092 published images, less 17 exact copies, less a sixth for testing. The data are public, so
    # counting them is no leak
    "cells": DataSet(14_232, 3, 64, CELLS, read_cells, ships="cells", base="assets/smears.pt"),
    "cifar10": DataSet(50_000, 3, 32, CIFAR10, functools.partial(read_torchvision, "CIFAR10")),
    "cifar100": DataSet(50_000, 3, 32, tuple(map(str, range(100))),
                        functools.partial(read_torchvision, "CIFAR100")),
    "celeba": DataSet(162_770, 3, 64, None, read_celeba, base="assets/faces.pt")}        # 64 after resizing


def is_name(name: str) -> bool:
    """Whether `load` knows this kind of data set. Whether its files are there is not checked."""
    kind, _, path = name.partition(":")
    return name in KNOWN or kind in ("folder", "npz") and path != ""


def meant(name: str) -> str:
    """A hint for a name that `load` does not know, such as "; did you mean npz:FILE?", or ""."""
    if name and Path(name).is_dir():
        return f"; did you mean {folders.typed(f'folder:{name}')}?"
    if Path(name).suffix.lower() == ".npz":
        return f"; did you mean {folders.typed(f'npz:{name}')}?"
    close = difflib.get_close_matches(name.lower(), KNOWN, 1)
    return f"; did you mean {close[0]}?" if close else ""


def load(name: str, split: str = "train", data_dir: Path | str | None = None, size: int | None = None,
         classes: Sequence[str] | None = None, channels: int = 3,
         white: int = WHITE) -> tuple[Tensor, Tensor]:
    """A data set as uint8 images (N, C, H, W) and int64 labels (N,), all 0 if there are none.

    name:     a key of KNOWN; folder:PATH, with one sub-folder for each class and no split; or npz:FILE (see
              machinery/folders.py). mnist and cells ship in assets/; the other data sets are read from
              data_dir, or downloaded to it
    size:     images of a folder or an .npz file are resized and centre-cropped to size x size, by default 32
    classes:  of a folder: the declared names of the classes, in the order of their labels. Without them the
              sub-folders that exist are numbered in natural order. Declare the names for private images:
              otherwise one image in a folder of its own changes the labels of others
    channels: of a folder: 1 reads its pictures as grey, 3 as colour
    white:    of a folder or an .npz file: the grey level of white in images of 16 bits
    Errors:   unknown name or split, a truncated, unreadable or missing file, no network -> ValueError
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}, expected 'train' or 'test'")
    if name.startswith("folder:"):
        return folders.load_folder(Path(name.removeprefix("folder:")), size or 32, classes, channels, white)
    if name.startswith("npz:"):
        return folders.load_npz(Path(name.removeprefix("npz:")), split, size or 32, white)
    if name not in KNOWN:
        known = ", ".join(KNOWN)
        raise ValueError(f"unknown data set {name!r}, expected one of {known}, folder:PATH or npz:FILE"
                         f"{meant(name)}")
    root = _root(name, data_dir)
    try:
        images, labels = KNOWN[name].read(root, split)
    except (OSError, EOFError, ImportError, RuntimeError) as e:          # of files, network, torchvision
        raise ValueError(f"{name} cannot be read from {root}, nor downloaded there ({screen.cause(e)}); "
                         f"put its files there or pass --data-dir") from None
    return _as_promised(name, images, labels)


def _as_promised(name: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a reader returned, with the labels as int64.

    Errors: images or labels that are not as section 1 says -> ValueError
    """
    right = isinstance(images, Tensor) and isinstance(labels, Tensor)
    right = right and images.dtype == torch.uint8 and images.ndim == 4
    right = right and labels.shape == images.shape[:1] and not labels.is_floating_point()
    if right:
        return images, labels.long()
    images, labels = (f"{getattr(x, 'dtype', type(x).__name__)} {tuple(getattr(x, 'shape', ()))}"
                      for x in (images, labels))
    raise ValueError(f"the reader of {name} returned images {images} and labels {labels}; expected a uint8 "
                     f"tensor (N, C, H, W) and a whole number for each of the N images")


def _root(name: str, data_dir: Path | str | None) -> Path:
    """Where the files of a data set are: in data_dir if it is given, else in assets/ or in ./datasets.

    If there is no ./datasets, it is datasets/ beside the code, if that exists.
    """
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(f"--data-dir {data_dir} is not a folder; expected one that holds {name}, "
                             f"or an empty one to download it to")
        return Path(data_dir)
    if KNOWN[name].ships:
        return ASSETS / KNOWN[name].ships
    here, beside_the_code = Path(DEFAULT), ROOT / DEFAULT
    if not here.is_dir() and beside_the_code.is_dir():
        return beside_the_code
    return here


# -----------------------------------------------------------------------------
# 3. bytes and floats


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], the range of diffusion. Latents are floats and stay as they are."""
    if images.dtype != torch.uint8:
        return images
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255]; values outside the range are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


if __name__ == "__main__":
    from torchvision.utils import save_image
    for name, known in KNOWN.items():
        classes = "none" if known.classes is None else f"{len(known.classes)}: {few(known.classes)}"
        print(f"{name:<16} N = {known.N:>7,}   {known.channels} x {known.side} x {known.side}   "
              f"classes: {classes}")
    images, labels = load("mnist", "test")
    Path("runs").mkdir(exist_ok=True)
    save_image(images[:200].float() / 255, "runs/mnist.png", nrow=20)
    print("runs/mnist.png: the first 200 test images")
