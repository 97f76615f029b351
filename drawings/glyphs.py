"""glyphs.py -- public digits drawn by code: pen strokes and a font, deformed at random, in MNIST's frame.

Every way to write a digit is a list of strokes. A stroke is a list of "x,y" points on a 10 x 14 grid (y goes
down) that a smooth curve joins; a point that is written twice is a corner. The shapes were written down by
hand from how people are taught to write. No person's handwriting is in them and nothing was fitted to any
image, so they are public in the strict sense.

  $ python -m drawings.glyphs         # a sheet of 200: runs/glyphs.png
"""
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = tuple("0123456789")                              # of the classes, in the order of their labels
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
    8: ["7,1 4,0 2,3 4,6 8,9 8,13 4,14 1,12 2,9 6,6 8,3 7,1",
        "8,2 5,0 2,2 3,5 7,8 9,11 6,14 2,13 2,9 6,6 8,3 7,1",
        "5,0 2,2 2,5 5,7 8,5 8,2 5,0 | 5,7 1,9 1,12 5,14 9,12 9,9 5,7"],
    9: ["8,2 5,0 2,1 1,5 4,7 7,5 8,2 8,2 8,8 7,14", "9,1 5,0 1,3 2,6 6,6 8,3 9,1 8,8 6,12 2,14",
        "8,3 5,0 1,2 1,5 4,7 8,4 8,1 8,1 6,8 4,14", "7,1 3,1 1,4 3,7 7,4 8,1 8,1 8,8 8,14"],
}
FIELD, REACH = 40, 1.6  # a template is a FIELD x FIELD map over [-REACH, REACH]^2 of glyph units (height 2)
PER_DIGIT, POINTS = 240, 160  # jittered drawings of each digit; points along each drawing


def _curve(text: str, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """'x,y x,y | x,y ...' -> (POINTS, 2): points evenly spaced along jittered Catmull-Rom strokes."""
    dense = []
    for stroke in text.split("|"):
        p = np.array([[float(v) for v in xy.split(",")] for xy in stroke.split()])
        corner = np.r_[False, np.all(p[1:] == p[:-1], axis=1)]
        move = rng.normal(0, jitter, p.shape)
        move[corner] = move[np.flatnonzero(corner) - 1]                 # a corner's two points stay together
        p = p + move
        p = np.concatenate([p[:1], p, p[-1:]])
        u = np.linspace(0, 1, 40, endpoint=False)[:, None]
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:]):
            dense.append(0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2
                                + (3 * b - a - 3 * c + d) * u**3))
        dense.append(p[-1:])
    dense = np.concatenate(dense)
    step = np.hypot(*np.diff(dense, axis=0).T)
    step[step > 1.5] = 0  # a pen lifted between strokes leaves no ink
    length = np.r_[0, np.cumsum(step)]
    at = np.linspace(0, length[-1], POINTS)
    return dense[np.searchsorted(length, at).clip(0, len(dense) - 1)]


def _font_template(digit: int) -> tuple[Tensor, Tensor]:
    """A typeset digit (in the scalable font of Pillow) as (field, points), see _templates."""
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
    field = torch.tensor((outline + inside.max()) * 2 / height, dtype=torch.float32)  # 0 in a stroke's middle
    centre = torch.tensor([(x.max() + x.min()) / 2, (y.max() + y.min()) / 2])
    axis = torch.linspace(-REACH, REACH, FIELD) * height / 2
    where = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + centre
    field = F.grid_sample(field[None, None], (where / (size - 1) * 2 - 1)[None].float(),
                          padding_mode="border", align_corners=True)[0, 0]
    keep = np.linspace(0, len(x) - 1, POINTS).astype(int)
    points = (torch.tensor(np.stack([x[keep], y[keep]], 1)) - centre) * 2 / height
    return field, points.float()


@functools.cache
def _templates() -> tuple[Tensor, Tensor]:
    """All drawings: distance to the pen's path (10, PER_DIGIT+1, FIELD, FIELD), points (10, ., POINTS, 2).

    Units: glyph heights / 2. The last drawing of each digit is the typeset one. They are made once, from a
    fixed seed, so they are the same for everybody.
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


def draw(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n public digits in MNIST's documented frame: a 20 x 20 box, centre of mass in the middle of 28 x 28.

    Each image: a random drawing -> rotation, shear, scale -> fitted into the box -> smooth elastic
    displacement -> inked with a random stroke width.
    Shapes: images (n, 1, 28, 28) float32 in [-1, 1], labels (n,) int64
    Errors: n < 1 -> ValueError
    Source: elastic displacement: Simard et al. 2003; the frame: the MNIST database's own description
    """
    if n < 1:
        raise ValueError(f"glyphs.draw: n = {n}, expected at least 1 image")
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
    bend = F.interpolate(torch.randn(n, 2, 5, 5, generator=generator), size=(28, 28), mode="bicubic",
                         align_corners=True)
    bend = bend.flatten(2).mT * uniform(0.2, 1.0, 1, 1)                  # (n, 784, 2) pixels
    source = (((pixel + bend) / scale.view(n, 1, 1) + centre[:, None]) @ torch.linalg.inv(M).mT) / REACH
    distance = F.grid_sample(fields[labels, way][:, None], source.view(n, 28, 28, 2), padding_mode="border",
                             align_corners=True)                         # (n, 1, 28, 28) glyph units
    distance = distance * (scale * squeeze.sqrt()).view(n, 1, 1, 1)      # pixels
    edge = uniform(0.8, 1.6).view(n, 1, 1, 1)                            # width of the grey rim, in pixels
    ink = ((half_width.view(n, 1, 1, 1) - distance) / edge + 0.5).clamp(0, 1)
    return ink * 2 - 1, labels


if __name__ == "__main__":
    from torchvision.utils import save_image
    images, labels = draw(20_000, torch.Generator().manual_seed(0))
    order = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(10)])
    Path("runs").mkdir(exist_ok=True)
    save_image((images[order] + 1) / 2, "runs/glyphs.png", nrow=20)
    print("200 public digits, drawn by code: runs/glyphs.png")
