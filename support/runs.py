"""runs.py -- the parts of a private run, and the folder that a finished run leaves.

A run is made once from its settings, before the first private image is read. A finished run is opened from
its folder. Everything in the folder is covered by the run's (epsilon, delta) and may be published, so nothing
in it names a place on the machine where it was made.

  $ python -m support.runs            # the parts of the runs that ship
"""
import dataclasses
import hashlib
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

# Settings that are not published: some may tell how large the lots were, the others name places on a machine.
CURATORS = ("chunk", "device", "resume", "peek", "out", "data_dir")
ROOT = Path(__file__).resolve().parent.parent
# The files whose code makes a private step.
STEP = ("train.py", "dpsgd.py", "ddpm.py", "unet.py", "lora.py", "autoencoder.py", "data.py",
        "machinery/devices.py", "machinery/distributed.py", "machinery/draws.py", "machinery/kernels.py",
        "machinery/secret.py", "support/runs.py")


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of one run. All of them are public, except the trained weights inside `model`."""
    settings: Any                                # train.Settings, or config.json of a finished run
    model: unet.UNet                             # the public base with the adapter
    coder: autoencoder.Autoencoder | None        # the autoencoder of its latents; None: it works in pixels
    base_sha256: str                             # fingerprint of the public base
    classes: list[str] | None                    # declared names of the private classes; None: no classes
    labels: list[int] | None                     # the number of each of these classes in the network
    adapted: int = 0                             # layers with an adapter, or trained tensors without LoRA
    shape: tuple[int, int, int] | None = None    # (C, H, W) of an image


def begin(settings, device: torch.device) -> Run:
    """The run of these train.Settings: the frozen public base, with an adapter that changes nothing yet.

    Errors: there is no such base, the classes do not fit it, or the adapter matches no layer -> ValueError
    """
    s = settings
    model, coder, sha256 = base.load(s.base)
    if s.start != "own" and (coder is None or model.classes is None):
        raise ValueError(f"--start {s.start}: expected only with a base in latents that has classes; on "
                         f"{s.base} every private class takes a place among the base's own")
    declared = classes.declared_classes(s.data, s.classes, model, own=coder is not None)
    if coder is not None and model.classes is not None:
        lora.new_classes(model, declared["classes"], s.start)
    adapted = lora.attach(model, adapter(s, model))
    s = dataclasses.replace(s, precision=devices.precision(device, model, s.precision))    # no longer auto
    return Run(s, model, coder, sha256, declared.get("classes"), declared.get("labels"), adapted)


def adapter(s, model: unet.UNet) -> dict:
    """The adapter_config.json of a run with these settings; lora_alpha = rank, so that the update is B A."""
    return lora.describe(s.train, s.rank, s.rank, model.classes is not None)


def code() -> str:
    """SHA-256 of the files in STEP. A report is about steps that were all made by the same code."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in STEP)).hexdigest()


def private_images(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """(private images, their labels in the network's numbering, their image hashes).

    The hash of an image is made of its own bytes alone (draws.hashes).
    Shapes: uint8 (N, C, H, W), int64 (N,), int64 (N,)
    Errors: images that cannot be read, or that the base cannot take -> ValueError
    """
    s = run.settings
    channels = (run.coder or run.model).config["image_channels"]
    images, labels = data.load(s.data, "train", s.data_dir or None, s.size, run.classes, channels, s.white)
    if not s.N / 2 <= len(images) <= 2 * s.N:
        folders.note(f"{screen.count(len(images), 'image')} found, and --N declares {s.N:,}: is --N right?")
    images, labels = classes.in_places(images, labels, run.labels, run.classes)
    base.fits(run.model, images, labels, s.data, run.coder)
    return images, labels, draws.hashes(images)


class Share(NamedTuple):
    """One rank's part of the private images: every image whose number is `rank` modulo `ranks`."""
    images: Tensor                               # uint8 (n, C, H, W), or float latents (n, c, h, w)
    labels: Tensor                               # int64 (n,), in the network's numbering
    hashes: Tensor                               # int64 (n,), the image hashes (draws.hashes)
    total: int                                   # number of images of all ranks together; private
    fingerprint: str                             # of all images and labels; private


def private_share(run: Run, rank: int, ranks: int, device: torch.device) -> tuple[Run, Share]:
    """(the run, completed with the shape of its images, and this rank's private images, on its device).

    In a run on latents each image is encoded here, once. The encoder reads one image alone, so two sets of
    images that differ by one image become two sets of latents that differ by one latent.
    """
    images, labels, hashes = private_images(run)
    run = dataclasses.replace(run, shape=tuple(images.shape[1:]))
    total, fingerprint = len(images), checkpoint.fingerprint(images, labels)
    images, labels, hashes = (x[rank::ranks].to(device) for x in (images, labels, hashes))
    if run.coder is not None:
        coder = run.coder.to(device)
        one = torch.randint(256, (1, *run.shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        devices.one_thread_unless_equal(
            device, lambda: [autoencoder.to_latents(coder, one.expand(128, -1, -1, -1))])    # a whole batch
        images = autoencoder.to_latents(coder, images)
    return run, Share(images, labels, hashes, total, fingerprint)


def write(run: Run, trainable: dict[str, Tensor], metrics: list) -> None:
    """Write the adapter, config.json and metrics.csv into the run's folder.

    trainable: name -> tensor
    metrics:   one row (step, epsilon, best order) for each step that ran
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
    """`path` as config.json names it: whole if it is relative and has no "..", else only the file's name."""
    inside = not Path(path).is_absolute() and ".." not in Path(path).parts
    return path if inside else Path(path).name


def read_config(folder: Path) -> dict:
    """The config.json of a finished run. Errors: not the folder of a run, or not finished -> ValueError"""
    if (Path(folder) / "checkpoint.pt").exists():
        raise ValueError(f"{folder} is not finished: it still has its checkpoint.pt; finish it with "
                         f"train.py --resume and the flags it was started with")
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        config["base"], config["base_sha256"], config["side"]            # raises KeyError if one is missing
        return config
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is not the folder of a run: it has no readable config.json; expected a "
                         f"folder written by train.py") from None


def load(folder: Path, public: bool = False, base_path: str | None = None) -> Run:
    """A finished run: its public base with its private adapter merged in; public=True: the base alone.

    base_path: file of the base; None: the path in config.json. If there is no such file, it is looked for in
               the folders above the run and, by its name, in assets/
    Errors:    not the folder of a run, or its base is missing or has changed -> ValueError
    """
    folder, config = Path(folder), read_config(folder)
    path = Path(base_path or config["base"])
    above = [place / path for place in folder.resolve().parents] + [data.ASSETS / path.name]
    path = next((place for place in (path, *above) if place.is_file()), path)    # perhaps trained elsewhere
    model, coder, sha256 = base.load(path)
    if sha256 != config["base_sha256"]:
        raise ValueError(f"{path} is not the base that {folder} was trained on, although it has the same "
                         f"name; expected the one whose weights have SHA-256 "
                         f"{config['base_sha256'][:12]}...; pass it with --base")
    if coder is not None and model.classes is not None:
        lora.new_classes(model, config["classes"], config["start"])
    if not public:
        model = lora.merge(lora.load(model, folder))         # W + B A in one matrix is faster than W and B A
    shape = (config.get("channels", model.config["image_channels"]), config["side"], config["side"])
    return Run(types.SimpleNamespace(**config), model, coder, sha256, config.get("classes") or None,
               config.get("labels"), shape=shape)


def public(run: Run) -> Run:
    """The same run with its public base alone, which is read again from its file."""
    model, coder, _ = base.load(run.settings.base)
    if coder is not None and model.classes is not None:
        lora.new_classes(model, run.classes, run.settings.start)
    return dataclasses.replace(run, model=model.to(next(run.model.parameters()).device))


def class_names(run: Run) -> list[str]:
    """The name of each class of the network. Classes that the run declared have their declared names.

    A base in pixels may have more classes than names; the others are called by their numbers.
    """
    names = list(run.model.config["names"] or [])
    names += map(str, range(len(names), run.model.classes))
    for label, name in zip(run.labels or [], run.classes or []):
        names[label] = name
    return names


if __name__ == "__main__":
    for config in sorted(data.ASSETS.glob("*/config.json")):
        run = load(config.parent)
        print(f"{config.parent.name:<16} {run.settings.train} on {run.settings.base}, images {run.shape}, "
              f"classes {folders.few(run.classes or ['none'])}")
