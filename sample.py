"""sample.py -- checkpoint to pictures.

Sampling reads only the public base and the private adapter: post-processing, so it spends no privacy,
however many images are drawn.                                    [Dwork & Roth 2014, Prop. 2.1]

  $ python sample.py runs/mnist --n 100 --out grid.png
  $ python sample.py runs/mnist --n 10000 --npz samples.npz       # images (n, C, H, W) uint8, labels (n,)
"""
import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import autoencoder
import data
import ddpm
import lora
import unet
from autoencoder import Autoencoder
from machinery import checkpoint, screen


STEPS, GUIDANCE = 50, 0.5                # of a run's own pictures, and the defaults of --steps and --guidance


def pick_device(name: str) -> torch.device:
    """"auto" is cuda, else mps, else cpu; anything else is taken at its word, or refused if not there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    kind, _, index = name.partition(":")
    if kind not in available or index and not index.isdecimal():
        raise ValueError(f"device {name!r} is not available here, expected auto or one of "
                         f"{', '.join(available)}")
    return torch.device(name)


def read_config(folder: Path) -> dict:
    """A finished run's config.json. Errors: not a run's folder -> ValueError"""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        config["base"], config["base_sha256"], config["side"]            # a KeyError now
        return config
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is not a run's folder: no readable config.json; expected one written by "
                         f"train.py") from None


def load_run(folder: Path, public: bool = False) -> unet.UNet:
    """The network alone of a finished run; see open_run."""
    return open_run(folder, public)[0]


def open_run(folder: Path, public: bool = False) -> tuple[unet.UNet, Autoencoder | None, dict]:
    """A finished run: its public base with its private adapter (public=True: the base alone), the autoencoder
    of its latents (None: it works in pixels) and its config.json.

    Errors: not a run's folder, or its base is missing or has changed -> ValueError
    """
    folder, config = Path(folder), read_config(folder)
    base = Path(config["base"])
    above = [place / base for place in folder.resolve().parents]         # trained there, sampled elsewhere
    path = next((path for path in (base, *above) if path.is_file()), base)
    model, coder = unet.load_with_coder(path)
    if unet.fingerprint(model, coder) != config["base_sha256"]:
        raise ValueError(f"{path} is not the base that {folder} was trained on, though it has its name; "
                         f"expected the one whose weights have SHA-256 {config['base_sha256'][:12]}...")
    if coder is not None and model.classes is not None:
        lora.new_classes(model, config["classes"], config["start"])
    if not public:
        model = lora.merge(lora.load(model, folder))         # one weight a layer: faster than W and B A apart
    return model, coder, config


def generate(model: unet.UNet, labels: Tensor | None, shape: tuple, *, sampler: str = "ddim",
             steps: int = STEPS, eta: float = 1.0, guidance: float = 0.0, floor: int = 0,
             batch: int | None = None, generator: torch.Generator | None = None,
             quiet: bool = False, coder: Autoencoder | None = None) -> Tensor:
    """Images in batches with a progress bar: shape = (n, C, H, W) -> uint8 of that shape, on the CPU.

    coder:   the autoencoder whose latents `model` draws; its D makes them pictures
    sampler: ddim, ddpm (all steps) or dpm (second order; no eta)
    floor:   grey levels up to this become 0. A digit or a garment lies on an empty ground, which the
             network's last step leaves a few levels off: no eye sees it, but the FID network does.
    """
    device, images = next(model.parameters()).device, []
    inner, limit = shape[1:], 1.0
    if coder is not None:
        inner, limit = autoencoder.latent_shape(coder, shape[1:]), autoencoder.LIMIT
    if batch is None:
        batch = 128 if device.type == "cpu" else 1000        # 500 is 1.2 times slower on a CPU: its caches
    with tqdm(total=shape[0], desc="sampling", unit="image", disable=screen.hide_bar(not quiet)) as bar:
        for start in range(0, shape[0], batch):
            size = (min(batch, shape[0] - start), *inner)
            part = None if labels is None else labels[start:start + size[0]].to(device)
            with unet.autocast(device):
                if sampler == "dpm":
                    x = ddpm.dpm_sample(model, part, size, steps, guidance, generator, limit=limit)
                elif sampler == "ddpm":
                    x = ddpm.ddpm_sample(model, part, size, guidance, generator, limit=limit)
                else:
                    x = ddpm.ddim_sample(model, part, size, steps, eta, guidance, generator, limit=limit)
            x = data.to_uint8(x) if coder is None else autoencoder.to_images(coder, x, shape[1:])
            x = x.cpu()
            images.append(x.masked_fill(x <= floor, 0))
            bar.update(size[0])
    return torch.cat(images)


def trained_classes(model: unet.UNet, run: dict, n: int, below: int | None = None) -> Tensor | None:
    """n labels, the run's declared classes (all of the base's where none were) in turn; None without classes.

    below: leave out the classes from this number on, where the real images have none of them
    """
    if model.classes is None:
        return None
    chosen = run.get("labels") or list(range(model.classes))
    labels = torch.tensor([label for label in chosen if below is None or label < below])
    return labels[torch.arange(n) % len(labels)]


def named(model: unet.UNet, run: dict) -> list[str]:
    """The name of each of the base's classes, those of the run's own declaration in their places."""
    names = list(model.config["names"] or map(str, range(model.classes)))
    for label, name in zip(run.get("labels") or [], run.get("classes") or []):
        names[label] = name
    return names


def image_shape(model: unet.UNet, run: dict) -> tuple[int, int, int]:
    """(C, H, W) of the images that a run's model draws."""
    return run.get("channels", model.config["image_channels"]), run["side"], run["side"]


def one_of_each(model: unet.UNet, labels: list[int] | None) -> Tensor | None:
    """At most ten of the given classes, or of all; None for a model without classes."""
    return None if model.classes is None else torch.tensor((labels or list(range(model.classes)))[:10])


def write_grid(images: Tensor, columns: int, path: Path | io.BytesIO) -> None:
    """uint8 (n, C, H, W) as one png, `columns` images in a row."""
    from torchvision.utils import save_image             # here: it takes as long to import as torch itself
    save_image(images.float() / 255, path, nrow=columns, format="png")


def class_strip(model: unet.UNet, shape: tuple, labels: list[int] | None, coder: Autoencoder | None,
                path: Path) -> None:
    """One image of each class (of `labels`, at most ten) in a row, from the same noise; shape = (C, H, W)."""
    labels = one_of_each(model, labels)
    n = 10 if labels is None else len(labels)
    same = torch.Generator(next(model.parameters()).device).manual_seed(0)
    images = generate(model, labels, (n, *shape), steps=STEPS, guidance=GUIDANCE, generator=same, quiet=True,
                      coder=coder)
    write_grid(images, n, path)


def before_and_after(path: Path, before: unet.UNet, after: unet.UNet, shape: tuple,
                     labels: list[int] | None = None, coder: Autoencoder | None = None,
                     columns: int = 8) -> None:
    """A row a class, `before` on the left, `after` on the right, from the same noise; shape = (C, H, W)."""
    from torchvision.utils import make_grid, save_image
    device, labels, sides = next(after.parameters()).device, one_of_each(after, labels), []
    rows = 10 if labels is None else len(labels)
    labels = None if labels is None else labels.repeat_interleave(columns)
    for model in (before.to(device), after):
        same = torch.Generator(device).manual_seed(0)
        images = generate(model, labels, (rows * columns, *shape), steps=STEPS, guidance=GUIDANCE,
                          generator=same, quiet=True, coder=coder)
        sides.append(make_grid(images.float() / 255, nrow=columns, padding=1, pad_value=0.3))
    save_image(torch.cat([sides[0], torch.ones(3, sides[0].shape[1], 6), sides[1]], dim=2), path)


def check(a: argparse.Namespace) -> None:
    """Refuse what has no meaning, in one line, before anything is drawn."""
    if a.n < 1 or a.batch is not None and a.batch < 1:
        raise ValueError(f"--n {a.n} --batch {a.batch}: expected at least 1")
    if not 1 <= a.steps <= ddpm.LINEAR.T:
        raise ValueError(f"--steps {a.steps}: expected 1 to {ddpm.LINEAR.T}")
    if not 0 <= a.eta < math.inf:
        raise ValueError(f"--eta {a.eta}: expected a number >= 0")
    if not 0 <= a.floor <= 255:
        raise ValueError(f"--floor {a.floor}: expected a grey level, 0 to 255")
    if not 0 <= a.guidance < math.inf:
        raise ValueError(f"--guidance {a.guidance}: expected a number >= 0")
    if a.seed is not None and not 0 <= a.seed < 2**32:
        raise ValueError(f"--seed {a.seed}: expected 0 to 2^32 - 1")
    if a.out and Path(a.out).suffix != ".png":
        raise ValueError(f"cannot write {a.out}: expected a name that ends in .png")
    for path in (a.out, a.npz):
        if not path:
            continue
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {folder}")
        if Path(path).is_dir():
            raise ValueError(f"cannot write {path}: it is a folder, expected a file")
        checkpoint.try_writing(folder)


def draw(a: argparse.Namespace) -> None:
    """What the command line asks for: pictures, arrays or both."""
    device = pick_device(a.device)
    model, coder, run = open_run(a.run, a.public)
    model.to(device)
    generator = torch.Generator(device)
    if a.seed is None:
        generator.seed()
    else:
        generator.manual_seed(a.seed)
    labels = trained_classes(model, run, a.n)
    images = generate(model, labels, (a.n, *image_shape(model, run)), sampler=a.sampler, steps=a.steps,
                      eta=a.eta, guidance=a.guidance, floor=a.floor, batch=a.batch, generator=generator,
                      coder=coder and coder.to(device))
    if a.out:
        classes = 1 if labels is None else len(labels.unique())
        columns = min(a.n, classes if classes > 1 else 10)
        picture = io.BytesIO()
        write_grid(images, columns, picture)
        checkpoint.write_bytes(Path(a.out), picture.getvalue())
    if a.npz:
        arrays = dict(images=images.numpy())
        if labels is not None and len(run.get("labels") or range(model.classes)) > 1:    # one class is none
            arrays |= dict(labels=labels.numpy(), classes=np.array(named(model, run)))
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        checkpoint.write_bytes(Path(a.npz), packed.getvalue())
    print(" and ".join(f"wrote {path}" for path in (a.out, a.npz) if path), f"({a.n} images)")


def main() -> None:
    p = screen.Parser(__doc__)
    p.add_argument("run", help="a run's folder, such as runs/mnist")
    p.add_argument("--n", type=int, default=100, help="how many images, classes in turn")
    p.add_argument("--out", default=None, help="write a grid of pictures here (default grid.png if no --npz)")
    p.add_argument("--npz", default=None, help="write images and labels here, for evaluation")
    p.add_argument("--sampler", choices=("ddim", "ddpm", "dpm"), default="ddim",
                   help="ddpm: all 1000 steps; dpm: second order, no --eta, the sharpest in few steps")
    p.add_argument("--steps", type=int, default=STEPS, help="DDIM steps, 1 to 1000")
    p.add_argument("--eta", type=float, default=1.0, help="0: deterministic DDIM; 1: as random as DDPM")
    p.add_argument("--floor", type=int, default=0,
                   help="grey levels (0 to 255) up to this become 0: an empty ground is empty")
    p.add_argument("--guidance", type=float, default=GUIDANCE, help="classifier-free guidance w, 0: none")
    p.add_argument("--public", action="store_true", help="the public base alone, without the private adapter")
    p.add_argument("--batch", type=int, default=None,
                   help="images per forward pass: memory only (default: 128 on a CPU, else 1000)")
    p.add_argument("--seed", type=int, default=None, help="make the same pictures again (costs no privacy)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    a = p.parse_args()
    if not a.out and not a.npz:
        a.out = "grid.png"
    with screen.one_line(p.prog, "lower --batch, which changes no picture's quality"):
        check(a)
        draw(a)


if __name__ == "__main__":
    main()
