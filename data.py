"""data.py -- public images drawn by code, private images from disk, as tensors.

Public set:  digits drawn here (`glyphs`): no person is in it, so "public" means public.
Private set: MNIST and friends, or a folder (`load`); only train.py's fine-tuning and the evaluation read it.

  $ python data.py            # draws a sheet of public glyphs to runs/glyphs.png
"""
import functools
import gzip
import math
import warnings
import zlib
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import folders

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"

# -----------------------------------------------------------------------------
# 1. public images: pen strokes and a font, deformed at random, inked into MNIST's frame
#
# Every way to write a digit is a list of strokes; a stroke is a list of "x,y" points on a 10 x 14
# grid (y down) joined by a smooth curve; a point written twice is a corner. The shapes were
# written down by hand from how people are taught to write; nothing was fitted to any image.

STROKES = {
    0: ["5,0 1,3 0,8 3,13 7,13 10,8 9,2 5,0 2,2", "6,0 2,3 0,9 3,14 7,12 9,6 8,2 5,0 4,2",
        "7,1 3,1 0,6 1,12 5,14 9,10 9,4 7,1 6,0"],
    1: ["5,0 5,7 5,14", "7,0 5,7 3,14", "2,3 5,0 5,0 5,7 5,14",
        "2,3 5,0 5,0 5,14 5,14 | 2,14 8,14", "5,0 5,14"],
    2: ["1,3 3,0 7,0 9,3 7,7 3,11 0,14 0,14 5,14 10,14",
        "1,3 4,0 8,1 8,5 5,10 2,13 0,13 1,11 4,12 7,14 10,13",
        "0,2 4,0 8,2 8,5 4,10 0,14 0,14 3,13 7,14 10,14",
        "1,1 5,0 9,1 8,5 1,14 1,14 9,14"],
    3: ["1,2 4,0 8,1 8,5 4,7 4,7 8,8 9,11 6,14 2,14 0,12",
        "1,1 5,0 8,2 7,5 3,6 3,7 8,8 9,12 5,14 1,13",
        "1,0 9,0 9,0 4,6 4,6 8,7 9,11 6,14 2,14 0,12"],
    4: ["2,0 1,5 0,9 0,9 5,9 10,8 | 8,0 7,7 7,14", "7,0 0,9 0,9 10,9 | 7,0 7,14",
        "1,0 1,4 2,7 5,7 8,6 | 9,0 8,7 8,14", "3,0 0,8 0,8 10,8 | 7,3 6,14",
        "8,0 3,5 0,9 0,9 9,9 | 8,0 8,8 7,14"],
    5: ["9,0 2,0 2,0 1,6 1,6 5,5 9,8 8,12 4,14 0,13", "2,0 1,6 1,6 6,5 9,9 7,13 3,14 0,12 | 2,0 9,0",
        "10,0 5,0 3,1 2,5 5,6 8,9 7,13 3,14 0,13", "8,0 3,1 2,5 7,8 8,11 5,14 1,13 | 8,0 10,0"],
    6: ["7,0 3,4 0,9 2,13 5,14 8,12 8,9 5,7 2,9 1,11", "5,0 2,5 1,10 3,14 6,14 8,11 6,8 3,9 1,11",
        "9,0 4,2 1,6 0,10 3,14 7,13 9,10 6,7 2,8 0,10"],
    7: ["0,1 5,0 10,0 10,0 7,6 4,14", "0,0 9,0 9,0 6,7 5,14 | 2,7 9,7", "0,3 1,0 1,0 5,1 10,0 10,0 6,7 4,14",
        "0,1 4,0 8,0 9,2 7,8 6,14"],
    8: ["7,1 4,0 2,3 4,6 8,9 8,13 4,14 1,12 2,9 6,6 8,3 7,1", "8,2 5,0 2,2 3,5 7,8 9,11 6,14 2,13 2,9 6,6 8,3 7,1",
        "5,0 2,2 2,5 5,7 8,5 8,2 5,0 | 5,7 1,9 1,12 5,14 9,12 9,9 5,7"],
    9: ["8,2 5,0 2,1 1,5 4,7 7,5 8,2 8,2 8,8 7,14", "9,1 5,0 1,3 2,6 6,6 8,3 9,1 8,8 6,12 2,14",
        "8,3 5,0 1,2 1,5 4,7 8,4 8,1 8,1 6,8 4,14", "7,1 3,1 1,4 3,7 7,4 8,1 8,1 8,8 8,14"],
}
FIELD, REACH = 40, 1.6       # a template is a FIELD x FIELD map over [-REACH, REACH]^2 of glyph units (height 2)
PER_DIGIT, POINTS = 240, 160  # jittered drawings kept per digit; points along each drawing


def _curve(text: str, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """'x,y x,y | x,y ...' -> (POINTS, 2) points evenly spaced along the jittered Catmull-Rom strokes."""
    dense = []
    for stroke in text.split("|"):
        p = np.array([[float(v) for v in xy.split(",")] for xy in stroke.split()])
        corner = np.r_[False, np.all(p[1:] == p[:-1], axis=1)]
        move = rng.normal(0, jitter, p.shape)
        move[corner] = move[np.flatnonzero(corner) - 1]                 # a corner's two points stay one
        p = p + move
        p = np.concatenate([p[:1], p, p[-1:]])
        u = np.linspace(0, 1, 40, endpoint=False)[:, None]
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:]):
            dense.append(0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2
                                + (3 * b - a - 3 * c + d) * u**3))
        dense.append(p[-1:])
    dense = np.concatenate(dense)
    step = np.hypot(*np.diff(dense, axis=0).T)
    step[step > 1.5] = 0                                                 # a pen lifted between strokes leaves no ink
    length = np.r_[0, np.cumsum(step)]
    at = np.linspace(0, length[-1], POINTS)
    return dense[np.searchsorted(length, at).clip(0, len(dense) - 1)]


def _font_template(digit: int) -> tuple[Tensor, Tensor]:
    """A typeset digit (the scalable font inside Pillow) as (field, points), see _templates."""
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt
    size = 256
    image = Image.new("L", (size, size))
    ImageDraw.Draw(image).text((size // 2, size // 2), str(digit), fill=255, anchor="mm",
                               font=ImageFont.load_default(size=150))
    ink = np.asarray(image) > 127
    y, x = np.nonzero(ink)
    height = y.max() - y.min()
    inside = distance_transform_edt(ink)
    outline = distance_transform_edt(~ink) - inside                      # > 0 outside, < 0 inside
    field = torch.tensor((outline + inside.max()) * 2 / height, dtype=torch.float32)  # 0 on the strokes' middle
    centre = torch.tensor([(x.max() + x.min()) / 2, (y.max() + y.min()) / 2])
    axis = torch.linspace(-REACH, REACH, FIELD) * height / 2
    where = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + centre
    field = F.grid_sample(field[None, None], (where / (size - 1) * 2 - 1)[None].float(), padding_mode="border",
                          align_corners=True)[0, 0]
    keep = np.linspace(0, len(x) - 1, POINTS).astype(int)
    points = (torch.tensor(np.stack([x[keep], y[keep]], 1)) - centre) * 2 / height
    return field, points.float()


@functools.cache
def _templates() -> tuple[Tensor, Tensor]:
    """All drawings: distance to the pen's path (10, PER_DIGIT+1, FIELD, FIELD), points on it (10, ., POINTS, 2).

    Units: glyph heights / 2. The last drawing of each digit is the typeset one. Built once, from a fixed seed:
    the drawings are public and are the same for everybody.
    """
    rng, fields, points = np.random.default_rng(0), [], []
    axis = torch.linspace(-REACH, REACH, FIELD)
    where = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    for digit, ways in STROKES.items():
        drawn = np.stack([_curve(ways[i % len(ways)], rng.uniform(0.1, 0.6), rng) for i in range(PER_DIGIT)])
        middle = (drawn.max(1, keepdims=True) + drawn.min(1, keepdims=True)) / 2
        p = torch.tensor((drawn - middle) / 7, dtype=torch.float32)
        d = torch.stack([torch.cdist(where, one).amin(1) for one in p]).reshape(-1, FIELD, FIELD)
        font_field, font_points = _font_template(digit)
        fields.append(torch.cat([d, font_field[None]]))
        points.append(torch.cat([p, font_points[None]]))
    return torch.stack(fields), torch.stack(points)


def glyphs(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n public digits in MNIST's documented frame: a 20 x 20 box, centre of mass in the middle of 28 x 28.

    Each image: a random drawing -> rotation, shear, scale -> fitted into the box -> smooth elastic
    displacement -> inked with a random stroke width.
    Shapes: images (n, 1, 28, 28) float32 in [-1, 1], labels (n,) int64
    Source: elastic displacement, Simard et al. 2003; the frame, the MNIST database's own description
    """
    if n < 1:
        raise ValueError(f"glyphs: n = {n}, expected at least 1 image")
    fields, points = _templates()
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    way = torch.randint(PER_DIGIT, (n,), generator=generator)
    way[torch.rand(n, generator=generator) < 0.1] = PER_DIGIT            # one in ten is typeset

    # the affine map M = rotation . shear . scale, unit: glyph units -> glyph units
    turn, slant, squeeze = uniform(-0.25, 0.25), uniform(-0.15, 0.45), uniform(0.6, 1.15)
    cos, sin, zero, one = turn.cos(), turn.sin(), torch.zeros(n), torch.ones(n)
    rotation = torch.stack([cos, -sin, sin, cos], -1).view(n, 2, 2)
    shear = torch.stack([one, -slant, zero, one], -1).view(n, 2, 2)
    M = rotation @ shear @ torch.diag_embed(torch.stack([squeeze, one], -1))

    # size: the longer side of the inked box becomes 20 pixels; place: the centre of mass goes to the middle
    half_width = uniform(0.7, 1.9)                                       # of the stroke, in pixels
    p = points[labels, way] @ M.mT                                       # (n, POINTS, 2)
    box = (p.amax(1) - p.amin(1)).amax(1)
    scale = (20 - 2 * half_width) / box                                  # pixels per glyph unit
    centre = p.mean(1)

    # for each pixel, where on the template it comes from (the inverse map), plus a smooth displacement
    axis = torch.arange(28.0) - 13.5
    pixel = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, 784, 2)
    bend = F.interpolate(torch.randn(n, 2, 5, 5, generator=generator), size=(28, 28), mode="bicubic", align_corners=True)
    bend = bend.flatten(2).mT * uniform(0.2, 1.0, 1, 1)                  # (n, 784, 2) pixels
    source = (((pixel + bend) / scale.view(n, 1, 1) + centre[:, None]) @ torch.linalg.inv(M).mT) / REACH
    distance = F.grid_sample(fields[labels, way][:, None], source.view(n, 28, 28, 2), padding_mode="border",
                             align_corners=True)                         # (n, 1, 28, 28) glyph units
    distance = distance * (scale * squeeze.sqrt()).view(n, 1, 1, 1)      # pixels
    edge = uniform(0.8, 1.6).view(n, 1, 1, 1)                            # width of the grey rim, in pixels
    ink = ((half_width.view(n, 1, 1, 1) - distance) / edge + 0.5).clamp(0, 1)
    return ink * 2 - 1, labels


# -----------------------------------------------------------------------------
# 2. private images: from disk, as uint8 tensors
#
# name -> (declared training size N, channels, side, classes), all from the data sets' own publications:
# these are public constants, the privacy plan never counts the private images (CelebA: no classes, side after resizing).

KNOWN = {"mnist": (60_000, 1, 28, 10), "fashion-mnist": (60_000, 1, 28, 10), "kmnist": (60_000, 1, 28, 10),
         "emnist-letters": (124_800, 1, 28, 26), "cifar10": (50_000, 3, 32, 10), "cifar100": (50_000, 3, 32, 100),
         "celeba": (162_770, 3, 64, None)}


GARMENTS = ("T-shirt-top", "trouser", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = {"fashion-mnist": GARMENTS, "clothes": GARMENTS, "cifar10": CIFAR10}   # else numbers


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
              Images of both are resized and centre-cropped to size x size, default 32. mnist ships in
              assets/; the others are read from, or downloaded to, data_dir.
    classes:  of a folder: the declared names in the order of their labels. Without them the sub-folders that
              exist are numbered in natural order, which for private images would be private: one may move it
    channels: of a folder: 1 reads its pictures as grey, 3 as colour
    Errors: unknown name or split, a truncated, unreadable or missing file, no network -> ValueError in one line
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
    idx_folder = ASSETS / "mnist" if name == "mnist" and data_dir is None else _idx_folder(root, name)
    if idx_folder is not None:
        prefix = "train" if split == "train" else "t10k"
        images = read_idx(idx_folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(idx_folder / f"{prefix}-labels-idx1-ubyte.gz")
        if len(images) != len(labels):
            raise ValueError(f"{idx_folder}: {len(images)} images but {len(labels)} labels; fetch the files again")
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
            crop = transforms.Compose([transforms.CenterCrop(140), transforms.Resize(64), transforms.PILToTensor()])
            faces = datasets.CelebA(str(root), split, target_type="identity", transform=crop, download=True)
            return torch.stack([image for image, _ in faces]), torch.zeros(len(faces), dtype=torch.int64)
        if name == "emnist-letters":
            warnings.warn("emnist-letters was written by the people who wrote MNIST: not public data for MNIST")
            found = datasets.EMNIST(str(root), "letters", train=train, download=True)
            return found.data.mT[:, None].contiguous(), found.targets - 1          # stored transposed, labels 1..26
        kind = dict(mnist=datasets.MNIST, kmnist=datasets.KMNIST, cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100)
        kind["fashion-mnist"] = datasets.FashionMNIST
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
# 3. classes have names: those of the private images are declared, never counted

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

    flag: --classes, comma-separated; else those of a published data set, else the base's own names.
    Errors: a folder of which nobody has said what its classes are -> ValueError
    """
    if flag:
        names = [word.strip() for word in flag.split(",")]
        if name in KNOWN or "" in names or len(set(names)) < len(names):
            raise ValueError(f"--classes {flag}: expected different names, with commas, for folder: or npz:")
        return names
    if name.startswith("folder:") and base is None:
        raise ValueError(f"--data {name} on a base without class names: which sub-folders exist is private; "
                         f"declare the classes, --classes NAME,NAME,... (the first is the base's class 0)")
    return base if name.startswith(("folder:", "npz:")) else class_names(name)


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
                         f"expected names that it has, or at most {classes} new ones, which take its classes in order")
    return list(range(len(names)))


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], the range that the diffusion works in; latents are floats already."""
    if images.dtype != torch.uint8:
        return images
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255]; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


if __name__ == "__main__":
    from torchvision.utils import save_image
    images, labels = glyphs(20_000, torch.Generator().manual_seed(0))
    order = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(10)])
    Path("runs").mkdir(exist_ok=True)
    save_image((images[order] + 1) / 2, "runs/glyphs.png", nrow=20)
    print("200 public digits, drawn by code and by nobody: runs/glyphs.png")
