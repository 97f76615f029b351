"""runs.py -- what a private run is made of, and the folder that a finished one leaves.

A run is made once from its settings, before the first private image is read, and handed on; a finished one is
opened from its folder. Everything in the folder is covered by the run's (epsilon, delta) and may be
published, so nothing in it names a place on the machine where it was made.

  $ python -m support.runs            # what the shipped runs are made of
"""
import dataclasses
import json
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import autoencoder
import base
import data
import lora
import unet
from machinery import checkpoint, devices, draws, folders, screen
from support import classes

# settings that stay with the curator: how a run went may tell how large its lots were; places are nobody's
CURATORS = ("chunk", "device", "resume", "peek", "out", "data_dir")


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of one run. Everything here is public but the trained weights inside `model`."""
    settings: Any                                # train.Settings; of a finished run, its config.json
    model: unet.UNet                             # the public base with the adapter
    coder: autoencoder.Autoencoder | None        # it works in this autoencoder's latents; None: in pixels
    base_sha256: str                             # fingerprint of the public base
    classes: list[str] | None                    # the declared names of the private classes; None: none
    labels: list[int] | None                     # which of the network's classes each of them is
    adapted: int = 0                             # layers with an adapter, or trained tensors of a baseline
    shape: tuple[int, int, int] | None = None    # (C, H, W) of an image


def begin(settings, device: torch.device) -> Run:
    """The run that train.Settings describe: a public base, frozen, with an adapter that changes nothing yet.

    Errors: no such base, classes that do not fit it, an adapter that matches no layer -> ValueError
    """
    s = settings
    model, coder, sha256 = base.load(s.base)
    declared = classes.declared_classes(s.data, s.classes, model, own=coder is not None)
    if coder is not None and model.classes is not None:
        lora.new_classes(model, declared["classes"], s.start)
    adapted = lora.attach(model, adapter(s, model))
    s = dataclasses.replace(s, precision=devices.precision(device, model, s.precision))      # no longer auto
    return Run(s, model, coder, sha256, declared.get("classes"), declared.get("labels"), adapted)


def adapter(s, model: unet.UNet) -> dict:
    """adapter_config.json of a run with these settings; lora_alpha = rank, so that the update is B A."""
    return lora.describe(s.train, s.rank, s.rank, model.classes is not None)


def private_images(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """The private images, their labels numbered as the network's classes, and each image's own number.

    Shapes: uint8 (N, C, H, W), int64 (N,), int64 (N,); the last is made of one image's bytes (draws.names)
    """
    s = run.settings
    channels = (run.coder or run.model).config["image_channels"]
    images, labels = data.load(s.data, "train", s.data_dir or None, s.size, run.classes, channels, s.white)
    if not s.N / 2 <= len(images) <= 2 * s.N:
        folders.note(f"{screen.count(len(images), 'image')} found, and --N declares {s.N:,}")
    images, labels = classes.in_places(images, labels, run.labels, run.classes)
    base.fits(run.model, images, labels, s.data, run.coder)
    return images, labels, draws.names(images)


class Share(NamedTuple):
    """One rank's part of the private images: every `ranks`-th, from number `rank` on."""
    images: Tensor                               # uint8 (n, C, H, W), or float latents (n, c, h, w)
    labels: Tensor                               # int64 (n,), numbered as the network's classes
    names: Tensor                                # int64 (n,), each image's own number, see draws.names
    total: int                                   # images of all ranks together; private
    fingerprint: str                             # of all images and labels; private


def private_share(run: Run, rank: int, ranks: int, device: torch.device) -> tuple[Run, Share]:
    """The run, whose images' shape is known now, and this rank's private images, on its device.

    In a run on latents each image is encoded here, once: E reads one image alone, so two sets of images that
    differ by one image become two sets of latents that differ by one.
    """
    images, labels, names = private_images(run)
    run = dataclasses.replace(run, shape=tuple(images.shape[1:]))
    total, fingerprint = len(images), checkpoint.fingerprint(images, labels)
    images, labels, names = (x[rank::ranks].to(device) for x in (images, labels, names))
    if run.coder is not None:
        images = autoencoder.to_latents(run.coder.to(device), images)
    return run, Share(images, labels, names, total, fingerprint)


def write(run: Run, trainable: dict[str, Tensor], metrics: list) -> None:
    """The adapter, config.json and metrics.csv into the run's folder.

    trainable: name -> tensor; metrics: a row (step, epsilon, best order) for each step that ran
    """
    s, out = run.settings, Path(run.settings.out)
    rows = [["step", "epsilon_rdp", "best_order"], *metrics]
    checkpoint.write_text(out / "metrics.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
    config = dict(dataclasses.asdict(s), data=s.data.partition(":")[0], base=published_place(s.base),
                  channels=run.shape[0], side=run.shape[-1], base_sha256=run.base_sha256)
    if run.classes is not None:
        config |= dict(classes=run.classes, labels=run.labels)
    for name in CURATORS:
        del config[name]
    checkpoint.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    lora.save(out, trainable, adapter(s, run.model))


def published_place(path: str) -> str:
    """A relative path below here or the repository, as it is; of any other place the file's name alone."""
    inside = not Path(path).is_absolute() and ".." not in Path(path).parts
    return path if inside else Path(path).name


def read_config(folder: Path) -> dict:
    """A finished run's config.json. Errors: not a run's folder, or not finished -> ValueError"""
    if (Path(folder) / "checkpoint.pt").exists():
        raise ValueError(f"{folder} is not finished: it still has its checkpoint.pt; finish it with "
                         f"train.py --resume and the flags it was started with")
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        config["base"], config["base_sha256"], config["side"]            # a KeyError now
        return config
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is not a run's folder: no readable config.json; expected one written by "
                         f"train.py") from None


def load(folder: Path, public: bool = False, base_path: str | None = None) -> Run:
    """A finished run: its public base with its private adapter merged in (public=True: the base alone).

    base_path: where the base is now; without it, where the run had it, from here or from the folders above
    Errors: not a run's folder, or its base is missing or has changed -> ValueError
    """
    folder, config = Path(folder), read_config(folder)
    path = Path(base_path or config["base"])
    above = [place / path for place in folder.resolve().parents] + [data.ASSETS / path.name]
    path = next((place for place in (path, *above) if place.is_file()), path)    # trained elsewhere
    model, coder, sha256 = base.load(path)
    if sha256 != config["base_sha256"]:
        raise ValueError(f"{path} is not the base that {folder} was trained on, though it has its name; "
                         f"expected the one whose weights have SHA-256 {config['base_sha256'][:12]}...")
    if coder is not None and model.classes is not None:
        lora.new_classes(model, config["classes"], config["start"])
    if not public:
        model = lora.merge(lora.load(model, folder))         # one weight a layer: faster than W and B A apart
    shape = (config.get("channels", model.config["image_channels"]), config["side"], config["side"])
    return Run(types.SimpleNamespace(**config), model, coder, sha256, config.get("classes") or None,
               config.get("labels"), shape=shape)


def public(run: Run) -> Run:
    """The run with its public base alone, read again from its file."""
    model, coder, _ = base.load(run.settings.base)
    if coder is not None and model.classes is not None:
        lora.new_classes(model, run.classes, run.settings.start)
    return dataclasses.replace(run, model=model.to(next(run.model.parameters()).device))


def class_names(run: Run) -> list[str]:
    """The name of each of the network's classes, those of the run's own declaration in their places."""
    names = list(run.model.config["names"] or map(str, range(run.model.classes)))
    for label, name in zip(run.labels or [], run.classes or []):
        names[label] = name
    return names


if __name__ == "__main__":
    for config in sorted(data.ASSETS.glob("*/config.json")):
        run = load(config.parent)
        print(f"{config.parent.name:<16} {run.settings.train} on {run.settings.base}, images {run.shape}, "
              f"classes {data.few(run.classes or ['none'])}")
