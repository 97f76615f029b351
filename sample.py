"""sample.py -- draw pictures from the adapter of a finished run.

Sampling reads the public base and the private adapter, but no private image. So it is post-processing, and
costs no privacy, however many images are drawn.                        [Dwork & Roth 2014, Prop. 2.1]

  $ python sample.py runs/mnist --n 100 --out grid.png
  $ python sample.py runs/mnist --n 10000 --npz samples.npz       # images (n, C, H, W) uint8, labels (n,)
"""
import argparse
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import autoencoder
import data
import ddpm
from ddpm import Sampling
from machinery import checkpoint, devices, flags, screen
from support import runs
from support.runs import Run

PICTURES = Sampling()        # the settings for the pictures that a run itself draws


def generate(run: Run, labels: Tensor | None, n: int, how: Sampling = PICTURES, *, threshold: int = 0,
             batch: int | None = None, generator: torch.Generator | None = None,
             quiet: bool = False) -> Tensor:
    """n images, drawn in batches: uint8 (n, *run.shape), on the CPU.

    labels:    (n,), each class by its number in the network, which may differ from its number in the data set
               (support/classes.py), or None
    threshold: grey levels up to this become 0. Digits and garments lie on a black background, but the network
               leaves it a few grey levels brighter. The eye does not notice this, but the FID network does.
    batch:     images per forward pass. It changes memory, speed, and which images a seed gives, but not their
               quality
    quiet:     show no progress
    """
    device, images = next(run.model.parameters()).device, []
    inner, limit = run.shape, 1.0
    if run.coder is not None:
        inner, limit = autoencoder.latent_shape(run.coder, run.shape), autoencoder.LIMIT
    if batch is None:
        batch = 128 if device.type == "cpu" else 1000        # on a CPU 500 is 1.2 times slower
    with (tqdm(total=n, desc="sampling", unit="image", disable=screen.hide_bar(not quiet)) as bar,
          screen.waiting("sampling", n, has_bar=True, wanted=not quiet) as wait):
        for start in range(0, n, batch):
            shape = (min(batch, n - start), *inner)
            part = None if labels is None else labels[start:start + shape[0]].to(device)
            with devices.autocast(device, run.model):
                x = how.draw(run.model, part, shape, generator, limit)
            x = data.to_uint8(x) if run.coder is None else autoencoder.to_images(run.coder, x, run.shape)
            x = x.cpu()
            images.append(x.masked_fill(x <= threshold, 0))
            bar.update(shape[0])
            wait.done += shape[0]
    return torch.cat(images)


def class_labels(run: Run) -> list[int]:
    """The labels of the run's declared classes; those of its base if it declares none."""
    return run.labels or list(range(run.model.classes))


def trained_classes(run: Run, n: int, below: int | None = None) -> Tensor | None:
    """n labels, which take the run's declared classes in turn; None for a network without classes.

    A run without declared classes has those of the base.
    below: leave out the classes from this number on, because no real image is of them
    """
    if run.model.classes is None:
        return None
    chosen = class_labels(run)
    labels = torch.tensor([label for label in chosen if below is None or label < below])
    if not len(labels):
        raise ValueError(f"the run has the classes {chosen}, and none of them is below {below}; expected "
                         f"--data with the images that it imitates")
    return labels[torch.arange(n) % len(labels)]


def one_of_each(run: Run) -> Tensor | None:
    """The labels of the run's first ten classes; None for a network without classes."""
    if run.model.classes is None:
        return None
    return torch.tensor(class_labels(run)[:10])


def write_grid(images: Tensor, columns: int, path: Path | io.BytesIO) -> None:
    """Write uint8 images (n, C, H, W) as one png, with `columns` images in a row."""
    from torchvision.utils import save_image             # imported here, as it takes as long as torch itself
    save_image(images.float() / 255, path, nrow=columns, format="png")


def class_strip(run: Run, path: Path) -> None:
    """Write one row with an image of each class, at most ten. Every call starts from the same noise."""
    labels = one_of_each(run)
    n = 10 if labels is None else len(labels)
    same = torch.Generator(next(run.model.parameters()).device).manual_seed(0)
    write_grid(generate(run, labels, n, PICTURES, generator=same, quiet=True), n, path)


def before_and_after(path: Path, before: Run, after: Run, columns: int = 8) -> None:
    """Write a picture with samples of `before` on the left and of `after` on the right.

    It has a row for each class, at most ten. Both models start from the same noise.
    """
    from torchvision.utils import make_grid, save_image
    device, labels, sides = next(after.model.parameters()).device, one_of_each(after), []
    rows = 10 if labels is None else len(labels)
    labels = None if labels is None else labels.repeat_interleave(columns)
    for run in (before, after):
        same = torch.Generator(device).manual_seed(0)
        images = generate(run, labels, rows * columns, PICTURES, generator=same, quiet=True)
        sides.append(make_grid(images.float() / 255, nrow=columns, padding=1, pad_value=0.3))
    save_image(torch.cat([sides[0], torch.ones(3, sides[0].shape[1], 6), sides[1]], dim=2), path)


def check(a: argparse.Namespace, how: Sampling) -> None:
    """Refuse flags that have no meaning, before anything is drawn. Errors: ValueError in one line"""
    for name in ("n", "batch"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise ValueError(f"--{name} {getattr(a, name)}: expected at least 1")
    how.check()
    if not 0 <= a.threshold <= 255:
        raise ValueError(f"--threshold {a.threshold}: expected a grey level, 0 to 255")
    if a.seed is not None and not 0 <= a.seed < 2**32:
        raise ValueError(f"--seed {a.seed}: expected a whole number, 0 to 2^32 - 1")
    for path, ending in ((a.out, ".png"), (a.npz, ".npz")):
        if not path:
            continue
        folder = Path(path).resolve().parent
        if Path(path).is_dir():
            raise ValueError(f"cannot write {path}: it is a folder; expected a file name that ends in "
                             f"{ending}")
        if Path(path).suffix.lower() != ending:
            raise ValueError(f"cannot write {path}: expected a file name that ends in {ending}")
        if not folder.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {folder}; make it first")
        checkpoint.try_writing(folder)


def draw(a: argparse.Namespace, how: Sampling) -> None:
    """Draw the samples that the command line asks for, and write them as a picture, as arrays, or both."""
    device = devices.pick(a.device)
    run = runs.load(a.run, a.public, a.base)
    run.model.to(device)
    if run.coder is not None:
        run.coder.to(device)
    generator = torch.Generator(device)
    if a.seed is None:
        generator.seed()
    else:
        generator.manual_seed(a.seed)
    labels = trained_classes(run, a.n)
    images = generate(run, labels, a.n, how, threshold=a.threshold, batch=a.batch, generator=generator)
    if a.out:
        classes = 1 if labels is None else len(labels.unique())
        columns = min(a.n, classes if classes > 1 else 10)
        picture = io.BytesIO()
        write_grid(images, columns, picture)
        checkpoint.write_bytes(Path(a.out), picture.getvalue())
    if a.npz:
        arrays = dict(images=images.numpy())
        if labels is not None and len(class_labels(run)) > 1:            # one class needs no labels
            arrays |= dict(labels=labels.numpy(), classes=np.array(runs.class_names(run)))
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        checkpoint.write_bytes(Path(a.npz), packed.getvalue())
    print("wrote " + " and ".join(path for path in (a.out, a.npz) if path), f"({screen.count(a.n, 'image')})")


def main() -> None:
    p = screen.Parser(__doc__)
    p.add_argument("run", help="folder of a finished run, such as runs/mnist")
    p.add_argument("--n", type=int, default=100, help="number of images, which take the classes in turn")
    p.add_argument("--out", default=None,
                   help="png file for a grid of all images (default without --npz: grid.png)")
    p.add_argument("--npz", default=None, help="npz file for images and labels, which evaluate.py reads")
    flags.add(p, Sampling, choices=dict(sampler=ddpm.SAMPLERS))
    p.add_argument("--threshold", type=int, default=0,
                   help="grey levels up to this, 0 to 255, become 0, so that a black background is black")
    p.add_argument("--public", action="store_true",
                   help="draw from the public base alone, without the private adapter")
    p.add_argument("--base", default=None,
                   help="file of the public base (default: the place that the run was trained from)")
    p.add_argument("--batch", type=int, default=None,
                   help="images per forward pass; affects memory and speed, not quality (default: 128 on a "
                        "CPU, else 1000)")
    p.add_argument("--seed", type=int, default=None,
                   help="seed that gives the same pictures with the same --batch; it may be published "
                        "(default: random)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    a = p.parse_args()
    if not a.out and not a.npz:
        a.out = "grid.png"
    with screen.one_line(p.prog, "lower --batch, which does not change the quality of the pictures"):
        how = flags.take(a, Sampling)
        check(a, how)
        draw(a, how)


if __name__ == "__main__":
    main()
