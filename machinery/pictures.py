"""pictures.py -- read one picture file as a viewer shows it, in 8 bits, or refuse it by name.

The picture is turned as its EXIF says, 16 bits are scaled to 8, and transparency is laid on white. Which
level of 16 bits is white is a public constant that the curator (the person who holds the images) declares. If
it were measured on private images, a single one could darken all others.

  $ python -m machinery.pictures FILE ...    # the size of each, and the brightest level if white is unknown
"""
import sys
import warnings
from pathlib import Path

import numpy as np
from torch import Tensor

from machinery import screen

WHITE = 65_535               # grey level of white in 16 bits, unless another one is declared
MOST = 10                    # reading stops after this many refused pictures


class Refused(ValueError):
    """A picture that is not what was asked for: which one, why, and what to do."""

    def __init__(self, file: Path, why: str, cure: str = "remove or replace it"):
        super().__init__(f"{file} {why}; {cure}")
        self.file, self.why, self.cure = file, why, cure


def all_refused(refused: list[Refused]) -> ValueError:
    """One error that names them all."""
    if len(refused) == 1:
        return refused[0]
    more = ", and no further one was read" if len(refused) == MOST else ""
    which = [f"{e.file} {e.why}" for e in refused]
    cures = sorted({e.cure.replace(" it", " them") for e in refused})
    return ValueError(f"{len(refused)} pictures are refused{more}: " + "; ".join(which + cures))


def picture(file: Path, size: int, channels: int = 3, white: int = WHITE) -> Tensor:
    """One picture as uint8 (channels, size, size): its shorter side is resized and its centre cropped.

    Errors: an unreadable file, an animation, a depth whose white is unknown, or colours where grey is
            expected -> ValueError that names the file
    """
    return fit(read(file, channels, white)[0], size)


def fit(image, size: int) -> Tensor:
    """A Pillow image as uint8 (channels, size, size): its shorter side is resized and its centre cropped."""
    from torchvision.transforms import functional
    return functional.pil_to_tensor(functional.center_crop(functional.resize(image, size), [size, size]))


def read(file: Path, channels: int, white: int) -> tuple:
    """(a Pillow image of mode L or RGB, its brightest level or None).

    The level is returned for a grey picture of 16 bits whose format does not say which level is white.

    Errors: as `picture`, each a `Refused`
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(file) as opened:
            packed, frames = packing(opened), pictures_in(opened)
            if frames > 1:
                raise ValueError(f"an animation or a stack, {frames} frames, expected one")
            image = ImageOps.exif_transpose(opened)
            image.load()
        level = None
        if image.mode.startswith("I;16") or image.mode == "I":           # grey of 16 bits
            deep = np.asarray(image).astype(np.int64)
            if deep.min() < 0 or deep.max() > WHITE:
                raise ValueError(f"grey levels outside 0 to {WHITE}")
            kinds = {"I;12": 4_095, "PPM": WHITE}    # the level of white, where packing or format defines it
            own = kinds.get(packed) or kinds.get(opened.format)
            level = int(deep.max()) if own is None else None
            image = Image.fromarray(eight_bits(deep, own or white))
        elif ";16" in packed and white != WHITE:
            raise ValueError(f"colour of 16 bits, of which only the upper 8 can be read here, too few for "
                             f"--white {white}; save it with 8 bits")
        elif ";16" in packed and 4 * int(np.asarray(image.convert("RGB")).max()) <= 255:
            warnings.warn("colour of 16 bits, at most a quarter of their range is used, so it will be dark; "
                          "if its device writes 12 or 14 bits, save it with 8")
        elif image.mode == "F":
            raise ValueError("floating-point grey levels, whose white is unknown; save it with 8 or 16 bits")
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        colour = np.asarray(image.convert("RGB")).astype(np.int16)
        if channels == 1 and np.ptp(colour, axis=2).max() > 16:  # grey levels; a JPEG's differ slightly
            raise Refused(file, "is in colour, 3 channels; expected grey, 1 channel, as the base has",
                          "use a base for colour")
        return image.convert("L" if channels == 1 else "RGB"), level
    except Refused:
        raise
    except Exception as e:
        raise Refused(file, f"is not a readable image ({screen.cause(e)})") from None


def packing(opened) -> str:
    """How a file packs its pixels, in Pillow's words, such as "RGB;16B"; "" if it does not say."""
    args = opened.tile[0][3] if getattr(opened, "tile", None) else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def pictures_in(opened) -> int:
    """How many pictures a file holds.

    What belongs to the first one does not count: the preview or the gain map that a phone appends to a .jpg,
    the layers of a .psd, and the smaller copies in a slide scanner's .tif.
    """
    frames = getattr(opened, "n_frames", 1)
    if opened.format in ("MPO", "PSD"):
        return 1
    if opened.format != "TIFF" or frames == 1:
        return frames
    found = 1
    for number in range(1, frames):
        opened.seek(number)
        if not int(opened.tag_v2.get(254, 0)) & 1:                       # NewSubfileType: a smaller copy
            found += 1
    opened.seek(0)
    return found


def eight_bits(deep: np.ndarray, white: int) -> np.ndarray:
    """Grey levels 0 .. white -> 0 .. 255, rounded; brighter ones are white."""
    return ((deep.astype(np.int64) * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    with screen.one_line("pictures.py", "close other programs"):
        for file in map(Path, sys.argv[1:]):
            image, level = read(file, 3, WHITE)
            depth = "" if level is None else f", 16 bits, the brightest level is {level:,} of {WHITE:,}"
            print(f"{file}: {image.width} x {image.height} pixels{depth}")
