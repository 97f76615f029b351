"""sample.py -- checkpoint to pictures.

Sampling reads only the public base and the private adapter: post-processing, so it spends no privacy,
however many images are drawn.                                    [Dwork & Roth 2014, Prop. 2.1]

  $ python sample.py runs/mnist --n 100 --out grid.png
  $ python sample.py runs/mnist --n 10000 --npz samples.npz       # images (n, C, H, W) uint8, labels (n,)
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import checkpoint
import data
import ddpm
import lora
import screen


def pick_device(name: str) -> torch.device:
    """"auto" is cuda, else mps, else cpu; anything else is taken at its word, or refused if it is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in have if have[kind]))
    kind, _, index = name.partition(":")
    if not have.get(kind, False) or index and not index.isdecimal():
        raise ValueError(f"device {name!r} is not available here, expected auto or one of "
                         f"{', '.join(kind for kind in have if have[kind])}")
    return torch.device(name)


def load_run(folder: Path, public: bool = False) -> ddpm.UNet:
    """The model of a finished run: its public base with its private adapter (public=True: the base alone).

    Errors: not a run's folder, or its base is missing or has changed -> ValueError
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        base = Path(config["base"])
        trained_on = config["base_sha256"]
        config["side"], config["guidance"], config["sample_steps"]       # a KeyError now
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is not a run's folder: no readable config.json; expected one written by train.py") from None
    above = [place / base for place in folder.resolve().parents]         # trained there, sampled elsewhere
    path = next((path for path in (base, *above) if path.is_file()), base)
    model = ddpm.load_unet(path)
    if checkpoint.fingerprint(*model.state_dict().values()) != trained_on:
        raise ValueError(f"{path} is not the base that {folder} was trained on, though it has its name; "
                         f"expected the one whose weights have SHA-256 {trained_on[:12]}...")
    return model if public else lora.merge(lora.load(model, folder))     # one weight a layer: a third faster than W and B A apart


def generate(model: ddpm.UNet, labels: Tensor | None, shape: tuple, *, steps: int = 50, eta: float = 1.0, order: int = 1,
             guidance: float = 0.0, floor: int = 0, batch: int | None = None, generator: torch.Generator | None = None,
             quiet: bool = False) -> Tensor:
    """ddim_sample in batches with a progress bar: shape = (n, C, H, W) -> uint8 images of that shape, on the CPU.

    floor: grey levels up to this become 0. A digit or a garment lies on an empty ground, which the network's last step
    leaves a few levels off: no eye sees it, but the FID network does.
    """
    device, images = next(model.parameters()).device, []
    batch = batch or (128 if device.type == "cpu" else 1000)             # 1.2 times faster than 500 on a CPU: caches are small
    with tqdm(total=shape[0], desc="sampling", unit="image", disable=screen.hide_bar(not quiet)) as bar:
        for start in range(0, shape[0], batch):
            n = min(batch, shape[0] - start)
            part = None if labels is None else labels[start:start + n].to(device)
            with ddpm.autocast(device):
                x = ddpm.ddim_sample(model, part, (n, *shape[1:]), steps, eta, guidance, generator, order=order)
            x = data.to_uint8(x).cpu()
            images.append(x.masked_fill(x <= floor, 0))
            bar.update(n)
    return torch.cat(images)


def trained_classes(model: ddpm.UNet, run: dict, n: int, below: int | None = None) -> Tensor | None:
    """n labels, the run's declared classes (all of the base's where none were) in turn; None without classes.

    below: leave out the classes from this number on, where the real images have none of them
    """
    if model.classes is None:
        return None
    chosen = run.get("labels") or list(range(model.classes))
    labels = torch.tensor([label for label in chosen if below is None or label < below])
    return labels[torch.arange(n) % len(labels)]


def named(model: ddpm.UNet, run: dict) -> list[str]:
    """The name of each of the base's classes, those of the run's own declaration in their places."""
    names = list(model.config["names"] or map(str, range(model.classes)))
    for label, name in zip(run.get("labels") or [], run.get("classes") or []):
        names[label] = name
    return names


def image_shape(model: ddpm.UNet, side: int) -> tuple[int, int, int]:
    """(C, H, W) of the images that `model` draws at this side length."""
    return model.config["image_channels"], side, side


def one_of_each(model: ddpm.UNet, labels: list[int] | None) -> Tensor | None:
    """At most ten of the given classes, or of all; None for a model without classes."""
    return None if model.classes is None else torch.tensor((labels or list(range(model.classes)))[:10])


def class_strip(path: Path, model: ddpm.UNet, shape: tuple, steps: int, guidance: float,
                labels: list[int] | None = None) -> None:
    """One image of each class (of `labels`, at most ten) in a row, from the same noise; shape = (C, H, W)."""
    labels = one_of_each(model, labels)
    n = 10 if labels is None else len(labels)
    same = torch.Generator(next(model.parameters()).device).manual_seed(0)
    images = generate(model, labels, (n, *shape), steps=steps, guidance=guidance, generator=same, quiet=True)
    save_image(images.float() / 255, path, nrow=n)


def before_and_after(path: Path, before: ddpm.UNet, after: ddpm.UNet, shape: tuple, steps: int, guidance: float,
                     labels: list[int] | None = None, columns: int = 8) -> None:
    """A row a class, `before` on the left, `after` on the right, from the same noise; shape = (C, H, W)."""
    device, labels, sides = next(after.parameters()).device, one_of_each(after, labels), []
    rows = 10 if labels is None else len(labels)
    labels = None if labels is None else labels.repeat_interleave(columns)
    for model in (before.to(device), after):
        same = torch.Generator(device).manual_seed(0)
        images = generate(model, labels, (rows * columns, *shape), steps=steps, guidance=guidance, generator=same, quiet=True)
        sides.append(make_grid(images.float() / 255, nrow=columns, padding=1, pad_value=0.3))
    save_image(torch.cat([sides[0], torch.ones(3, sides[0].shape[1], 6), sides[1]], dim=2), path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")        # one line, exit code 2
    p.add_argument("run", help="a run's folder, such as runs/mnist")
    p.add_argument("--n", type=int, default=100, help="how many images, classes in turn")
    p.add_argument("--out", default=None, help="write a grid of pictures here (default grid.png if no --npz)")
    p.add_argument("--npz", default=None, help="write images and labels here, for evaluation")
    p.add_argument("--sampler", choices=("ddim", "ddpm", "dpm"), default="ddim",
                   help="ddpm: all 1000 steps; dpm: second order, --eta 0, the sharpest in few steps")
    p.add_argument("--steps", type=int, default=None, help="DDIM steps, 1 to 1000 (default: the run's own)")
    p.add_argument("--eta", type=float, default=1.0, help="0: deterministic DDIM; 1: as random as DDPM")
    p.add_argument("--floor", type=int, default=0, help="grey levels (0 to 255) up to this become 0: an empty ground is empty")
    p.add_argument("--guidance", type=float, default=None, help="classifier-free guidance w, 0: none (default: the run's own)")
    p.add_argument("--public", action="store_true", help="the public base alone, without the private adapter")
    p.add_argument("--batch", type=int, default=None, help="images per forward pass: memory only (default: 128 on a CPU, else 1000)")
    p.add_argument("--seed", type=int, default=None, help="make the same pictures again (costs no privacy)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    a = p.parse_args()
    out = a.out or (None if a.npz else "grid.png")
    with screen.one_line(p.prog, "lower --batch, which changes no picture's quality"):
        rules = [(a.n >= 1 and (a.batch is None or a.batch >= 1), f"--n {a.n} --batch {a.batch}: expected at least 1"),
                 (a.steps is None or 1 <= a.steps <= ddpm.LINEAR.T, f"--steps {a.steps}: expected 1 to {ddpm.LINEAR.T}"),
                 (0 <= a.eta < math.inf, f"--eta {a.eta}: expected a number >= 0"),
                 (0 <= a.floor <= 255, f"--floor {a.floor}: expected a grey level, 0 to 255"),
                 (a.guidance is None or 0 <= a.guidance < math.inf, f"--guidance {a.guidance}: expected a number >= 0"),
                 (a.seed is None or 0 <= a.seed < 2**32, f"--seed {a.seed}: expected 0 to 2^32 - 1"),
                 (not out or Path(out).suffix == ".png", f"cannot write {out}: expected a name that ends in .png")]
        for path in filter(None, (out, a.npz)):
            folder = Path(path).resolve().parent
            rules += [(folder.is_dir(), f"cannot write {path}: there is no folder {folder}"),
                      (not Path(path).is_dir(), f"cannot write {path}: it is a folder, expected a file")]
        for ok, message in rules:
            if not ok:
                raise ValueError(message)
        for path in filter(None, (out, a.npz)):
            checkpoint.try_writing(Path(path).resolve().parent)
        device = pick_device(a.device)
        model = load_run(a.run, a.public).to(device)
        run = json.loads((Path(a.run) / "config.json").read_text())
        generator = torch.Generator(device)
        generator.manual_seed(a.seed) if a.seed is not None else generator.seed()
        labels = trained_classes(model, run, a.n)
        steps = run["sample_steps"] if a.steps is None else a.steps
        steps, eta, order = dict(ddim=(steps, a.eta, 1), ddpm=(ddpm.LINEAR.T, 1.0, 1), dpm=(steps, 0.0, 2))[a.sampler]
        guidance = run["guidance"] if a.guidance is None else a.guidance
        images = generate(model, labels, (a.n, *image_shape(model, run["side"])), steps=steps,
                          eta=eta, order=order, guidance=guidance, floor=a.floor, batch=a.batch, generator=generator)
        if out:
            columns = min(a.n, 10 if labels is None else len(labels.unique()))
            grid = lambda f: save_image(images.float() / 255, f, nrow=columns, format="png")
            checkpoint.write_atomically(Path(out), grid)
        if a.npz:
            arrays = dict(images=images.numpy())
            if labels is not None:                                       # no labels of a model without classes
                arrays |= dict(labels=labels.numpy(), classes=np.array(named(model, run)))
            checkpoint.write_atomically(Path(a.npz), lambda f: np.savez_compressed(f, **arrays))
        print(" and ".join(f"wrote {path}" for path in (out, a.npz) if path), f"({a.n} images)")


if __name__ == "__main__":
    main()
