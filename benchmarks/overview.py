"""overview.py -- draws the picture at the top of the README: public base | private model | real images.

Both models start from the same noise and use the same sampler: the default one (dpm), and for faces ddim
with eta = 1 and without guidance. The real images are the first test images of each class. They were not used
in training, and no image is chosen by eye. No real face is shown, because no face of the private data ships.

  $ python benchmarks/overview.py --data-dir datasets      # assets/overview.png; reads datasets/FashionMNIST/
"""
import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import sample  # noqa: E402
from ddpm import Sampling  # noqa: E402
from support import runs  # noqa: E402

ROWS, FACES = 4, 9                   # rows of images in each panel; columns where there are no classes
GAP, HEAD = 24, 44                   # pixels between panels; height of the titles
SETS = {"mnist": 2, "fashion-mnist": 2, "cells": 1, "faces": 1}          # data set -> zoom
TITLES = ("public base", "private model, epsilon = 10", "real test images")


def drawn(folder: Path, public: bool) -> Tensor:
    """ROWS images of each class, with a column for each class: (ROWS * columns, C, H, W) uint8."""
    run, same_noise = runs.load(folder, public), torch.Generator().manual_seed(0)
    labels = sample.one_of_each(run)
    how = Sampling() if len(labels) > 1 else Sampling("ddim", guidance=0)
    labels = labels.repeat(ROWS * (1 if len(labels) > 1 else FACES))
    threshold = 0 if run.coder else 8                            # grey levels; digits lie on black
    return sample.generate(run, labels, len(labels), how, threshold=threshold, generator=same_noise,
                           quiet=True)


def real(name: str, data_dir: str | None) -> Tensor:
    """The first ROWS test images of each class, in the layout of `drawn`."""
    images, labels = data.load(name, "test", data_dir)
    first = torch.stack([(labels == c).nonzero()[:ROWS, 0] for c in labels.unique()])    # (classes, ROWS)
    return images[first.T.flatten()]


def panel(images: Tensor, zoom: int) -> Image.Image:
    """uint8 images (n, C, H, W) as one picture with ROWS rows, enlarged `zoom` times."""
    grid = make_grid(images, nrow=len(images) // ROWS, padding=1, pad_value=70)          # (3, H, W)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.LANCZOS)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", help="folder of Fashion-MNIST, or to download it to (default: datasets)")
    a = p.parse_args()
    rows = []
    for name, zoom in SETS.items():
        folder = ROOT / "assets" / f"{name.removesuffix('-mnist')}-eps10"
        sides = [drawn(folder, True), drawn(folder, False)]
        if name in data.KNOWN:
            sides.append(real(name, a.data_dir if name == "fashion-mnist" else None))
        rows.append([panel(images, zoom) for images in sides])

    width = max(row[0].width for row in rows)
    height = HEAD + sum(row[0].height + GAP for row in rows) - GAP
    sheet = Image.new("RGB", (3 * width + 2 * GAP, height), "white")
    write, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(30), ImageFont.load_default(20)
    for column, title in enumerate(TITLES):
        middle, top = column * (width + GAP) + width // 2, HEAD
        write.text((middle, HEAD // 2 - 2), title, "black", font, anchor="mm")
        for row in rows:
            if column < len(row):
                sheet.paste(row[column], (middle - row[column].width // 2, top))
            else:
                write.text((middle, top + row[0].height // 2), "not shown: no private face ships", "gray",
                           small, anchor="mm")
            top += row[0].height + GAP
    out = ROOT / "assets" / "overview.png"
    sheet.quantize(256).save(out, optimize=True)                         # a third of the bytes
    print(f"wrote {out.relative_to(ROOT)}, {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    main()
