"""clothes.py -- public garments drawn by code: ten classes with labels, in Fashion-MNIST's documented frame.

A public base for Fashion-MNIST learns from these drawings, as one for MNIST learns from those of glyphs.py.
They contain no photograph, and nothing was fitted to any image: every outline below was written down by hand
from general knowledge of clothes.

  $ python -m drawings.clothes       # draws a sheet to runs/clothes.png, one class per row
"""
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# -----------------------------------------------------------------------------
# 1. patterns: a garment is one choice from each of several lists, and a choice is a list of parts,
# "kind x,y x,y ... ; kind ..."
#
# Units are pixels; y goes down from the top, x to the right from the middle line. The kinds are:
#   b  body       s  sleeve     a  accent (collar, sole)     p  panel on the body (pocket, belt, heel cap)
#   h  hole
#   r  ribbon, about 2 pixels wide (strap, handle)           l  line on the cloth (seam, button, lace)
# A small letter is the right half, which is mirrored. A capital letter is drawn as it stands (shoes have the
# toe to the left).

TEE = ["b 0,1 4,0 8,2 8,9 8,27 0,27", "b 0,1 3,0 7,2 6,9 6,15 7,26 0,27", "b 0,1 4,0 9,2 9,9 10,25 0,26",
        "b 0,1 3,0 7,1 7,9 7,27 0,27", "b 0,1 4,0 8,2 7,9 9,20 0,20", "b 0,1 3,0 7,2 6,8 8,26 0,28"]
SHORT = ["s 5,1 8,2 13,9 10,11 6,7", "s 5,1 8,1 14,6 12,10 6,7", "s 5,1 8,2 11,7 8,9 6,7",
         "s 5,1 9,2 13,12 9,13 6,8",
        "s 5,1 8,1 14,4 13,9 7,9"]
LONG = ["s 5,1 8,2 10,5 11,15 12,27 9,27 8,16 6,8", "s 5,1 8,2 10,6 12,26 9,27 8,16 6,9",
        "s 5,1 9,2 11,8 12,18 11,28 8,28 8,17 6,9", "s 5,1 8,2 11,8 14,24 11,25 9,15 6,9",
        "s 5,1 9,2 11,10 12,26 8,26 7,15 6,9", "s 5,1 8,2 10,8 10,28 7,28 7,10"]
BARE = ["", "h 9,-1 9,6 7,9 6,6 6,-1", "h 10,-1 10,7 7,8 6,4 5,-1"]
ROUND = ["h 0,-2 3,-2 3,1 2,3 0,4 ; l 4,0 3,3 1,5 0,5", "h 0,-2 4,-2 4,0 3,2 0,3",
        "h 0,-2 4,-2 4,0 3,4 0,6 ; l 5,1 4,4 1,7 0,7", "a 0,1 3,0 3,2 0,3 ; l 3,2 1,4 0,4",
        "h 0,-2 5,-2 5,1 0,2"]
VEE = ["h 0,-2 3,-2 3,0 0,7", "h 0,-2 3,-2 3,0 0,5 ; l 4,1 0,7", "a 0,1 2,0 0,6 ; l 3,1 0,7"]
HIGH = ["a 0,-2 3,-2 4,1 2,2 0,2", "a 0,-1 3,-1 3,1 0,2",
        "a 0,-2 4,-2 5,2 3,4 0,5 ; l 3,-1 0,3 ; L 1,5 1,9 ; L -1,5 -1,9"]
COLLAR = ["h 0,-2 2,-2 2,0 0,3 ; a 2,-1 4,0 4,3 2,5 0,3", "a 0,-1 3,-1 4,2 2,4 0,2 ; l 3,0 0,3",
        "h 0,-2 3,-2 3,0 0,6 ; a 2,-1 4,0 4,4 0,7"]
LAPEL = ["h 0,-2 2,-2 0,5 ; a 2,-1 4,0 5,6 0,12 ; l 2,0 0,9", "a 0,-2 4,-2 5,3 0,4 ; l 3,0 0,3",
        "a 2,-1 4,0 6,7 0,14 ; l 2,0 0,12", "h 0,-2 3,-2 2,2 0,3", "a 0,-2 5,-2 6,3 3,6 0,6 ; l 4,0 1,3 0,5"]
BUTTONS = ";".join(f"L 0,{y} 0,{y}.4" for y in range(6, 27, 3))
POCKET = "P 2,9 6,9 6,13 2,13"
FRONT = ["", "", "", POCKET, "l 0,22 7,22", "l 0,9 8,9", "p 0,12 8,12 8,16 0,16", "P -4,8 4,8 4,15 -4,15",
         "l 0,25 8,25",
        "p 0,24 9,24 9,30 0,30"]
KNIT = ["", "", "l 0,25 8,25 ; l 11,25 14,25", "p 0,25 9,25 9,29 0,29", "l 5,2 7,9",
        "p 0,10 14,10 14,14 0,14", "l 0,6 8,6",
        "l 3,6 3,26", "l 2,19 5,23 ; l 0,19 2,19"]
PLACKET = [BUTTONS, "L 0,4 0,27", "L 1,4 1,27 ; L -1,4 -1,27", f"L 0.5,4 0.5,27 ; {BUTTONS}",
           f"{BUTTONS} ; {POCKET}",
        f"{BUTTONS} ; p 2,8 6,8 6,12 2,12", "L 0,4 0,12", f"L 1,4 1,27 ; {BUTTONS} ; l 2,8 6,8", "",
        "P -1,3 1,3 1,27 -1,27"]
OPENING = ["h 0,9 0.4,14 0.7,28 0,28", "L 0,4 0,28", "L 0,5 0,28 ; l 4,17 7,18", "L 1,4 1,28 ; L -1,4 -1,28",
        "h 0,5 0.6,14 1.4,28 0,28", "L 0,4 0,28 ; p 0,15 8,15 8,17 0,17",
        "l 3,10 3,10.5 ; l 3,14 3,14.5 ; l 3,18 3,18.5 ; L 0,6 0,28",
        "L 0,3 0,28 ; l 0,8 7,8 ; l 0,13 7,13 ; l 0,18 7,18 ; l 0,23 7,23",
        "p 0,4 2,6 2,28 0,28 ; L 0,6 0,28",
        "L 0,4 0,28 ; p 4,17 7,17 7,21 4,21"]
COAT = ["b 0,1 4,0 8,2 7,9 8,28 0,28", "b 0,1 4,0 8,2 7,9 7,14 9,28 0,28", "b 0,1 4,0 9,2 8,9 9,27 0,27",
        "b 0,1 3,0 7,2 6,9 6,14 8,30 0,30", "b 0,1 4,0 8,2 7,9 7,24 0,24"]
DRESS = ["b 0,1 2,0 4,1 4,5 3,10 4,16 6,28 0,28", "b 0,1 2,0 4,1 4,6 3,10 8,27 0,28",
         "b 0,2 3,1 4,5 4,10 5,16 4,28 0,28",
        "b 0,1 2,0 4,1 4,12 4,20 5,28 0,28", "b 0,1 3,0 5,1 4,6 4,10 7,18 9,27 0,28",
        "b 0,3 3,2 4,6 3,11 5,17 5,28 0,28",
        "b 0,1 2,0 4,1 4,7 5,15 7,28 0,28", "b 0,1 2,0 4,1 3,8 3,14 4,28 0,28"]
DRESS_ARMS = ["", "", "", "", "s 3,1 4,1 7,5 5,7 4,5", "s 3,1 4,1 8,4 6,7 4,5", "s 3,1 4,1 6,7 7,14 5,15 4,8",
        "s 3,1 4,1 6,8 8,16 6,17 4,9"]
DRESS_NECK = ["h 0,-2 2,-2 2,1 0,3", "h 0,-2 2,-2 2,0 0,6", "h 0,-2 6,-2 5,3 0,4 ; r 3,0 3,4", "",
        "h 0,-2 3,-2 2,2 0,3 ; h 5,-2 5,4 4,4 3,-2", "h 0,-2 6,-2 5,3 2,4 0,5 ; r 1,0 3,5",
        "h 0,-2 6,-2 5,2 0,2"]
DRESS_FRONT = ["", "", "l 0,10 4,10", "p 0,9 4,9 4,11 0,11", "l 1,11 3,27 ; l 0,10 4,10", "L 0,3 0,28",
               "p 0,11 3,11 8,28 0,28",
        "p 0,24 9,24 9,29 0,29", "l 0,16 5,16 ; l 0,22 7,22", "P 0,0 5,0 9,29 0,29",
        "p 3,3 5,3 9,28 4,28 2,11"]
LEGS = ["b 0,0 5,0 6,7 6,28 2,28 0.5,9 0,8", "b 0,0 4,0 5,6 5,28 2,28 1,9 0,8",
        "b 0,0 4,0 6,6 4,28 1,28 0.3,10 0,8",
        "b 0,0 5,0 6,8 8,28 3,28 1,10 0,9", "b 0,0 4,0 5,6 4,16 6,28 3,28 0.7,9 0,8",
        "b 0,0 5,0 6,6 4,28 2,28 0.2,18 0,9",
        "b 0,0 5,0 7,8 7,28 1,28 0.3,11 0,10", "b 0,0 4,0 5,8 5,28 0.4,28 0.2,12 0,10"]
WAIST = ["l 0,2 5,2", "p 0,0 6,0 6,2 0,2", "l 0,2 5,2 ; L 0,2 0,7 ; l 3,2 5,5", "L 0,1 0,8", "",
         "l 0,2 5,2 ; l 3,2 5,5"]
CREASE = ["", "", "l 3,8 3,27", "l 3,16 5,16", "p 5,2 7,8 8,28 5,28", "l 2,14 5,15 ; l 2,19 5,18",
          "p 1,26 8,26 8,29 1,29",
        "p 1,14 7,14 7,20 1,20"]
SANDAL = ["A 0,10 8,10 20,9 28,8 28,11 20,12 8,13 0,13 ; R 3,10 6,5 11,10 ; R 19,9 21,3 27,3 27,8",
        "A 0,10 8,10 20,8 28,7 28,11 8,13 0,13 ; R 2,10 6,5 10,10 ; R 9,10 12,4 16,9 ; R 16,9 21,2 27,2 27,7",
        "A 0,14 8,13 20,8 28,5 28,16 0,16 ; R 2,13 5,8 11,12 ; R 18,8 21,0 27,0 27,5",
        "A 0,9 28,8 28,12 0,12 ; B 3,9 6,4 11,2 14,4 15,9",
        "R 0,17 6,17 14,13 22,7 27,6 ; R 26,7 27,18 ; R 2,16 4,12 9,15 ; R 21,7 20,1 26,0 27,6",
        "A 0,12 28,11 28,15 0,15 ; R 3,12 10,4 12,4 14,12 ; R 5,5 11,8",
        "R 0,19 6,19 14,14 22,8 27,7 ; R 25,8 25,20 ; B 1,18 4,13 9,13 11,16 6,18 ; R 21,8 21,3 25,2 26,7",
        "A 0,14 10,14 28,12 28,16 0,16 ; R 3,14 6,8 11,13 ; R 10,13 14,6 18,12 ; R 14,7 21,5 ; "
        "R 18,12 21,1 27,1 27,12",
        "A 0,18 28,17 28,20 0,20 ; R 2,18 7,12 10,18 ; R 7,12 20,3 ; R 18,2 27,2 ; R 19,7 27,7 ; "
        "R 27,2 27,17 ; R 13,18 19,7",
        "A 0,15 9,13 18,9 28,7 28,17 18,17 15,14 8,17 0,17 ; R 2,14 6,8 12,11 ; R 4,8 9,13 ; "
        "R 22,8 20,1 27,1 27,7",
        "R 0,21 6,21 15,15 22,8 27,7 ; R 26,8 26,22 ; R 1,20 5,15 10,18 ; R 5,15 20,3 ; "
        "R 22,8 20,2 26,1 27,7 ; R 18,10 20,2",
        "A 0,12 8,11 22,10 28,10 28,13 0,14 ; B 1,11 4,7 9,6 10,11 ; R 10,7 18,4 ; "
        "B 16,10 19,3 27,2 28,10 24,10 23,5 20,6"]
SNEAKER = ["B 0,9 2,7 8,4 13,1 16,1 18,3 23,3 27,1 28,4 28,10 0,11",
           "B 0,9 3,6 9,5 14,2 20,3 27,2 28,9 28,11 0,11",
        "B 0,10 2,7 9,5 14,0 17,0 19,2 24,2 27,0 28,5 28,11 0,11", "B 0,8 5,5 12,3 16,3 26,3 28,5 28,9 0,10",
        "B 0,10 3,7 9,4 12,0 17,0 26,0 27,4 28,11 0,11", "B 0,9 4,5 10,3 13,1 17,3 22,3 27,1 27,7 28,9 0,10",
        "B 0,8 1,6 4,5 8,5 13,2 16,1 19,3 25,2 28,3 28,10 0,11",
        "B 0,7 2,5 9,5 14,2 19,2 27,1 28,6 28,10 0,10"]
SOLE = ["A 0,9 8,10 28,9 28,12 27,13 1,13 0,12", "A 0,10 10,10 28,10 28,11 1,12",
        "A 0,9 2,10 20,10 28,8 28,13 18,12 12,13 2,12", "A -1,8 0,10 29,9 29,13 0,13",
        "A 0,9 28,9 28,13 18,13 16,12 12,12 10,13 1,13"]
LACES = ["L 8,5 10,7 ; L 10,4 12,6 ; L 12,3 14,5", "L 7,5 17,9 ; L 9,6 11,4 ; L 11,7 13,3 ; L 13,8 15,3",
         "R 13,3 16,0", "",
        "L 8,5 16,10", "L 9,4 14,8 ; L 11,3 16,7"]
PANEL = ["P 22,2 28,1 28,10 20,10", "P -1,5 6,4 8,11 -1,11", "P 13,9 17,5 20,5 16,9",
         "L 14,9 17,4 ; L 16,9 19,4 ; L 18,9 21,4",
        "P 10,8 16,8 26,3 17,9 12,10", "", "L 7,5 8,10 ; L 20,3 21,10",
        "P -1,6 6,4 9,11 -1,11 ; P 23,1 29,1 29,11 22,11",
        "P 8,5 13,1 17,3 18,11 10,11", "L 0,8 28,7"]
BAG = ["b 0,10 12,10 14,28 0,28", "b 0,9 14,9 14,27 0,27", "b 0,9 12,9 14,14 13,27 11,29 0,29",
        "b 0,9 11,9 13,13 14,24 12,28 0,28", "b 0,10 10,10 11,30 0,30", "b 0,10 14,10 12,24 0,25",
        "b 0,8 8,9 13,14 14,22 11,26 0,27", "b 0,9 14,10 14,20 0,21"]
HANDLE = ["r 0,0 4,1 6,5 6,11", "r 0,1 5,1 7,4 8,11", "r 0,4 4,5 5,10", "R -11,10 -7,1 0,-3 7,1 11,10",
          "r 0,-2 3,0 5,6 6,18",
        "", "", "R -10,10 -3,2 10,10", "r 6,10 6,6 0,6", "r 0,-4 6,-2 9,4 11,11 ; r 11,10 12,15"]
FLAP = ["p 0,10 13,10 13,16 11,18 0,19", "l 0,13 14,13", "p 0,9 14,9 14,18 0,18", "l 6,10 6,28",
        "P -1,17 1,17 1,20 -1,20 ; l 0,18 13,17", "P -7,18 7,18 7,25 -7,25", "", "l 0,12 13,12 ; L 0,12 0,15",
        "p 10,8 15,8 15,30 11,30", "p 0,9 14,9 0,20", "p 4,9 6,9 6,28 4,28", "p 0,23 14,23 14,30 0,30"]
BOOT = ["B 0,22 3,18 9,16 13,11 14,0 26,0 27,12 28,24 0,24",
        "B 0,22 3,19 10,17 14,13 15,2 25,1 26,14 28,24 0,24",
        "B 0,21 2,17 8,15 11,8 11,0 26,0 27,12 28,24 0,24",
        "B 0,23 4,20 11,18 15,14 16,7 26,6 27,15 28,24 0,24",
        "B 0,22 4,18 10,15 13,10 12,1 19,3 27,0 27,12 28,24 0,24",
        "B 0,22 2,18 9,17 15,15 14,5 26,4 26,15 27,24 0,24",
        "B 0,23 5,20 12,16 15,10 15,-3 26,-3 27,12 27,24 0,24"]
HEEL = ["A 0,22 28,22 28,25 0,25", "A 0,23 28,23 28,27 21,27 20,25 0,25",
        "H 7,25 14,24 22,21 22,29 7,29 ; A 22,20 28,20 27,28 23,28 ; A 0,23 8,24 8,25 0,25",
        "A 0,23 18,23 28,22 28,28 20,28 19,25 0,25",
        "H 6,25 15,23 24,20 24,29 6,29 ; A 24,19 28,19 27,29 25,29",
        "A 0,21 28,21 28,26 0,26", "H 9,25 12,22 19,21 19,29 9,29 ; A 19,19 28,20 28,29 20,29"]
SHAFT = ["L 13,12 20,13 27,12", "P 17,2 21,2 21,14 18,14",
        "L 9,16 14,17 ; L 11,14 16,15 ; L 12,11 17,12 ; L 13,8 17,9 ; L 13,5 17,6",
        "P 13,-1 27,-1 27,4 13,4", "L 20,0 20,20",
        "", "L 8,16 14,23", "R 12,13 20,14 27,12", "P -1,16 8,15 10,24 -1,24",
        "L 9,16 17,17 17,2 ; L 12,11 16,11 ; L 13,7 17,7", "P 20,12 28,12 29,24 19,24"]

CHOICES = [[TEE, SHORT * 3 + BARE, ROUND * 2 + VEE, FRONT],
           [LEGS, WAIST, CREASE],
           [TEE, LONG, ROUND + VEE + HIGH, KNIT],
           [DRESS, DRESS_ARMS, DRESS_NECK, DRESS_FRONT],
           [COAT, LONG, LAPEL, OPENING],
           [SANDAL],
           [TEE, LONG * 2 + SHORT + BARE, COLLAR * 3 + ROUND, PLACKET],
           [SNEAKER, SOLE, LACES, PANEL],
           [BAG, HANDLE, FLAP],
           [BOOT, HEEL, SHAFT]]
SHOES, SLEEVED = (5, 7, 9), (2, 4, 6)       # labels; hanging sleeves make the SLEEVED narrower
NAMES = ("T-shirt-top", "trouser", "pullover", "dress", "coat",
         "sandal", "shirt", "sneaker", "bag", "ankle boot")     # of the classes, in the order of their labels
PRINTED = (1, 0.4, 0.8, 0.8, 0.4, 0.3, 1, 0.3, 0.5, 0.3)   # the probability that a print is kept, by class
PER_CLASS = 120              # patterns drawn per class
FIELD, SPAN = 60, 30         # a pattern is FIELD x FIELD over SPAN x SPAN pixels
PIECE = 250                              # images drawn at a time
_AXIS = (np.arange(FIELD, dtype=np.float32) + 0.5) * SPAN / FIELD - SPAN / 2


def _polygon(p: np.ndarray) -> np.ndarray:
    """How much of each cell lies inside the closed polygon p (E, 2), by winding number: (FIELD, FIELD)."""
    (x0, y0), (x1, y1) = p.T[:, :, None], np.roll(p, -1, 0).T[:, :, None]
    turn = (y0 <= _AXIS).astype(np.float32) - (y1 <= _AXIS)  # (E, rows): +1 down, -1 up
    e, row = np.nonzero(turn)
    x = x0[e, 0] + (_AXIS[row] - y0[e, 0]) * (x1 - x0)[e, 0] / (y1 - y0)[e, 0]  # where it crosses the row
    right = turn[e, row, None] * np.clip((_AXIS - x[:, None]) * FIELD / SPAN + 0.5, 0, 1)
    out = np.zeros((FIELD, FIELD), np.float32)
    np.add.at(out, row, right)  # summed over the row's crossings
    return np.abs(out).clip(0, 1)


def _ribbon(p: np.ndarray, width: float) -> np.ndarray:
    """The same for a line along the points p, `width` pixels wide."""
    (x, y), (dx, dy) = p[:-1].T, np.diff(p, axis=0).T
    x, y = _AXIS[:, None] - x, _AXIS[:, None, None] - y  # (FIELD, E), (FIELD, 1, E)
    along = ((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-9)).clip(0, 1)         # (FIELD, FIELD, E)
    distance = np.sqrt(((x - along * dx) ** 2 + (y - along * dy) ** 2).min(-1))
    return ((width / 2 - distance) * FIELD / SPAN + 0.5).clip(0, 1)


def _draw(text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The maps of a pattern, and half its width and height.

    Shapes: (4, FIELD, FIELD), which are the whole, the second piece, the accent and the lines; (2,)
    """
    jitter, swing, taper = rng.uniform(0.05, 0.5), rng.normal(0, 0.1), rng.normal(0, 0.15)
    turn, parts = np.array([[np.cos(swing), -np.sin(swing)], [np.sin(swing), np.cos(swing)]]), []
    for part in filter(str.strip, text.split(";")):
        kind, *points = part.split()
        p = np.array([[float(v) for v in xy.split(",")] for xy in points], np.float32)
        p = p + rng.normal(0, jitter if kind not in "rlRL" else jitter / 2, p.shape) * (p[:, :1] != 0)
        if kind == "s":
            p = (p - p[0]) @ turn + p[0]  # a sleeve swings about the shoulder
        if kind.islower():
            p[:, 0] *= 1 + taper * (p[:, 1] / 28 - 0.5)
        parts += [(kind.lower(), p)] + ([(kind, p * [-1, 1])] if kind.islower() else [])
    ink = np.concatenate([p for kind, p in parts if kind in "bsar"])
    low, high = ink.min(0), ink.max(0)
    scale = 28 / (high - low).max()
    maps, strap, pen = np.zeros((4, FIELD, FIELD), np.float32), rng.uniform(1.2, 3.4), rng.uniform(0.6, 1.2)
    for kind, p in parts:
        p = ((p - (low + high) / 2) * scale).astype(np.float32)
        shape = _polygon(p) if kind in "bsaph" else _ribbon(p, strap if kind == "r" else pen)
        if kind == "h":
            maps *= 1 - shape
        elif kind == "l":
            maps[3] = np.maximum(maps[3], shape)
        else:
            layer = {"b": 0, "s": 1, "a": 2, "r": 2, "p": 2}[kind]
            shape = shape * maps[0] if kind == "p" else shape
            maps[[0, layer]] = np.minimum(maps[[0, layer]] + shape, 1)
    return maps, (high - low) / 2 * scale


@functools.cache
def _patterns() -> tuple[Tensor, Tensor]:
    """The patterns of all classes, from one seed, and half their sizes.

    Shapes: (10, PER_CLASS, 4, FIELD, FIELD), (10, PER_CLASS, 2)
    """
    rng = np.random.default_rng(0)
    drawn = [_draw(";".join(str(rng.choice(slot)) for slot in slots), rng)
             for slots in CHOICES for _ in range(PER_CLASS)]
    maps, halves = (torch.tensor(np.stack(a), dtype=torch.float32) for a in zip(*drawn))
    return maps.view(10, PER_CLASS, 4, FIELD, FIELD), halves.view(10, PER_CLASS, 2)


# -----------------------------------------------------------------------------
# 2. pictures: a pattern is bent and cut from a random cloth

@functools.cache
def _linear(k: int) -> Tensor:
    """(28, k): linear interpolation from k values to 28."""
    return F.interpolate(torch.eye(k)[None], size=28, mode="linear")[0].T


def draw(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n public garments, centred on a black background; the longer side has about 28 pixels.

    Shoes have the toe to the left.
    Each image: a random class and pattern -> scale, shear, turn -> smooth bend -> a cloth of random
    brightness, folds and print -> seams and rim.
    Shapes:  images (n, 1, 28, 28) float32 in [-1, 1] (-1: background), labels (n,) int64, an index into
             NAMES
    Errors:  n < 1 -> ValueError
    Source:  the frame and the order of the classes, Xiao, Rasul and Vollgraf 2017, section 2
    Example: draw(2, torch.Generator().manual_seed(0))[0].shape -> (2, 1, 28, 28)
    """
    if n < 1:
        raise ValueError(f"draw: n = {n}, expected at least 1 image")
    if n > PIECE:  # faster: the maps of one piece fit in the cache
        images, labels = zip(*(draw(min(PIECE, n - i), generator) for i in range(0, n, PIECE)))
        return torch.cat(images), torch.cat(labels)
    patterns, halves = _patterns()
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=generator)
    each = lambda low, high: uniform(low, high, 1, 1)                    # (n, 1, 1): one number per image
    some = lambda p: (torch.rand(n, 1, 1, generator=generator) < p).float()

    def smooth(a: int, b: int) -> Tensor:                                # (n, 28, 28)
        return _linear(a) @ torch.randn(n, a, b, generator=generator) @ _linear(b).mT
    labels = torch.randint(10, (n,), generator=generator)
    way = torch.randint(PER_CLASS, (n,), generator=generator)
    shoe, sleeved = torch.isin(labels, torch.tensor(SHOES)), torch.isin(labels, torch.tensor(SLEEVED))

    # where on the pattern each pixel comes from: the inverse of fit . turn . shear . scale, and a smooth bend
    stretch = torch.stack([uniform(0.82, 1.15) * (1 - 0.08 * sleeved), uniform(0.88, 1.1)], -1)
    fit = uniform(26.5, 28.5) / (2 * (halves[labels, way] * stretch).amax(1))
    flip = torch.where(shoe | (uniform(0, 1) < 0.5), 1.0, -1.0)
    turn, slant = uniform(-0.06, 0.06), uniform(-0.06, 0.06)
    M = torch.stack([flip, slant - turn, turn, torch.ones(n)], -1).view(n, 2, 2)
    M = M / (stretch * fit[:, None])[:, :, None]
    axis = torch.arange(28.0) - 13.5
    pixel = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, 784, 2)
    bend = torch.stack([smooth(4, 4), smooth(4, 4)], -1).view(n, 784, 2) * uniform(0, 0.9, 1, 1)
    source = ((pixel + bend) @ M.mT).view(n, 28, 28, 2)                  # pixels of the pattern
    maps = F.grid_sample(patterns[labels, way], source / (SPAN / 2), align_corners=False)
    whole, piece, accent, line = maps.unbind(1)                          # each (n, 28, 28) in [0, 1]

    # the cloth: brightness of each piece, print, folds
    base = 0.1 + 0.9 * each(0, 1) ** 0.7                                 # more light cloth than dark
    cloth = base + piece * (each(0.1, 1) - base) * some(0.25) + piece * each(-0.12, 0.12)
    cloth = cloth + accent * ((each(0.1, 1) - cloth) * some(0.5) + each(-0.15, 0.15))
    x, y = source.unbind(-1)
    wave = lambda t: (torch.sin(t * each(0.5, 2.5) + each(0, 6.3)) * each(0.8, 4)).clamp(-1, 1)
    blot = (smooth(14, 14) * 2).clamp(-1, 1)
    chest = (2 - ((x / each(2, 5)) ** 2 + ((y + each(0, 5)) / each(2, 5)) ** 2)).clamp(0, 1)
    printed = torch.tensor(PRINTED)[labels].view(n, 1, 1)
    across, down, spots, logo = (some(p) * each(-0.35, 0.35) * some(printed) for p in (0.18, 0.12, 0.15, 0.2))
    cloth = cloth + across * wave(y) + down * wave(x) + (spots + 2 * logo * chest) * blot
    folds = (smooth(4, 4) * each(0, 0.1) + smooth(3, 9) * each(0, 0.08)
             + each(-0.12, 0.12) * y / 14 + each(-0.08, 0.08) * x / 14)
    grain = torch.randn(n, 28, 28, generator=generator) * each(0, 0.27) ** 2
    sewn = piece * (1 - piece) * each(-1.5, 0.5) + accent * (1 - accent) * each(-1, 0.5)    # where two meet
    rim = 1 - F.avg_pool2d(whole[:, None], 5, 1, 2)[:, 0]  # 0 deep inside, about 1/2 at the outline
    cloth = cloth * (1 + folds * 1.5 + grain + rim * each(-0.7, 0.4)) + sewn + line * each(-0.5, 0.35)
    ink = (whole * each(1, 1.6)).clamp(0, 1) * cloth.clamp(0.06, 1)
    return (ink * 2 - 1)[:, None], labels


if __name__ == "__main__":
    from torchvision.utils import save_image
    images, labels = draw(2_000, torch.Generator().manual_seed(0))
    order = torch.cat([(labels == c).nonzero()[:20, 0] for c in range(10)])
    Path("runs").mkdir(exist_ok=True)
    save_image((images[order] + 1) / 2, "runs/clothes.png", nrow=20)
    print("200 public garments, drawn by code: runs/clothes.png")
