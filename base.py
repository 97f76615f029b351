"""base.py -- the public base on disk: a network, the autoencoder of its latents, the names of its classes.

pretrain.py makes a base from public images; train.py freezes it and adapts it. A base is one file. The
fingerprint of its weights says on which base a private run was made.

  $ python base.py            # the bases that ship, and their classes
"""
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import autoencoder
import data
import unet
from machinery import checkpoint, folders, screen

NAMES = {data.ASSETS.resolve() / "base.pt": list(data.DIGITS)}           # the file itself stores no names


class Base(NamedTuple):
    """What the file of a base holds."""
    model: unet.UNet                             # predicts the noise; model.config["names"] are its classes
    coder: autoencoder.Autoencoder | None        # of the latents in which it works; None: it works in pixels
    sha256: str                                  # of all weights, see `fingerprint`


def save(path: Path, model: unet.UNet, weights: dict[str, Tensor] | None = None,
         coder: autoencoder.Autoencoder | None = None) -> None:
    """Write a UNet's shape and weights to `path`. A crash leaves the old file or the new one, whole.

    weights: written in place of the model's own, for example their running average
    coder:   the autoencoder in whose latents the UNet works. It goes into the same file, and the weights of
             both are then in half precision
    """
    if weights is None:
        weights = model.state_dict()
    extra = {}
    if coder is not None:
        weights = {name: p.half() for name, p in weights.items()}
        extra = dict(autoencoder=autoencoder.state(coder))
    checkpoint.save(Path(path), dict(config=model.config, model=weights, **extra), mode=0o644)


def load(path: Path | str) -> Base:
    """Read what `save` wrote. Only weights are read, and no code is unpickled.

    A relative path that does not exist is looked for beside the code, so that assets/base.pt is found from
    any directory.
    Errors: a missing, truncated or foreign file -> ValueError in one line
    """
    beside = Path(__file__).parent / path                                # `path` itself if it is absolute
    path = beside if not Path(path).exists() and beside.is_file() else path
    if not Path(path).is_file():
        raise ValueError(f"no base model at {path}; make one with `python pretrain.py`, or pass --base")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = unet.UNet(**saved["config"])
        model.config["names"] = model.config["names"] or NAMES.get(Path(path).resolve())
        model.load_state_dict(saved["model"])
        coder = autoencoder.from_state(saved["autoencoder"]) if "autoencoder" in saved else None
        if coder is not None:
            model.to(memory_format=torch.channels_last)                  # faster with 48 channels or more
    except Exception as e:
        raise ValueError(f"{path} is not a base model of this project ({screen.cause(e)}); "
                         f"expected a file written by `python pretrain.py`") from None
    return Base(model, coder, fingerprint(model, coder))


def fingerprint(model: unet.UNet, coder: autoencoder.Autoencoder | None) -> str:
    """SHA-256 of the weights of a base and of its autoencoder, scale included.

    It tells two files of one name apart.
    """
    parts = [model] if coder is None else [model, coder]
    return checkpoint.fingerprint(*(p for part in parts for p in part.state_dict().values()))


def fits(model, images: Tensor, labels: Tensor, name: str, coder=None) -> None:
    """Refuse images that the network (a unet.UNet), or the autoencoder before it, cannot take.

    name:   of the data set, for the message
    Errors: another number of channels, an unsuitable side, a label that the network lacks -> ValueError
    """
    channels, side, classes = model.config["image_channels"], images.shape[-1], model.classes
    divisor = model.patch * 2 ** (len(model.config["multipliers"]) - 1)  # each level halves the side
    accepted = [channels]
    if coder is not None:
        channels = coder.config["image_channels"]
        accepted = [channels, 1]                                         # a grey image is copied into each
        divisor = divisor * coder.f
        side = max(side, autoencoder.SIDE)                               # smaller images are enlarged
    if images.shape[1] not in accepted or side % divisor:
        raise ValueError(f"--data {name} has {images.shape[1]} channels and side {images.shape[-1]}; "
                         f"expected {channels} channels and a side that {divisor} divides; choose another "
                         f"--base")
    if classes is not None and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"--data {name} has labels from {int(labels.min())} to {int(labels.max())}; "
                         f"expected 0 to {classes - 1}; choose another --base")


if __name__ == "__main__":
    for path in sorted(data.ASSETS.glob("*.pt")):
        model, coder, sha256 = load(path)
        where = "pixels" if coder is None else f"latents of {coder.f} x {coder.f} pixels each"
        print(f"{path.name:<20} {sum(p.numel() for p in model.parameters()):>9,} weights, works in {where}; "
              f"SHA-256 {sha256[:12]}...")
        print(f"{'':<20} {model.classes} classes: {folders.few(model.config['names'])}")
