"""smears.py -- public blood smears drawn by code: eight kinds of cells, one in the middle of each picture.

A public base for blood cells learns from these drawings, as one for MNIST learns from those of glyphs.py and
one for garments from those of clothes.py. They contain no photograph, and no number was measured on an image.
Proportions, shapes and stains were written down by hand from what textbooks say of a smear stained by
May-Gruenwald and Giemsa. The frame is the published one, with one cell in the middle (Acevedo et al. 2020).
docs/bases.md says what the author had seen before.

  $ python -m drawings.smears        # draws a sheet to runs/smears.png, one class per row
"""
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64


class Cell(NamedTuple):
    """What a textbook says of one kind of cell. Lengths of the nucleus are in units of the cell's radius."""
    radius: tuple[float, float]          # of the cell, pixels
    lobes: tuple[int, int]               # number of lobes of the nucleus, along an arc; 0: no nucleus
    lobe: tuple[float, float]            # radius of a lobe
    arc: tuple[float, float]             # radius of the arc that they lie on
    span: tuple[float, float]            # its length, radians
    plasma: tuple[float, float, float]   # colour (red, green, blue) in [0, 1]
    nucleus: tuple[float, float, float]
    granule: tuple[float, float, float]
    grains: tuple[float, float]          # share of the cell that granules cover
    coarse: int                          # random values across the picture: fewer make larger granules
    over: float                          # how much of the granules lies over the nucleus


CELLS = {
    "basophil": Cell((21, 27), (2, 3), (0.40, 0.55), (0.25, 0.45), (1.5, 3.5), (0.72, 0.60, 0.78),
                     (0.50, 0.32, 0.62), (0.28, 0.14, 0.42), (0.35, 0.6), 24, 1.0),
    "eosinophil": Cell((23, 29), (2, 3), (0.34, 0.44), (0.40, 0.55), (1.8, 3.2), (0.88, 0.68, 0.66),
                       (0.42, 0.25, 0.55), (0.84, 0.46, 0.40), (0.5, 0.85), 28, 0.15),
    "erythroblast": Cell((16, 23), (1, 1), (0.48, 0.68), (0.0, 0.22), (0.0, 0.1), (0.76, 0.66, 0.76),
                         (0.27, 0.13, 0.37), (0.66, 0.56, 0.70), (0.0, 0.15), 16, 0.0),
    "ig": Cell((25, 32), (1, 3), (0.58, 0.72), (0.15, 0.32), (0.0, 1.2), (0.72, 0.62, 0.80),
               (0.54, 0.33, 0.64), (0.56, 0.34, 0.62), (0.1, 0.45), 30, 0.3),
    "lymphocyte": Cell((17, 24), (1, 2), (0.70, 0.86), (0.0, 0.18), (0.0, 0.4), (0.66, 0.70, 0.86),
                       (0.42, 0.24, 0.55), (0.70, 0.45, 0.66), (0.0, 0.04), 26, 0.0),
    "monocyte": Cell((26, 33), (4, 6), (0.40, 0.52), (0.30, 0.45), (2.0, 4.2), (0.70, 0.68, 0.80),
                     (0.50, 0.34, 0.62), (0.85, 0.82, 0.88), (0.02, 0.2), 18, 0.1),
    "neutrophil": Cell((22, 28), (3, 5), (0.24, 0.33), (0.38, 0.52), (2.6, 4.6), (0.88, 0.76, 0.82),
                       (0.40, 0.23, 0.53), (0.78, 0.60, 0.74), (0.1, 0.4), 32, 0.05),
    "platelet": Cell((5, 10), (0, 0), (0.3, 0.5), (0.0, 0.0), (0.0, 0.1), (0.74, 0.62, 0.80),
                     (0.55, 0.36, 0.64), (0.50, 0.30, 0.60), (0.3, 0.7), 26, 1.0)}
NAMES = tuple(CELLS)      # of the classes, in the order of their labels
MOST_LOBES = 6
RED_CELLS = 7                            # the largest number of red cells in a picture
PLASMA, RED, RED_PALE = (0.95, 0.90, 0.86), (0.87, 0.68, 0.65), (0.93, 0.82, 0.79)
PIECE = 500                              # images drawn at a time


def _blob(x: Tensor, y: Tensor, radius: Tensor, wobble: Tensor, edge: float = 0.8) -> Tensor:
    """How much of each pixel lies inside a wavy disc around (0, 0), in [0, 1].

    Shapes: x, y (n, 64, 64) pixels from its centre; radius (n,); wobble (n, 4): its waves, in radii
    """
    angle, distance = torch.atan2(y, x), torch.hypot(x, y)
    a = wobble[:, :, None, None]
    wave = a[:, 0] * torch.cos(2 * angle) + a[:, 1] * torch.sin(2 * angle)
    wave = wave + a[:, 2] * torch.cos(3 * angle) + a[:, 3] * torch.sin(3 * angle)
    return torch.sigmoid((radius[:, None, None] * (1 + wave) - distance) / edge)


def _lay(picture: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Paint of `colour` (n, 3) laid over the picture (n, 3, 64, 64) where `mask` (n, 64, 64) says so."""
    return picture + mask[:, None] * (colour[:, :, None, None] - picture)


def draw(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n public smears: a light background, red cells, one cell in the middle, and a stain of its own.

    Shapes: images (n, 3, 64, 64) float32 in [-1, 1], labels (n,) int64, in the order of CELLS
    Errors: n < 1 -> ValueError
    """
    if n < 1:
        raise ValueError(f"smears.draw: n = {n}, expected at least 1 image")
    pieces = [_draw(min(PIECE, n - start), generator) for start in range(0, n, PIECE)]
    return torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces])


def _draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    labels = torch.randint(len(CELLS), (n,), generator=generator)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def one_of(field):                                     # between the ends of each image's kind
        ends = torch.tensor([getattr(cell, field) for cell in CELLS.values()], dtype=torch.float32)[labels]
        return ends[:, 0] + (ends[:, 1] - ends[:, 0]) * torch.rand(n, generator=generator)

    def colour(field, spread=0.04):
        return torch.tensor([getattr(cell, field) for cell in CELLS.values()])[labels] + noise(3) * spread

    def noise(*shape):
        return torch.randn(n, *shape, generator=generator)

    def cloud(across):                                       # smooth noise, about 0.7 in size: (n, 64, 64)
        return F.interpolate(noise(1, across, across), size=(SIDE, SIDE), mode="bicubic")[:, 0]

    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x - uniform(-2.5, 2.5, 1, 1), y - uniform(-2.5, 2.5, 1, 1)
    radius = one_of("radius")

    # the background, and red cells that leave the middle to the cell
    picture = torch.tensor(PLASMA)[None, :, None, None] + 0.01 * noise(3, SIDE, SIDE)
    count = torch.randint(2, RED_CELLS + 1, (n,), generator=generator)
    for i in range(RED_CELLS):
        size, angle = uniform(14, 19), uniform(0, 2 * math.pi)
        away = radius + size * uniform(0.75, 2.2)
        dx, dy = x - (away * angle.cos())[:, None, None], y - (away * angle.sin())[:, None, None]
        wobble = 0.06 * noise(4)
        there = (i < count).float()[:, None, None]
        picture = _lay(picture, there * _blob(dx, dy, size, wobble), torch.tensor(RED) + 0.03 * noise(3))
        pale = uniform(0.2, 0.9, 1, 1) * _blob(dx, dy, size * uniform(0.3, 0.55), wobble, edge=2.5)
        picture = _lay(picture, there * pale, torch.tensor(RED_PALE) + 0.02 * noise(3))

    # the cell's body
    wobble = 0.045 * noise(4)
    body = _blob(x, y, radius, wobble)
    picture = _lay(picture, body, colour("plasma"))
    picture = picture + (0.03 * body * cloud(10))[:, None]

    # its nucleus: lobes along an arc, which join where they overlap
    lobes = one_of("lobes").round()
    arc, span, turn = one_of("arc") * radius, one_of("span"), uniform(0, 2 * math.pi)
    nucleus = torch.zeros(n, SIDE, SIDE)
    for i in range(MOST_LOBES):
        angle = turn + span * (i / (lobes - 1).clamp(min=1) - 0.5)
        cx, cy = arc * angle.cos() + 0.5 * noise(), arc * angle.sin() + 0.5 * noise()
        lobe = one_of("lobe") * radius * uniform(0.9, 1.1)
        one = _blob(x - cx[:, None, None], y - cy[:, None, None], lobe, 0.06 * noise(4))
        nucleus = torch.maximum(nucleus, (i < lobes).float()[:, None, None] * one)
    nucleus = nucleus * body
    dark = colour("nucleus")
    picture = _lay(picture, 0.95 * nucleus, dark)
    picture = picture + (nucleus * (0.05 * cloud(14) + 0.03 * cloud(32)))[:, None]

    # its granules: they lie where smooth noise exceeds the threshold that makes them cover their share
    coarse = torch.tensor([cell.coarse for cell in CELLS.values()])
    sizes, which = coarse.unique(return_inverse=True)
    grain = torch.stack([cloud(int(size)) for size in sizes])[which[labels], torch.arange(n)]
    share = one_of("grains")[:, None, None].clamp(min=0.0005)
    threshold = 0.7 * math.sqrt(2) * torch.erfinv(1 - 2 * share)
    over = torch.tensor([cell.over for cell in CELLS.values()])[labels][:, None, None]
    grain = torch.sigmoid((grain - threshold) / 0.15) * body * (1 - nucleus * (1 - over))
    picture = _lay(picture, uniform(0.5, 0.95, 1, 1) * grain, colour("granule"))

    # the strength of the stain and of the light
    picture = picture * uniform(0.94, 1.04, 3, 1, 1) + uniform(-0.04, 0.03, 1, 1, 1)
    return picture.clamp(0, 1) * 2 - 1, labels


if __name__ == "__main__":
    from torchvision.utils import save_image
    images, labels = draw(400, torch.Generator().manual_seed(0))
    order = torch.cat([(labels == kind).nonzero()[:10, 0] for kind in range(len(CELLS))])
    Path("runs").mkdir(exist_ok=True)
    save_image((images[order] + 1) / 2, "runs/smears.png", nrow=10)
    print(f"{len(order)} public blood cells, drawn by code: runs/smears.png")
