"""data.py -- images from disk as uint8 tensors, and what their classes are called.

MNIST and friends, blood cells, a folder or an .npz file. Private ones are read by train.py and by the
evaluation alone; their number and their classes are declared, never counted. Public drawings: drawings/.

  $ python data.py            # the data sets that have a name, and a sheet of the first: runs/mnist.png
"""
import gzip
import math
import warnings
import zlib
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from machinery import folders


ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"

# -----------------------------------------------------------------------------
# 1. images from disk, as uint8 tensors
#
# name -> (declared training size N, channels, side, classes), from the data sets' own publications: these are
# public constants, no run counts the private images. (CelebA: no classes; its side is after resizing. Cells:
# 17,092 less 17 exact copies, less a sixth to test on: counted by us, once, as on public data one may.)

KNOWN = {"mnist": (60_000, 1, 28, 10), "fashion-mnist": (60_000, 1, 28, 10), "kmnist": (60_000, 1, 28, 10),
         "emnist-letters": (124_800, 1, 28, 26), "cells": (14_232, 3, 64, 8), "cifar10": (50_000, 3, 32, 10),
         "cifar100": (50_000, 3, 32, 100), "celeba": (162_770, 3, 64, None)}


GARMENTS = ("T-shirt-top", "trouser", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CELLS = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
NAMES = {"fashion-mnist": GARMENTS, "clothes": GARMENTS, "cifar10": CIFAR10, "cells": CELLS,
         "smears": CELLS}                                                # else numbers


def read_idx(path: Path) -> np.ndarray:
    """One of MNIST's files, gzipped or not, as uint8, (N, 28, 28) or (N,).  [yann.lecun.com/exdb/mnist]

    Errors: missing, truncated, or of another length than its header says -> ValueError
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


def is_name(name: str) -> bool:
    """Whether `load` knows this kind of data set; its files are another question."""
    return name in KNOWN or name.startswith(("folder:", "npz:"))


def load(name: str, split: str = "train", data_dir: Path | str | None = None, size: int | None = None,
         classes: Sequence[str] | None = None, channels: int = 3) -> tuple[Tensor, Tensor]:
    """A data set as uint8 images (N, C, H, W) and labels (N,) int64 (all 0 where there are none).

    name:     a key of KNOWN; folder:PATH, one sub-folder a class (no split); or npz:FILE (see folders.py).
              Images of both are resized and centre-cropped to size x size, default 32. mnist and cells ship
              in assets/; the others are read from, or downloaded to, data_dir.
    classes:  of a folder: the declared names in the order of their labels. Without them the sub-folders that
              exist are numbered in natural order, which for private images would be private: one may move it
    channels: of a folder: 1 reads its pictures as grey, 3 as colour
    Errors: unknown name or split, a truncated, unreadable or missing file, no network -> ValueError
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}, expected 'train' or 'test'")
    if name.startswith("folder:"):
        return folders.load_folder(Path(name.removeprefix("folder:")), size or 32, classes, channels)
    if name.startswith("npz:"):
        return folders.load_npz(Path(name.removeprefix("npz:")), split, size or 32)
    if name not in KNOWN:
        known = ", ".join(KNOWN)
        raise ValueError(f"unknown data set {name!r}, expected one of {known}, folder:PATH or npz:FILE")
    root = Path(data_dir) if data_dir is not None else Path("datasets")
    if data_dir is None and not root.is_dir() and (ROOT / root).is_dir():    # started from elsewhere
        root = ROOT / root
    if data_dir is not None and not root.is_dir():
        raise ValueError(f"--data-dir {root} is not a folder; expected one that holds {name}, "
                         f"or an empty one to download it to")
    if name == "cells":
        folder = ASSETS / "cells" if data_dir is None else root
        return folders.load_zip(folder / "cells64.zip", split, CELLS)
    idx_folder = ASSETS / "mnist" if name == "mnist" and data_dir is None else _idx_folder(root, name)
    if idx_folder is not None:
        prefix = "train" if split == "train" else "t10k"
        images = read_idx(idx_folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(idx_folder / f"{prefix}-labels-idx1-ubyte.gz")
        if len(images) != len(labels):
            raise ValueError(f"{idx_folder}: {len(images)} images but {len(labels)} labels; "
                             f"fetch the files again")
        return torch.tensor(images)[:, None], torch.tensor(labels).long()
    return _load_torchvision(name, split, root)


def _idx_folder(root: Path, name: str) -> Path | None:
    """Where data_dir holds MNIST's files: itself or torchvision's DIR/FashionMNIST/raw; None if nowhere."""
    sub = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}.get(name)
    if sub is None:
        return None
    for folder in (root / sub / "raw", root):
        if any((folder / f"train-images-idx3-ubyte{end}").exists() for end in (".gz", "")):
            return folder
    return None


def _load_torchvision(name: str, split: str, root: Path) -> tuple[Tensor, Tensor]:
    """The same through torchvision's classes, which download to `root` on demand."""
    from torchvision import datasets, transforms
    train = split == "train"
    try:
        if name == "celeba":
            crop = transforms.Compose([transforms.CenterCrop(140), transforms.Resize(64),
                                       transforms.PILToTensor()])
            faces = datasets.CelebA(str(root), split, target_type="identity", transform=crop, download=True)
            return torch.stack([image for image, _ in faces]), torch.zeros(len(faces), dtype=torch.int64)
        if name == "emnist-letters":
            warnings.warn("emnist-letters was written by the people who wrote MNIST: not public for MNIST")
            found = datasets.EMNIST(str(root), "letters", train=train, download=True)
            return found.data.mT[:, None].contiguous(), found.targets - 1  # stored transposed, labels 1..26
        kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST,
                "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
        found = kind[name](str(root), train=train, download=True)
    except Exception as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"
        more = "; celeba is fetched by gdown: pip install gdown" if name == "celeba" else ""
        raise ValueError(f"{name} is not in {root} and could not be downloaded there ({why}); "
                         f"put its files there or pass --data-dir{more}") from None
    images = torch.as_tensor(found.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(found.targets)


# -----------------------------------------------------------------------------
# 2. classes have names: those of the private images are declared, never counted

def class_names(name: str) -> list[str] | None:
    """The classes of a PUBLIC data set, in the order of their labels; None if it has none or nobody knows."""
    if name.startswith("folder:"):
        return folders.subfolders(Path(name.removeprefix("folder:")))
    if name in NAMES:
        return list(NAMES[name])
    classes = KNOWN.get(name, (0, 0, 0, 10 if name == "glyphs" else None))[3]
    return classes and [str(i) for i in range(classes)]


def declared(name: str, flag: str, base: list[str] | None) -> list[str] | None:
    """The classes of the PRIVATE data set `name` in the order of their labels: public constants, as N is.

    flag: --classes, names with commas, or their number; else those of a published data set, else the base's
    Errors: files of which nobody has said what their classes are -> ValueError
    """
    if flag:
        names = [word.strip() for word in flag.split(",")]
        if len(names) == 1 and names[0].isdecimal() and 1 <= int(names[0]) <= 10_000:
            names = [str(i) for i in range(int(names[0]))]
        if name in KNOWN or "" in names or len(set(names)) < len(names):
            raise ValueError(f"--classes {flag}: expected different names, with commas, for folder: or npz:")
        return names
    if name.startswith("folder:") and base is None:
        raise ValueError(f"--data {name} on a base that does not name its classes: which ones exist is "
                         f"private; declare them, --classes NAME,NAME,... (the first becomes class 0)")
    return base if name.startswith(("folder:", "npz:")) else class_names(name)


def declared_classes(name: str, flag: str, model, own: bool = False) -> dict:
    """classes: the names of the private data's classes; labels: which class of the base each is. {}: none.

    own: the classes will have a table of their own in the network (lora.new_classes), in this order
    No image is read; model: the base, a unet.UNet. Errors: as `declared` and `place`
    """
    if model.classes is None:
        return {}
    names = declared(name, flag, None if own else model.config["names"])
    if own and names is None:
        if name.startswith("npz:"):
            raise ValueError(f"--data {name}: which classes exist is private; declare them, --classes "
                             f"NAME,NAME,... or --classes 8")
        names = ["image"]                                                # no classes: all images are of one
    if own:
        return dict(classes=names, labels=list(range(len(names))))
    labels = place(names, model.config["names"], model.classes)
    return dict(classes=names or [str(i) for i in labels], labels=labels)


def in_places(images: Tensor, labels: Tensor, places: list[int] | None) -> tuple[Tensor, Tensor]:
    """The images whose label is declared, in the base's numbers: label i becomes places[i]; None: all, as is.

    An image of another label counts as no image: refusing it would tell that it is there. A class is found by
    its declared name, for the order of the sub-folders that exist would move with one image.
    """
    if places is None:
        return images, labels
    known = (labels >= 0) & (labels < len(places))
    images, labels = images[known], labels[known]
    return images, torch.tensor(places)[labels]


def fits(model, images: Tensor, labels: Tensor, name: str, coder=None) -> None:
    """Refuse images that the network (a unet.UNet), or the autoencoder before it, cannot take."""
    channels, classes, side = model.config["image_channels"], model.classes, images.shape[-1]
    step, grey = model.patch * 2 ** (len(model.config["multipliers"]) - 1), False
    if coder is not None:
        channels, step, side = coder.config["image_channels"], step * coder.f, max(side, coder.side)
        grey = images.shape[1] == 1                                      # laid in all its channels
    if images.shape[1] != channels and not grey or side % step:
        raise ValueError(f"--data {name} has {images.shape[1]} channels and side {side}; expected "
                         f"{channels} channels and a side that {step} divides: use another base")
    if classes is not None and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"--data {name} has labels from {int(labels.min())} to {int(labels.max())}; "
                         f"expected 0 to {classes - 1}: use another base")


def table(classes: list[str], labels: list[int]) -> str:
    """At most five classes, each with the number that it has in the base: "dog = 1, horse = 2"."""
    return folders.few([f"{name} = {label}" for name, label in zip(classes, labels)])


def place(names: list[str] | None, base: list[str] | None, classes: int) -> list[int]:
    """Which of the base's classes each of the data's is: by name if the base knows them all, else by number.

    Example: place(["dog", "horse"], ["cat", "dog", "horse"], 3) -> [1, 2]
    Errors:  some names known and some not, or more names than classes -> ValueError that names both lists
    """
    if names is None:                                                    # nothing declared: what the base has
        return list(range(classes))
    strangers = [name for name in names if name not in (base or [])]
    if base and not strangers:
        return [base.index(name) for name in names]
    if base and len(strangers) < len(names) or len(names) > classes:
        mine, its = folders.few(names), folders.few(base or ["without names"])
        raise ValueError(f"the classes {mine} do not fit the base's {classes}, {its}: "
                         f"expected names that it has, or at most {classes} new ones, which take its "
                         f"classes in order")
    return list(range(len(names)))


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], the range that diffusion works in; latents are floats already."""
    if images.dtype != torch.uint8:
        return images
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255]; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


if __name__ == "__main__":
    from torchvision.utils import save_image
    for name, (N, channels, side, classes) in KNOWN.items():
        print(f"{name:<16} N = {N:>7,}   {channels} x {side} x {side}   classes: {classes}")
    images, labels = load("mnist", "test")
    Path("runs").mkdir(exist_ok=True)
    save_image(images[:200].float() / 255, "runs/mnist.png", nrow=20)
    print("runs/mnist.png: the first 200 test images")
