"""overview.py -- the README's picture: public base | private model | real images.

Both models draw from the same noise with the same sampler. The real images are the first test images of each
class: they were not trained on, and nothing is chosen by eye.

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

ROWS = 4                                                         # images a class
SCALE, GAP, HEAD = 2, 24, 44                                     # zoom; pixels: between panels, title
TITLES = ("public base: drawings by code", "private model, epsilon = 10", "real test images")


def drawn(run: Path, public: bool) -> Tensor:
    """ROWS images of each of the ten classes, a column a class: (10 ROWS, 1, 28, 28) uint8."""
    model = sample.load_run(run, public)
    labels = torch.arange(10).repeat(ROWS)
    shape = (len(labels), 1, 28, 28)
    same_noise = torch.Generator().manual_seed(0)
    return sample.generate(model, labels, shape, guidance=0.5, floor=8, generator=same_noise, quiet=True)


def real(name: str, data_dir: str | None) -> Tensor:
    """The first ROWS test images of each class, in the layout of `drawn`."""
    images, labels = data.load(name, "test", data_dir)
    first = torch.stack([(labels == c).nonzero()[:ROWS, 0] for c in range(10)])      # (10, ROWS)
    return images[first.T.flatten()]


def panel(images: Tensor) -> Image.Image:
    grid = make_grid(images, nrow=10, padding=1, pad_value=70)                       # (3, H, W)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.LANCZOS)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", default="datasets", help="the folder that holds Fashion-MNIST, or gets it")
    a = p.parse_args()
    rows = []
    for name, data_dir in (("mnist", None), ("fashion-mnist", a.data_dir)):
        folder = ROOT / "assets" / f"{name.removesuffix('-mnist')}-eps10"
        rows.append([panel(drawn(folder, True)), panel(drawn(folder, False)), panel(real(name, data_dir))])

    width, height = rows[0][0].size
    sheet = Image.new("L", (3 * width + 2 * GAP, HEAD + 2 * height + GAP), 255)
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(30)
    for column, title in enumerate(TITLES):
        left = column * (width + GAP)
        write.text((left + width // 2, HEAD // 2 - 2), title, 0, font, anchor="mm")
        for row in range(2):
            sheet.paste(rows[row][column], (left, HEAD + row * (height + GAP)))
    sheet.save(ROOT / "assets" / "overview.png", optimize=True)
    print(f"wrote assets/overview.png, {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    main()
