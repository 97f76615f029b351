"""folders.py -- other people's images: pictures in a folder or a .zip, arrays in an .npz, as uint8 tensors.

A picture is what a viewer shows of it, and what cannot be read is refused by name or named on the screen.

  $ python -m machinery.folders PATH         # what is in a folder of pictures: classes, sizes
"""
import hashlib
import io
import re
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from machinery import screen

# -----------------------------------------------------------------------------
# 1. a folder of pictures


def natural(name: str) -> list:
    """Sort key that counts as people do: 0, 1, 2, 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def subfolders(path: Path) -> list[str]:
    """The classes of PATH/class/image.png, in natural order; hidden folders (.ipynb_checkpoints) are none."""
    try:
        found = [p.name for p in Path(path).iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError as e:
        raise ValueError(f"folder:{path}: {e.strerror}; expected PATH/class/image.png") from None
    return sorted(found, key=natural)


def note(text: str) -> None:
    """On the screen of whoever owns the images, never in a file: it may be private."""
    print(f"note: {text}", file=sys.stderr)


def few(names: list) -> str:
    """At most five names, and how many more."""
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def load_folder(path: Path, size: int, classes: Sequence[str] | None = None,
                channels: int = 3) -> tuple[Tensor, Tensor]:
    """PATH/class/image.png (and sub-folders of class) -> (N, channels, size, size), (N,).

    Files that Pillow has no reader for are named on the screen, and so are files with the same bytes: two
    copies of an image are two images of the guarantee.
    Errors: a sub-folder not among `classes`, no picture, an unreadable one -> ValueError that names it
    """
    from PIL import Image
    known = [end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN]   # ".png", ..
    there = subfolders(path)
    unknown = [name for name in there if classes is not None and name not in classes]
    if unknown:
        raise ValueError(f"folder:{path} has the sub-folders {few(unknown)}; expected only the declared "
                         f"classes {few(list(classes))}: rename them or declare all with --classes")
    images, labels, passed_over, first, twice = [], [], [], {}, []
    for number, name in enumerate(there):
        label = number if classes is None else list(classes).index(name)
        for file in sorted((path / name).rglob("*"), key=lambda f: natural(str(f))):
            if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            if file.suffix.lower() not in known:
                passed_over.append(file)
                continue
            raw = file.read_bytes()
            same = first.setdefault(hashlib.sha256(raw).digest(), file)
            if same is not file:
                twice.append(f"{file} = {same}")
            images.append(picture(file, size, channels))
            labels.append(label)
    if passed_over:
        note(f"{len(passed_over)} files are left out, no pictures that can be read here: {few(passed_over)}")
    if twice:
        note(f"exact copies of other files, {len(twice)} of them, each counts as an image: {few(twice)}")
    if not images:
        raise ValueError(f"folder:{path}: no picture found; expected PATH/class/image.png")
    return torch.stack(images), torch.tensor(labels)


class Coloured(ValueError):
    """A picture in colour where the base is grey: readable, but not what was asked for."""


def picture(file: Path, size: int, channels: int = 3) -> Tensor:
    """One picture as a viewer shows it: uint8 (channels, size, size), shorter side resized, centre cropped.

    Turned as its EXIF says, 16 bits scaled to 8, transparency laid on white.
    Errors: not readable, an animation, a depth without a known white, colours where grey is expected ->
            ValueError that names the file
    """
    from PIL import Image, ImageOps
    from torchvision.transforms import functional
    try:
        with Image.open(file) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                raise ValueError(f"{opened.n_frames} frames, expected one")
            image = ImageOps.exif_transpose(opened)
            image.load()
        if image.mode.startswith("I;16") or image.mode == "I":           # grey of 16 bits: 65535 is white
            deep = np.asarray(image).astype(np.int64)
            if deep.min() < 0 or deep.max() > 65_535:
                raise ValueError("grey levels outside 0 to 65535")
            image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point grey levels, whose white is unknown; save it with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        colour = np.asarray(image.convert("RGB")).astype(np.int16)
        if channels == 1 and np.ptp(colour, axis=2).max() > 16:  # grey levels; a JPEG's differ a little
            raise Coloured(f"{file} is in colour, 3 channels; expected grey, 1 channel, as the base has: use "
                           f"a base of colour")
        image = image.convert("L" if channels == 1 else "RGB")
    except Coloured:
        raise
    except Exception as e:
        raise ValueError(f"{file} is not a readable image ({type(e).__name__}: {' '.join(str(e).split())}); "
                         f"remove or replace it") from None
    return functional.pil_to_tensor(functional.center_crop(functional.resize(image, size), [size, size]))


def load_zip(path: Path, split: str, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """split/class/image.webp inside a .zip, pictures of one size -> uint8 (N, 3, H, W), labels (N,).

    Errors: missing, truncated or of other classes -> ValueError that names the file
    """
    from PIL import Image
    images, labels = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.startswith(split + "/")]
            for name in sorted(inside):
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    images.append(np.asarray(image.convert("RGB")))
                labels.append(classes.index(name.split("/")[1]))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected the file that ships with this repository") from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} is truncated or another file ({type(e).__name__}: {e}); fetch it "
                         f"again") from None


# -----------------------------------------------------------------------------
# 2. arrays in a file


def npz_arrays(path: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) of one of these kinds of .npz file:

    images, labels: as sample.py writes them, (N, C, H, W)
    train_images, train_labels, test_images, ..: MedMNIST, (N, H, W) or (N, H, W, 3), labels (N, 1)
    arr_0, arr_1: guided-diffusion, (N, H, W, C)
    Errors: anything else -> ValueError that says what was found and what was expected
    """
    expected = "expected `images` and `labels` (sample.py), `train_images` .. (MedMNIST) or `arr_0`"
    try:
        with np.load(path, allow_pickle=False) as f:
            kinds = [(f"{split}_images", f"{split}_labels"), ("images", "labels"), ("arr_0", "arr_1")]
            names = list(f.files)
            pair = next((pair for pair in kinds if pair[0] in names), None)
            images = f[pair[0]] if pair else None
            labels = f[pair[1]] if pair and pair[1] in names else None
    except OSError as e:
        why = e.strerror or type(e).__name__
        raise ValueError(f"{path} is missing or unreadable ({why}); {expected}") from None
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} has no readable arrays ({type(e).__name__}); {expected}") from None
    if pair is None:
        raise ValueError(f"{path} has the arrays {few(names)}; {expected}")
    shape, wrong = images.shape, images.dtype != np.uint8
    if pair[0] != "images" and images.ndim == 3:
        images = images[:, None]                                         # (N, H, W) -> (N, 1, H, W)
    elif pair[0] != "images" and images.ndim == 4:
        images = images.transpose(0, 3, 1, 2)                            # (N, H, W, C) -> (N, C, H, W)
    if wrong or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        last = images.ndim == 4 and shape[3] in (1, 3) and pair[0] == "images"
        hint = "; channels come first: save images.transpose(0, 3, 1, 2)" if last else ""
        right = "(n, C, H, W)" if pair[0] == "images" else "(n, H, W) or (n, H, W, C)"
        raise ValueError(f"{path}: {pair[0]} are {images.dtype} {shape}, "
                         f"expected uint8 {right}, C = 1 or 3{hint}")
    if labels is not None and labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}, expected integers "
                         f"({len(images)},)")
    return np.ascontiguousarray(images), None if labels is None else labels.astype(np.int64)


def arrays_of(name: str) -> list[str]:
    """The names of the arrays in npz:FILE."""
    with np.load(name.removeprefix("npz:"), allow_pickle=False) as f:
        return list(f.files)


def load_npz(path: Path, split: str, size: int) -> tuple[Tensor, Tensor]:
    """npz_arrays as tensors, resized and centre-cropped to size x size like a folder's pictures."""
    from torchvision.transforms import InterpolationMode, functional
    images, labels = npz_arrays(path, split)
    x = torch.from_numpy(images)
    if x.shape[-2:] != (size, size):
        how = dict(interpolation=InterpolationMode.BILINEAR, antialias=True)
        small = [functional.resize(part, size, **how) for part in x.split(1000)]
        x = torch.cat([functional.center_crop(part, [size, size]) for part in small])
    return x, torch.zeros(len(x), dtype=torch.int64) if labels is None else torch.from_numpy(labels)


if __name__ == "__main__":
    here = Path((sys.argv + ["."])[1])
    with screen.one_line("folders.py", "close other programs"):
        for name in subfolders(here):
            print(f"{name}: {sum(1 for _ in (here / name).rglob('*.*'))} files")
