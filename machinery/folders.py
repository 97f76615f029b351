"""folders.py -- read the user's images as uint8 tensors: pictures in a folder or a .zip, arrays in an .npz.

A picture is read as a viewer shows it. What cannot be read is refused by name, or named on the screen.

  $ python -m machinery.folders PATH         # the classes in a folder, and the number of files of each
"""
import hashlib
import io
import os
import re
import shlex
import sys
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from machinery import pictures, screen
from machinery.pictures import WHITE

SYSTEM = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
          "__pycache__")     # folders that a system makes by itself
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")

# -----------------------------------------------------------------------------
# 1. a folder of pictures


def natural(name: str) -> list:
    """Sort key for names that contain numbers: 0, 1, 2, 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def hidden(name: str) -> bool:
    """Whether a system made a file or folder by itself: .DS_Store, ._1.png, __MACOSX."""
    return name.startswith(".") or name in SYSTEM


def subfolders(path: Path, declared: Sequence[str] = ()) -> list[str]:
    """The classes of PATH/class/image.png, in natural order. A hidden folder counts only if it is declared.

    Errors: a path that is not a readable folder -> ValueError
    """
    path = Path(path)
    try:
        found = [p.name for p in path.iterdir() if p.is_dir()]
    except OSError as e:
        hint = ""
        if path.is_file():
            hints = {".npz": f"; did you mean {typed(f'npz:{path}')}?", ".zip": "; unpack it first"}
            hint = hints.get(path.suffix.lower(), "")
        raise ValueError(f"folder:{path}: {e.strerror}; expected PATH/class/image.png{hint}") from None
    return sorted((name for name in found if name in declared or not hidden(name)), key=natural)


def note(text: str) -> None:
    """Print a note for the person who holds the images. It may be private, so it is never put in a file."""
    if screen.first():
        print(f"note: {text}", file=sys.stderr)


def typed(name: str) -> str:
    """A name as it has to be typed in a shell."""
    return shlex.quote(name)


def alike(name: str) -> str:
    """A name in one form of Unicode (NFC). A Mac may store "é" as two characters, which look the same."""
    return unicodedata.normalize("NFC", name)


def few(names: Sequence) -> str:
    """At most five of the names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Found(NamedTuple):
    """The files of a folder with classes."""
    pictures: list[tuple[Path, int]]     # with their labels
    left_out: dict[str, list[Path]]      # reason -> files


def find(path: Path, classes: Sequence[str] | None) -> Found:
    """Every file of PATH/class and of its sub-folders, each class in natural order.

    Errors: a sub-folder that is no class or cannot be read, or no picture at all -> ValueError
    """
    from PIL import Image
    known = [end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN]   # ".png", ..

    def refuse(e: OSError):
        raise ValueError(f"{e.filename} cannot be read ({screen.cause(e)}); expected a folder of pictures")
    there = subfolders(path, classes or ())
    check_classes(path, there, classes)
    found, others, own, links = [], [], [], []
    for number, name in enumerate(there):
        label = number if classes is None else [alike(c) for c in classes].index(alike(name))
        files = []
        for here, folders, names in os.walk(path / name, onerror=refuse):
            own += [Path(here, f) for f in folders if hidden(f)]
            folders[:] = [f for f in folders if not hidden(f)]
            links += [Path(here, f) for f in folders if Path(here, f).is_symlink()]
            files += [Path(here, f) for f in names]
        for file in sorted(files, key=lambda f: natural(str(f))):
            usable = file.is_file() or not file.exists()                 # a link to nothing is refused later
            if hidden(file.name):
                if file.suffix.lower() in known:
                    own.append(file)
            elif usable and file.suffix.lower() in known:
                found.append((file, label))
            else:
                others.append(file)
    loose = [f for f in path.iterdir() if f.suffix.lower() in known and f.is_file() and not hidden(f.name)]
    if not found and loose:
        raise ValueError(f"folder:{path} has {screen.count(len(loose), 'picture')} directly in it, none in a "
                         f"sub-folder; expected PATH/class/image.png. If all are of one class, move them "
                         f"into {path}/image and declare --classes image")
    if not found:
        but = f", but other files: {few(others)}" if others else ""
        raise ValueError(f"folder:{path}: no picture found{but}; expected PATH/class/image.png")
    return Found(found, {"no picture that can be read here": others, "hidden or made by the system": own,
                         "a link to a folder": links, "a picture in no class's folder": loose})


def check_classes(path: Path, there: list[str], classes: Sequence[str] | None) -> None:
    """Refuse sub-folders that are no declared class, or that are the splits of a data set.

    Errors: such a sub-folder -> ValueError
    """
    declared = {alike(name) for name in classes or ()}
    unknown = [name for name in there if alike(name) not in declared]
    if classes is None and any(name.lower() not in SPLITS for name in there):
        return
    deeper = []                              # sub-folders that are a split, or that hold the declared classes
    for name in unknown:
        inside = subfolders(path / name)
        holds_classes = bool(declared & {alike(i) for i in inside})
        if inside and (name.lower() in SPLITS or holds_classes):
            deeper.append(name)
    if deeper:
        for_training = [name for name in deeper if name.lower().startswith("train")]
        meant = (for_training + deeper)[0]
        raise ValueError(f"folder:{path} has the sub-folders {few(there)}, which have sub-folders; expected "
                         f"PATH/class/image.png: did you mean {typed(f'folder:{path / meant}')}?")
    if unknown and classes is not None:
        number = str(len(classes))
        hint = f"; declare a class that is called {number} as '\"{number}\"'" if number in unknown else ""
        raise ValueError(f"folder:{path} has the sub-folders {few(unknown)}; expected only the declared "
                         f"classes {few(classes)}: rename them or declare all in train.py's --classes{hint}")


def load_folder(path: Path, size: int, classes: Sequence[str] | None = None, channels: int = 3,
                white: int = WHITE) -> tuple[Tensor, Tensor]:
    """PATH/class/image.png (and sub-folders of class) -> uint8 (N, channels, size, size), labels (N,).

    Files that are left out are named on the screen. So are files with the same bytes, because for the
    guarantee two copies of an image are two images.
    white:  grey level of white in pictures of 16 bits
    Errors: a sub-folder not among `classes`, no picture, unreadable pictures -> ValueError that names them
    """
    found, left_out = find(Path(path), classes)
    images, labels, first, twice, refused, doubts, levels = [], [], {}, [], [], [], []
    with warnings.catch_warnings(record=True) as said:                   # Pillow's warnings name no file
        warnings.simplefilter("always")
        for file, label in screen.bar(found, "reading pictures", "picture"):
            said.clear()
            try:
                image, level = pictures.read(file, channels, white)
            except pictures.Refused as e:
                refused.append(e)
                if len(refused) == pictures.MOST:
                    break
                continue
            same = first.setdefault(hashlib.sha256(file.read_bytes()).digest(), file)
            if same is not file:
                twice.append(f"{file} = {same}")
            if said:
                doubts.append(f"{file} ({' '.join(str(said[0].message).split())})")
            if level is not None:
                levels.append(level)
            images.append(pictures.fit(image, size))
            labels.append(label)
    for why, files in left_out.items():
        if files:
            note(f"left out ({why}): {few(files)}")
    if twice:
        note(f"exact copies of other files, {len(twice)} of them; each counts as an image of its own: "
             f"{few(twice)}")
    if doubts:
        note(f"read with a warning: {few(doubts)}")
    if refused:
        raise pictures.all_refused(refused)
    tell_levels(levels, white)
    return torch.stack(images), torch.tensor(labels)


def tell_levels(levels: list[int], white: int) -> None:
    """Print a note if the declared white does not seem to be that of these images of 16 bits.

    levels: the brightest level of each image. White itself is never taken from them, because a single image
            could change it
    """
    above, images = sum(level > white for level in levels), screen.count(len(levels), "image")
    if above:
        note(f"{above} of {images} of 16 bits have levels above --white {white}, which become white")
    elif levels and 4 * max(levels) <= white:
        bits = max(8, max(levels).bit_length())
        note(f"the brightest level of {images} of 16 bits is {max(levels):,}, and white is {white:,}, so all "
             f"will be dark. If their device writes {bits} bits, say --white {2**bits - 1}")


def load_zip(path: Path, split: str, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """split/class/image.webp inside a .zip, all pictures of one size -> uint8 (N, 3, H, W), labels (N,).

    Errors: a file that is missing, truncated or has other classes -> ValueError that names it
    """
    from PIL import Image
    images, labels = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.startswith(split + "/")]
            for name in screen.bar(sorted(inside), f"reading {Path(path).name}", "picture"):
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    images.append(np.asarray(image.convert("RGB")))
                labels.append(classes.index(name.split("/")[1]))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected the file that ships with this repository") from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} is truncated or another file ({screen.cause(e)}); fetch it again") from None


# -----------------------------------------------------------------------------
# 2. arrays in a file


def npz_arrays(path: Path, split: str = "train", white: int = WHITE) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 (N, C, H, W), labels int64 (N,) or None) from one of three kinds of .npz file.

    images, labels:                              as sample.py writes them, (N, C, H, W)
    train_images, train_labels, test_images, ..: MedMNIST, (N, H, W) or (N, H, W, 3), labels (N, 1)
    arr_0, arr_1:                                guided-diffusion, (N, H, W, C)

    white:  grey level of white in images of 16 bits, uint16
    Errors: another file -> ValueError that says what was found and what was expected
    """
    expected = "expected `images` and `labels` (sample.py), `train_images` .. (MedMNIST) or `arr_0`"
    try:
        f = np.load(path, allow_pickle=False)
        if isinstance(f, np.ndarray):
            raise ValueError("it is one array, .npy; save it with np.savez(FILE, arr_0=images, arr_1=labels)")
        with screen.waiting(f"reading {path}"), f:
            kinds = [(f"{split}_images", f"{split}_labels"), ("images", "labels"), ("arr_0", "arr_1")]
            names = list(f.files)
            pair = next((pair for pair in kinds if pair[0] in names), None)
            images = f[pair[0]] if pair else None
            labels = f[pair[1]] if pair and pair[1] in names else None
    except OSError as e:
        meant = f"; did you mean {typed(f'folder:{path}')}?" if Path(path).is_dir() else ""
        raise ValueError(f"{path} is missing or unreadable ({screen.cause(e)}); {expected}{meant}") from None
    except Exception as e:
        why = screen.cause(e)
        if "Object arrays" in why:
            why = "they hold objects, as a list of pictures of several sizes does; use one size and np.stack"
        elif "allow_pickle" in why:
            why = "it is another kind of file"
        raise ValueError(f"{path} has no readable arrays ({why}); {expected}") from None
    if pair is None:
        raise ValueError(f"{path} has the arrays {few(names)}; {expected}")
    shape = images.shape
    if pair[0] != "images" and images.ndim == 3:
        images = images[:, None]                                         # (N, H, W) -> (N, 1, H, W)
    elif pair[0] != "images" and images.ndim == 4:
        images = images.transpose(0, 3, 1, 2)                            # (N, H, W, C) -> (N, C, H, W)
    good = images.dtype.kind == "u" and images.dtype.itemsize <= 2
    if not good or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        hints = {"f": "if white is 1: save (255 * images).round().astype(np.uint8)",
                 "b": "save 255 * images.astype(np.uint8)",
                 "i": "if white is 255: save images.astype(np.uint8); with more levels np.uint16 and --white"}
        hint = ""
        if not good:
            kind = "i" if images.dtype.kind == "u" else images.dtype.kind        # uint32 has the same cure
            hint = hints.get(kind, "")
        if len(shape) == 4 and shape[3] in (1, 3) and pair[0] == "images":
            hint = "channels come first: save images.transpose(0, 3, 1, 2)"
        elif len(shape) == 3 and pair[0] == "images":
            hint = "they have no axis of channels: save images[:, None]"
        right = "(n, C, H, W)" if pair[0] == "images" else "(n, H, W) or (n, H, W, C)"
        right += f", C = 1 or 3; {hint}" if hint else ", C = 1 or 3"
        raise ValueError(f"{path}: {pair[0]} are {images.dtype} {shape}, expected uint8 {right}")
    if images.dtype.itemsize == 2:
        tell_levels([int(image.max()) for image in images], white)
        images = np.concatenate([pictures.eight_bits(images[i:i + 1000], white)
                                 for i in range(0, len(images), 1000)])
    return np.ascontiguousarray(images), None if labels is None else whole_labels(path, labels, len(images))


def whole_labels(path: Path, labels: np.ndarray, images: int) -> np.ndarray:
    """Labels as int64 (N,), from (N,) or (N, 1).

    Errors: other labels -> ValueError that says what to do
    """
    if labels.shape == (images, 1):
        labels = labels[:, 0]
    if labels.shape == (images,) and labels.dtype.kind in "iu":
        return labels.astype(np.int64)
    hint = ""
    if labels.ndim == 2 and len(labels) == images:
        hint = "; if each row marks one class (one-hot), save labels.argmax(1)"
    elif labels.shape == (images,) and labels.dtype.kind in "fb":
        hint = "; save labels.astype(np.int64)"
    elif labels.shape == (images,):
        hint = "; for names save np.unique(labels, return_inverse=True)[1], their places in the alphabet"
    raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}, expected integers ({images},){hint}")


def arrays_of(name: str) -> list[str]:
    """The names of the arrays in npz:FILE."""
    with np.load(name.removeprefix("npz:"), allow_pickle=False) as f:
        return list(f.files)


def load_npz(path: Path, split: str, size: int, white: int = WHITE) -> tuple[Tensor, Tensor]:
    """npz_arrays as tensors, resized and centre-cropped to size x size like the pictures of a folder."""
    from torchvision.transforms import InterpolationMode, functional
    images, labels = npz_arrays(path, split, white)
    x = torch.from_numpy(images)
    if x.shape[-2:] != (size, size):
        how = dict(interpolation=InterpolationMode.BILINEAR, antialias=True)
        small = [functional.resize(part, size, **how)
                 for part in screen.bar(x.split(1000), f"resizing {Path(path).name}", "thousand")]
        x = torch.cat([functional.center_crop(part, [size, size]) for part in small])
    if labels is None:
        note(f"{path} has no labels, so all its images get the first class")
        return x, torch.zeros(len(x), dtype=torch.int64)
    return x, torch.from_numpy(labels)


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    with screen.one_line("folders.py", "close other programs"):
        for name in subfolders(here):
            print(f"{name}: {screen.count(sum(1 for _ in (here / name).rglob('*.*')), 'file')}")
