"""overview.py -- draws the pictures of README and docs/results.md: public base | private model | real images.

Both models start from the same noise and use the same sampler. The real images are the first test images of
each class. They were not used in training, and no image is chosen by eye.

  $ python benchmarks/overview.py --data-dir datasets      # assets/overview.png; reads datasets/FashionMNIST/
  $ python benchmarks/overview.py --colour                 # assets/cells.png
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
from support import runs  # noqa: E402

ROWS = 4                                                         # images of each class
SCALE, GAP, HEAD = 2, 24, 44                                     # zoom; pixels between panels; of the title
GREY = [("mnist", "mnist-eps10"), ("fashion-mnist", "fashion-eps10")]    # data set, run in assets/
COLOUR = [("cells", "cells-eps10")]


def drawn(folder: Path, public: bool) -> Tensor:
    """ROWS images of each class, with a column for each class: (ROWS * classes, C, H, W) uint8."""
    run, same_noise = runs.load(folder, public), torch.Generator().manual_seed(0)
    labels = sample.one_of_each(run).repeat(ROWS)
    threshold = 0 if run.coder else 8                            # grey levels; digits lie on black
    return sample.generate(run, labels, len(labels), threshold=threshold, generator=same_noise, quiet=True)


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
    p.add_argument("--colour", action="store_true",
                   help="draw the picture of blood cells for docs/results.md instead")
    a = p.parse_args()
    zoom, rows = 1 if a.colour else SCALE, []
    for name, run in COLOUR if a.colour else GREY:
        folder, data_dir = ROOT / "assets" / run, a.data_dir if name == "fashion-mnist" else None
        sides = (drawn(folder, True), drawn(folder, False), real(name, data_dir))
        rows.append([panel(images, zoom) for images in sides])

    width, height = rows[0][0].size
    size = (3 * width + 2 * GAP, HEAD + len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB" if a.colour else "L", size, "white")
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(30)
    seen = "photographs, drawings" if a.colour else "drawings by code"
    titles = (f"public base: {seen}", "private model, epsilon = 10", "real test images")
    for column, title in enumerate(titles):
        left = column * (width + GAP)
        write.text((left + width // 2, HEAD // 2 - 2), title, 0, font, anchor="mm")
        for row in range(len(rows)):
            sheet.paste(rows[row][column], (left, HEAD + row * (height + GAP)))
    out = ROOT / "assets" / ("cells.png" if a.colour else "overview.png")
    sheet = sheet.quantize(256) if a.colour else sheet                   # a third of the bytes
    sheet.save(out, optimize=True)
    print(f"wrote {out.relative_to(ROOT)}, {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    main()
