"""faces.py -- public portraits drawn by code, in the framing of CelebA and of Labeled Faces in the Wild.

A public base for photographs of faces learns from these drawings. A head is an ellipsoid with a relief, and
has the proportions of the artists' canon. It turns, a lamp lights it, and a camera takes the picture. No
photograph was looked at and no number was measured on one. The author knows what faces look like, and knows
the framing from the descriptions of the data sets.

  $ python -m drawings.faces         # draws a sheet to runs/faces.png
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
NAMES = ("face",)                        # the only class
PIECE = 100                              # images drawn at a time; in larger pieces each image takes longer
NUMBERS, FIELDS = 159, 6                 # random numbers of an image: single ones, and fields of 64 x 64

# Colours (red, green, blue) as a display shows them. Colours between two neighbours in a table occur, too.
SKIN = ((0.95, 0.79, 0.71), (0.91, 0.71, 0.59), (0.81, 0.59, 0.46), (0.62, 0.43, 0.31), (0.29, 0.19, 0.15))
HAIR = ((0.06, 0.05, 0.05), (0.09, 0.07, 0.06), (0.17, 0.11, 0.08), (0.31, 0.20, 0.12), (0.66, 0.50, 0.31))
RED, GREY = ((0.33, 0.16, 0.09), (0.48, 0.27, 0.16)), ((0.30, 0.30, 0.30), (0.80, 0.78, 0.76))
IRIS = ((0.12, 0.07, 0.04), (0.17, 0.10, 0.06), (0.25, 0.17, 0.09), (0.28, 0.36, 0.43))
THINGS = ((0.02, 0.02, 0.03), (0.12, 0.08, 0.06), (0.38, 0.26, 0.18), (0.72, 0.62, 0.50), (0.95, 0.94, 0.92),
          (0.60, 0.61, 0.62), (0.25, 0.26, 0.28), (0.08, 0.10, 0.20), (0.30, 0.45, 0.65), (0.66, 0.78, 0.90),
          (0.55, 0.65, 0.40), (0.16, 0.26, 0.12), (0.10, 0.10, 0.08), (0.45, 0.10, 0.10), (0.70, 0.35, 0.40))

# Bells on both halves of the face: the size, the place (across from the middle line, and down from the eyes),
# and the half widths across and down. The unit of length is the distance between the pupils.
RELIEF = ((0.30, 0.00, 0.52, 0.17, 0.16), (0.15, 0.17, 0.59, 0.09, 0.09), (0.14, 0.00, 0.08, 0.10, 0.22),
          (0.20, 0.00, 0.32, 0.13, 0.20), (-0.10, 0.42, -0.05, 0.28, 0.15), (0.06, 0.45, -0.30, 0.40, 0.12),
          (0.10, 0.62, 0.52, 0.26, 0.25), (0.10, 0.00, 1.52, 0.28, 0.18), (0.06, 0.00, 1.05, 0.45, 0.25),
          (-0.05, 0.00, 1.30, 0.30, 0.08))     # nose's tip, wings and bridge; socket, brow, cheek, chin, lips
SHADE = ((0.45, 0.40, -0.12, 0.27, 0.13), (0.20, 0.47, 0.20, 0.20, 0.06), (0.25, 0.00, 0.77, 0.20, 0.08),
         (0.28, 0.00, 1.29, 0.22, 0.07), (0.60, 0.105, 0.66, 0.055, 0.035), (0.25, 0.27, 0.58, 0.035, 0.10),
         (0.30, 0.44, 1.00, 0.05, 0.05))       # below brow, eye, nose and lip; nostril, wing, mouth's corner
BLUSH = ((0.15, 0.62, 0.55, 0.30, 0.25), (0.12, 0.00, 0.50, 0.16, 0.20))       # cheeks and nose


def _bell(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    """1 at u = v = 0, falling to 1 / e at u = width and at v = height."""
    return torch.exp(-(u / width) ** 2 - (v / height) ** 2)


def _inside(distance: Tensor, edge=0.5) -> Tensor:
    """1 where a distance in pixels is below 0 and 0 where it is above, with a border as soft as `edge`."""
    return torch.sigmoid(-distance / edge)


def _lay(picture: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Paint of `colour` (n, 3, ...) laid over the picture (n, 3, ...) where `mask` (n, ...) says so."""
    return picture + mask[:, None] * (colour - picture)


def _ellipsoid(x: Tensor, y: Tensor, axes: Tensor, turn: Tensor, nod: Tensor) -> tuple[Tensor, ...]:
    """Where rays at (x, y) meet a turned ellipsoid: its own coordinates, depth, and distance from its rim."""
    right = torch.stack([turn.cos(), 0 * turn, turn.sin()], 1)
    down = torch.stack([nod.sin() * turn.sin(), nod.cos(), -nod.sin() * turn.cos()], 1)
    near = torch.stack([-nod.cos() * turn.sin(), nod.sin(), nod.cos() * turn.cos()], 1)
    p = x[:, None] * right + y[:, None] * down                                           # (n, 3, 64, 64)
    pp, pn, nn = (p / axes).square().sum(1), (p * near / axes ** 2).sum(1), (near / axes).square().sum(1)
    square = (pn ** 2 - nn * (pp - 1)).clamp(min=-0.6)      # below 0 the ray misses, and the depth goes on
    depth = (torch.where(square > 0.04, square.clamp(min=0.04).sqrt(), 0.1 + square / 0.4) - pn) / nn
    return p + depth[:, None] * near, depth, 1.3 * ((pp - pn ** 2 / nn).clamp(min=1e-6).sqrt() - 1)


def draw(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n public portraits, each with a person, a lamp and a camera of its own.

    Shapes: images (n, 3, 64, 64) float32 in [-1, 1], labels (n,) int64, all 0 because there is one class
    Errors: n < 1 -> ValueError
    """
    if n < 1:
        raise ValueError(f"faces.draw: n = {n}, expected at least 1 image")
    pieces = [_draw(min(PIECE, n - start), generator) for start in range(0, n, PIECE)]
    return torch.cat(pieces), torch.zeros(n, dtype=torch.int64)


def _draw(n: int, generator: torch.Generator | None) -> Tensor:
    size = NUMBERS + FIELDS * SIDE ** 2                     # for each image by itself: PIECE changes nothing
    pool = torch.stack([torch.randn(size, generator=generator) for _ in range(n)])
    numbers = iter(pool[:, :NUMBERS, None, None].clamp(-2.5, 2.5).unbind(1))             # (n, 1, 1) each
    fields = iter(pool[:, NUMBERS:].view(n, FIELDS, SIDE, SIDE).unbind(1))               # (n, 64, 64) each

    def normal(mean, spread):
        return mean + spread * next(numbers)

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * torch.special.ndtr(next(numbers))

    def often(share):
        return (uniform() < share).float()

    def colour(table, part=1.0):                            # light (n, 3, 1, 1), from a table's first part
        place, rows = (part * uniform() * (len(table) - 1))[:, 0], torch.tensor(table)
        row = place.long().clamp(max=len(table) - 2)
        shown = torch.lerp(rows[row[:, 0]], rows[row[:, 0] + 1], place - row)
        return (shown[..., None, None] * torch.stack([normal(1, 0.025) for _ in "rgb"], 1)).clamp(0, 1) ** 2.2

    def cloud(power):                                       # a field whose amplitude falls like 1 / f^power
        f = torch.hypot(torch.fft.fftfreq(SIDE)[:, None], torch.fft.rfftfreq(SIDE)).clamp(min=1 / SIDE)
        x = torch.fft.irfft2(torch.fft.rfft2(next(fields)) * f ** -power)
        return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)

    def bells(table):
        return torch.stack([a * uniform(0.6, 1.4) * _bell(m - b, v - d, e, f) for a, b, d, e, f in table])

    def lit(z):                                             # the light on a height field, and its gloss
        slope_y, slope_x = torch.gradient(z, dim=(1, 2))
        facing = F.normalize(torch.stack([-slope_x * D, -slope_y * D, torch.ones_like(z)], 1), dim=1)
        direct = (((facing * lamp).sum(1, keepdim=True) + wrap[:, None]) / (1 + wrap[:, None])).clamp(min=0)
        light = torch.lerp(direct, 0.75 - 0.25 * facing[:, 1:2], ambient[:, None])
        return light, (facing * halfway).sum(1, keepdim=True).clamp(min=0)

    # The person, the lamp, and the pose: (x, y) turn with the head, and (bx, by) stay with the body.
    man, old, dark, smile = often(0.5), often(0.3), often(0.35), often(0.62) * uniform(0.3)
    makeup, curly = (1 - man) * often(0.65), often(0.15 + 0.3 * dark)
    skin = _lay(colour(SKIN, 0.5), dark, colour(SKIN[2:]))
    dye = _lay(_lay(colour(HAIR, 1 - 0.6 * dark), often(0.05), colour(RED)), old * often(0.5), colour(GREY))
    azimuth, height, ambient, wrap = normal(0, 0.7), normal(0.55, 0.3), uniform(0.12, 0.55), uniform(0, 0.35)
    lamp = torch.stack([azimuth.sin() * height.cos(), -height.sin(), azimuth.cos() * height.cos()], 1)
    halfway = F.normalize(lamp + torch.tensor([0.0, 0.0, 1.0])[:, None, None], dim=1)    # to the camera
    D = 16.2 * torch.exp(normal(0, 0.11))                   # pixels from pupil to pupil: the unit of length
    turn, nod, roll = normal(0, 0.24), normal(-0.02, 0.10), normal(0, 0.07)              # radians
    down, across = torch.meshgrid(torch.arange(SIDE) - 31.5, torch.arange(SIDE) - 31.5, indexing="ij")
    bx, by = (across + normal(0, 1.3)) / D, (down + normal(3.5, 1.8)) / D
    x = bx * roll.cos() + by * roll.sin() + turn.sin()      # the eyes, not the head, are in the middle
    y = by * roll.cos() - bx * roll.sin() - 1.2 * nod.sin()
    bx, by, low = bx + turn.sin(), by - 1.2 * nod.sin(), F.softplus((y - 0.3) * 5) / 5
    # The head: (u, v) are places on the face, a little stretched for every person.
    axes = torch.stack([normal(1.14, 0.05) + 0.03 * man, normal(1.74, 0.06), normal(1.45, 0.05)], 1)
    jaw = 1 - (normal(0.12, 0.03) - 0.06 * man) * low.clamp(max=1.6)
    point, depth, rim = _ellipsoid((x - 0.35 * turn.sin() * low) / jaw, y, axes, turn, nod)
    u, v = point[:, 0] * normal(1, 0.04), point[:, 1]
    nose = (0.4 * _bell(u, v - 0.56, 0.4, 0.3) + 0.18 * _bell(u, v - 0.2, 0.3, 0.25)) * normal(1, 0.15)
    u, v = u - nose * turn.sin(), v + nose * nod.sin() + normal(0, 0.04) * (2.5 * v + uniform(0, 6)).sin()
    m, side = u.abs(), torch.tanh(8 * u)
    # The background: two soft borders between colours, and clouds.
    picture, haze = colour(THINGS).expand(n, 3, SIDE, SIDE), cloud(2)
    for _ in range(2):
        border = (across * normal(0, 1) + down * normal(0, 1)) / 32 + normal(0, 0.5)
        border = border * torch.exp(uniform(0, 3)) + 1.5 * often(0.6) * cloud(2)
        picture = _lay(picture, torch.sigmoid(border), colour(THINGS))
    picture = picture * torch.exp(0.6 * uniform() ** 1.5 * haze)[:, None]
    # The hair: strands run from a parting, over a cap above the hairline and down a curtain.
    long, bald = often(0.70 - 0.62 * man), man * often(0.05 + 0.08 * old)
    volume, end = uniform(0.10, 0.32) + 0.1 * curly, uniform(0.15, 0.4) + long * torch.exp(normal(0.5, 0.5))
    angle, distance = torch.atan2(x - normal(0, 0.5), y + 1.8), torch.hypot(x, y + 1.8)
    ray = torch.stack([angle / 3.15, 0.09 * distance - 0.9], -1)
    frizz, threads = cloud(1.2), next(fields)[:, None]
    fine = F.grid_sample(threads, 0.8 * ray, padding_mode="reflection", align_corners=False)[:, 0]
    coarse = F.grid_sample(threads, 0.25 * ray, padding_mode="reflection", align_corners=False)[:, 0]
    strand = torch.lerp(0.75 * fine + 0.6 * coarse, frizz, 0.8 * curly)
    scalp, hair_depth, hair_rim = _ellipsoid(x, y + 0.06, axes + volume[:, None], turn, nod)
    line = normal(-0.88, 0.10) + normal(0, 0.18) * scalp[:, 0]
    line = line + 0.4 * often(0.18) - 0.28 * man * often(0.2) - 3 * bald              # fringe, receding, bald
    temple = torch.atan2(scalp[:, 0].abs(), scalp[:, 2]) - normal(0.70, 0.08) + 0.1 * long - 0.5 * bald
    line = (line + F.softplus(temple * 14) / 4).minimum(end) + 0.1 * strand
    cap = _inside(hair_rim * D + 0.6 * strand * (0.3 + curly), 0.8 + 0.8 * curly)
    cap = cap * _inside((scalp[:, 1] - line) * D, 1.2 + 0.6 * curly)
    light, gloss = lit(hair_depth)
    hair = dye * torch.exp((0.34 - 0.25 * dye.mean(1)) * strand)[:, None]
    hair = hair * (0.15 + 0.95 * light + 0.3 * gloss ** 8)
    fall = (x + 0.25 * turn.sin()).abs() - axes[:, 0] - volume - uniform(0, 0.3) * y.clamp(0, 1.5)
    curtain = _inside((fall - 0.06 * strand) * D, 0.9) * _inside((y - end - 0.15 * strand) * D, 1.5)
    curtain = curtain * long * _inside((-0.6 - y) * D, 2)
    picture = _lay(picture, curtain, hair * 0.55)
    # The neck in the chin's shadow, the clothes, hair in front of them, and the ears.
    thick = normal(0.52, 0.04) + 0.16 * man
    falloff = 0.6 + 0.4 * ambient + 0.4 * azimuth.sin() * bx.clamp(-1, 1)
    neck = _inside((bx.abs() - thick - 0.35 * F.softplus((by - 2) * 4) / 4) * D) * _inside((0.9 - by) * D, 1)
    chin = 1 - uniform(0.7, 0.95) * torch.exp(-rim.clamp(min=0) / uniform(0.4, 1.0))
    picture = _lay(picture, neck, skin * (0.85 * chin * falloff)[:, None])
    shoulder = normal(2.0, 0.08) + uniform(0.2, 0.45) * (bx.abs() - 0.5).clamp(min=0)
    opening = 2 + 0.9 * (uniform(0.2, 0.9) - bx.abs()).clamp(min=0)
    body = _inside((shoulder.maximum(opening) - by) * D, 0.8)
    folds = (torch.exp(0.18 * haze) * falloff)[:, None]
    shirt = body * often(0.4) * _inside((bx.abs() - 0.62 + 0.5 * (by - 2)) * D)
    picture = _lay(_lay(picture, body, colour(THINGS) * folds), shirt, colour(THINGS) * folds)
    front = curtain * _inside((0.75 + 0.1 * y - x.abs()) * D, 1.2) * often(0.75)
    picture = _lay(picture, front, hair * 0.75)
    light, gloss = lit(depth + bells(RELIEF).sum(0))
    ear = torch.hypot(((x + 0.15 * turn.sin()).abs() - 1.12 * turn.cos()) / 0.12, (y - 0.16) / 0.36) - 1
    picture = _lay(picture, _inside(ear * 0.14 * D), 0.6 * skin * light.mean((2, 3), keepdim=True))
    # The skin: redder cheeks and nose, shadows in hollows, below the hair and along the folds of a smile.
    blush = bells(BLUSH).sum(0)[:, None] * torch.tensor([-0.1, 1.0, 0.8])[:, None, None]
    fold = torch.exp(-((m - 0.42 * v + 0.05) / 0.07) ** 2) * _bell(m - 0.36, v - 0.9, 0.3, 0.25)
    hollow = (1 - bells(SHADE)).prod(0) * (1 - 0.45 * cap.roll(2, 1) * (1 - cap))
    hollow = hollow * (1 - (0.08 + 0.15 * smile + 0.08 * old) * fold) * torch.exp(0.03 * (1 + old) * frizz)
    flesh = skin * (1 - blush) * light * hollow[:, None] + uniform(0.01, 0.11)[:, None] * gloss ** 10
    # The beard and the brows.
    full, bend = man * often(0.16), (m - 0.52) / 0.34
    beard = torch.sigmoid(9 * (v - 0.78 - 0.35 * (0.45 - m).clamp(-0.5) + 0.95 * (m - 0.75).clamp(min=0)))
    moustache = _inside(((v - 0.86 - 0.12 * m).abs() - 0.1) * D, 0.8) * _inside((m - 0.42) * D, 1)
    moustache = moustache * full.maximum(man * often(0.1))
    beard = moustache.maximum(beard * full.maximum(man * often(0.5) * uniform(0.08, 0.4)))
    brow = (v + normal(0.28, 0.03) - 0.04 * man + uniform(0.02, 0.09) * (1 - (bend - 0.25) ** 2)).abs()
    brow = _inside((brow - (0.065 + 0.02 * man) * (1 - 0.35 * bend)) * D)
    brow = brow * _inside((bend.abs() - 1) * 0.34 * D, 0.9)
    for mask in (beard * (1 - _bell(u, v - 1.07, 0.34, 0.1)), brow * uniform(0.55, 1)):
        mask = mask * (0.85 + 0.12 * frizz).clamp(0, 1)
        flesh = _lay(flesh, mask, (0.7 * dye + 0.03 * skin) * light * torch.exp(0.25 * frizz)[:, None])
    # The eyes: a white, an iris, a pupil and a highlight between two lids with lashes and a crease.
    eu, ev = (m - 0.5) / 0.235, v - normal(-0.03, 0.05) * (m - 0.5)
    arc, ends = (1 - eu ** 2).clamp(min=0), _inside((eu.abs() - 1.03) * 0.235 * D)
    high, gaze = normal(0.135, 0.02) * (1 - 0.35 * smile), side * (normal(0, 0.04) - 0.08 * turn.sin())
    upper, lower = ev + high * arc ** 0.8, ev - 0.55 * high * arc
    away = torch.hypot(m - 0.5 - gaze, ev + 0.02) * D
    white = (0.2 + 0.15 * (upper / high).clamp(0, 1) - 0.08 * eu ** 2)[:, None] * light
    iris = colour(IRIS, 1 - 0.6 * dark) * (0.35 + 0.65 * light)
    eye = _lay(_lay(white, _inside(away - 0.112 * D, 0.4), iris), _inside(away - 0.055 * D, 0.4), 0.1 * iris)
    glint = _bell(m - 0.5 - gaze - 0.04 * side * azimuth.sin(), ev + 0.06, 0.04, 0.04)
    eye = eye + (uniform(0.1, 0.5) * glint)[:, None]
    flesh = _lay(flesh, _inside(torch.maximum(-upper, lower) * D, 0.4) * ends, eye)
    lashes, crease = (upper + 0.015, 0.045, 0.75 + 0.2 * makeup), (upper + 0.09, 0.03, 0.3)
    for place, width, ink in (lashes, (lower, 0.03, 0.25), crease):
        flesh = flesh * (1 - ink * ends * torch.exp(-(place / width) ** 2))[:, None]
    # The mouth: two lips, and between them teeth in front of the dark.
    gape = (smile * often(0.75) * uniform(0.2)).maximum(often(0.1) * uniform()) * 0.2
    half, plump = normal(0.40, 0.03) * (1 + 0.28 * smile), normal(0.09, 0.018) - 0.02 * smile + 0.03 * dark
    bow, ends = (u / half) ** 2, _inside((m - half) * D)
    seam = v - 1.03 - 0.05 * smile + (0.10 * smile + normal(0, 0.012)) * bow + normal(0, 0.03) * u
    top, bottom = seam + 0.3 * gape * (1 - bow), seam - 0.85 * gape * (1 - bow)
    lip = torch.maximum(-top - plump * (1 - bow), bottom - 1.3 * plump * (1 - bow)) * D
    red = makeup * uniform(-0.6, 1).clamp(min=0)            # lipstick
    tint = skin * torch.stack([0.72 - 0.1 * red, 0.42 - 0.3 * red, 0.40 - 0.25 * red], 1)
    tint = tint * light * (0.8 + 0.35 * torch.sigmoid(40 * seam))[:, None]   # the upper lip is darker
    flesh = _lay(flesh, 0.85 * _inside(lip) * ends, tint)
    hole = _inside(torch.maximum(-top, bottom) * D, 0.4) * ends
    teeth = _inside((top - 0.13) * D) * _inside((m - 0.8 * half) * D, 0.8) * (gape > 0.03) * (1 - 0.4 * bow)
    flesh = _lay(flesh, hole, 0.02 + teeth[:, None] * light * torch.tensor([0.65, 0.60, 0.52])[:, None, None])
    flesh = flesh * (1 - 0.7 * (1 - hole) * ends * torch.exp(-(seam / 0.028) ** 2))[:, None]
    # The head is laid over the background and the hair over the head; some people wear glasses.
    face, power, bar = _inside(rim * D, 0.6), uniform(2.2, 5), (v + 0.05).abs() - 0.03
    picture = _lay(_lay(picture, face, flesh), cap, hair)
    lens_u, lens_v = (m - 0.52).abs() / uniform(0.33, 0.40), (v - 0.06).abs() / uniform(0.20, 0.30)
    lens = (lens_u ** power + lens_v ** power) ** (1 / power) - 1
    frame = _inside(lens.abs() * 0.3 * D - uniform(0.3, 0.9), 0.35)
    frame = frame.maximum(_inside(bar.maximum((m - 0.15).minimum(0.86 - m)) * D, 0.4)) * face
    picture = _lay(picture, frame * often(0.13) * uniform(0.5, 0.95), colour(HAIR))
    # The camera: exposure, white balance, a soft or a sharpened picture, a display's curve, contrast, grain.
    balance = normal(0.02, 0.05)[:, None] * torch.tensor([1.0, 0.1, -1.2])[:, None, None]
    exposure = normal(-1.15, 0.25)[:, None] - picture.mean((1, 2, 3), keepdim=True).log()
    picture = picture * torch.exp(balance + 0.5 * exposure)
    picture = picture / (1 + (picture / 1.6) ** 2).sqrt()
    soft = F.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)
    picture = _lay(picture, uniform(-0.3, 1), soft).clamp(0, 1) ** (1 / 2.2)
    picture = 0.45 + normal(1.08, 0.12)[:, None] * (picture - 0.45) + normal(0, 0.03)[:, None]
    picture = _lay(picture, normal(-0.05, 0.15), picture.mean(1, keepdim=True))
    picture = picture + ((0.002 + 0.012 * uniform() ** 2) * next(fields))[:, None]
    return picture.clamp(0, 1) * 2 - 1


if __name__ == "__main__":
    from torchvision.utils import save_image
    images, _ = draw(60, torch.Generator().manual_seed(0))
    Path("runs").mkdir(exist_ok=True)
    save_image(F.interpolate((images + 1) / 2, scale_factor=3), "runs/faces.png", nrow=10)
    print(f"{len(images)} public portraits, drawn by code: runs/faces.png")
