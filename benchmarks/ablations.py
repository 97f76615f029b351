"""ablations.py -- tests the paper's claims: what to train, rank, learning rate, draws K, what epsilon costs.

A row of benchmarks/ablations.csv is one fine-tuning by train.finetune, measured with the functions of
evaluate.py. The program may be stopped at any time: rows that exist are not run again, and seed 0 of all
experiments comes before seed 1, so that all of them have about the same number of seeds.

NOT PRIVATE: the runs have seeds, so anyone can repeat them with their noise. To compare settings on private
images is to look at these images, which no guarantee covers. The epsilon of a row is what the same mechanism
would spend with secret noise.

  $ python benchmarks/ablations.py                                             # all experiments
  $ # a second process at the same time needs a CSV file of its own:
  $ OMP_NUM_THREADS=1 python benchmarks/ablations.py --only rank,k --csv benchmarks/more.csv
  $ python benchmarks/ablations.py --table --csv benchmarks/ablations.csv benchmarks/more.csv
  $ pip install -r requirements-peers.txt && python benchmarks/ablations.py --plots
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Iterator
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import ddpm  # noqa: E402
import evaluate  # noqa: E402
import lora  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from machinery import checkpoint, devices  # noqa: E402
from support import classifiers, runs  # noqa: E402

WORK = ROOT / "runs" / "ablations"
# the settings from which each experiment differs in one or two
LAPTOP = dict(train="lora", rank=16, lr=2e-2, K=1, B=512, steps=25, C=0.003, epsilon=10.0)
SCALES = {"laptop": LAPTOP, "gpu": LAPTOP | dict(K=4, B=4096, steps=300)}
IMAGES = {"laptop": 500, "gpu": 10_000}                        # number of samples of each run
OTHERS = dict(data="mnist", delta=1e-5, base=str(ROOT / "assets" / "base.pt"))

COMPONENTS = {                                   # --train -> (in words, the learning rates that seed 0 tries)
    "qkv": ("LoRA on qkv", (2e-2,)),
    "qkv+proj": ("LoRA on qkv, projection", (2e-2,)),
    "lora": ("LoRA on qkv, projection; class embedding", (2e-2,)),
    "lora+embed": ("LoRA on qkv, projection, embedding layers; class embedding", (2e-2,)),
    "lora+conv": ("LoRA on qkv, projection, convolutions; class embedding", (5e-3,)),
    "attention": ("attention, class embedding (DP-LDM)", (3e-2, 8e-3, 2e-3, 5e-4)),
    "full": ("all weights", (2e-3, 5e-4, 2e-4))}
# LoRA's targets without the class embedding, which train.py does not offer
BARE = {"qkv": ["qkv"], "qkv+proj": ["qkv", "proj"]}
EXPERIMENTS = {                          # name -> the settings in which each run differs from LAPTOP (or gpu)
    "components": lambda base: [dict(train=what, epsilon=epsilon, lr=lr) for epsilon in (1.0, 10.0)
                                for what, (_, rates) in COMPONENTS.items() for lr in rates],
    "rank": lambda base: [dict(rank=rank, lr=lr) for rank in (4, 16, 64) for lr in (5e-3, 2e-2, 5e-2)],
    # first at equal computation, then at equal B, where K = 4 is one of the runs before
    "k": lambda base: [dict(K=K, B=base["B"] * base["K"] // K) for K in (1, 4, 16)]
    + [dict(K=K, B=base["B"] * base["K"] // 4) for K in (1, 16)],
    "epsilon": lambda base: [dict(epsilon=epsilon) for epsilon in (0.2, 1.0, 3.0, 10.0, math.inf)]}
# the settings that are columns of a table
SHOWN = dict(components=("train", "epsilon", "lr"), rank=("rank", "lr"), k=("K", "B"), epsilon=("epsilon",))

SETTINGS = dict(train=str, rank=int, lr=float, K=int, B=int, steps=int, C=float, epsilon=float, seed=int)
# the columns that together identify one run
CELL = dict(experiment=str, scale=str, images=int, sample_steps=int, epochs=int) | SETTINGS
COLUMNS = CELL | dict(weights=int, sigma=float, epsilon_rdp=float, recognised=float, CNN=float,
                      classifier_FID=float, seconds=float, device=str, torch=str)


def strip(cell: dict) -> Path:
    """The path of the picture with samples of a run at this scale and epsilon."""
    scale = "" if cell["scale"] == "laptop" else cell["scale"] + "-"
    return WORK / f"strip-{scale}{cell['epsilon']:g}.png"


def same(row: dict, cell: dict, *but: str) -> bool:
    """Whether the two are the same run, apart from the columns `but`."""
    return all(row[c] == cell[c] for c in CELL if c not in but)


def best_rate(cell: dict, rows: list[dict]) -> float:
    """The learning rate with the best CNN accuracy, among the runs of seed 0 that are otherwise like `cell`.

    Without such runs it is the learning rate of `cell`.
    """
    tried = [row for row in rows if row["seed"] == 0 and same(row, cell, "lr", "seed")]
    return max(tried, key=lambda row: row["CNN"], default=cell)["lr"]


def grid(names: list[str], seeds: int, evaluation: dict, rows: list[dict]) -> Iterator[dict]:
    """The cells (settings of runs) in order, seed by seed.

    evaluation: the scale, and how each run is measured
    rows:       the results so far. It grows meanwhile, and tells which learning rate of a component was best
                for seed 0: the other seeds run only that one
    """
    for seed in range(seeds):
        for name in names:
            for change in EXPERIMENTS[name](SCALES[evaluation["scale"]]):
                cell = SCALES[evaluation["scale"]] | change | evaluation | dict(experiment=name, seed=seed)
                if name != "components" or seed == 0 or cell["lr"] == best_rate(cell, rows):
                    yield cell


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; [] if there is none. A last line without a newline is incomplete and left out.

    Errors: not a CSV file of this program -> ValueError
    """
    text = path.read_text() if path.exists() else ""
    lines = csv.DictReader(io.StringIO(text[:text.rfind("\n") + 1]))
    try:
        return [{c: kind(row[c]) for c, kind in COLUMNS.items()} for row in lines]
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{path} is not a CSV file of this program ({e}); "
                         "move it away or choose another --csv") from None


def work(path: Path, todo: Callable, run: Callable, minutes: float = math.inf) -> None:
    """Add run(cell), the figures, to the CSV file for each cell of todo(rows) that it lacks.

    A run that another experiment has made is copied. After each row the whole file is written again under
    another name and renamed, so that it never holds an incomplete row. No run starts after `minutes`.
    """
    rows, start = read(path), time.monotonic()
    for cell in todo(rows):
        if any(same(row, cell) for row in rows):
            continue
        twin = next((row for row in rows if same(row, cell, "experiment")), None)
        if not twin and time.monotonic() - start > 60 * minutes:
            return print(f"{minutes:g} minutes are over; the same command continues")
        row, text = (twin or run(cell)) | cell, io.StringIO()
        rows.append(row)
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        checkpoint.write_text(path, text.getvalue())
        print(time.strftime("%H:%M"), row["experiment"], *(f"{c}={row[c]}" for c in SETTINGS),
              f"-> CNN {row['CNN']:.1%}, classifier-FID {row['classifier_FID']:.2f}, {row['seconds']:.0f} s",
              "(copied)" if twin else "", flush=True)


def real_runner(device: torch.device) -> Callable:
    """The function run(cell) -> figures, which makes one real run.

    The reference classifier, which is kept in runs/, and the features of the real images are made here, once.
    """
    real, labels, test = evaluate.load_real(OTHERS["data"], OTHERS.get("data_dir"), None)
    reference_classifier = classifiers.reference_classifier(OTHERS["data"], real, labels, device=device,
                                                            folder=WORK.parent)
    known = evaluate.reference(reference_classifier[:-1], real)
    classes, shape = reference_classifier[-1].out_features, tuple(real.shape[1:])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device} x {torch.get_num_threads()}"
    WORK.mkdir(parents=True, exist_ok=True)

    def run(cell: dict) -> dict:
        what, describe, start = cell["train"], lora.describe, time.time()
        how = ddpm.Sampling("ddim", cell["sample_steps"])

        def scaled(what: str, rank: int, alpha: float, conditional: bool) -> dict:
            """lora.describe with lora_alpha = 16 at every rank, and without the class embedding for BARE."""
            found = describe(what, rank, 16.0, conditional)
            if cell["train"] in BARE:
                found |= dict(target_modules=BARE[cell["train"]], modules_to_save=None)
            return found
        with (tempfile.TemporaryDirectory(dir=WORK) as folder,
              mock.patch.object(checkpoint, "stop_cleanly", threading.Event),    # Ctrl-C stops at once
              mock.patch.object(sample, "PICTURES", how),
              mock.patch.object(lora, "describe", scaled)):
            chunk = (64 if what == "full" else 256) * (16 if device.type == "cuda" else 1)
            s = train.check(train.Settings(**{c: cell[c] for c in SETTINGS} | OTHERS | dict(
                train="lora" if what in BARE else what, out=folder, device=str(device), chunk=chunk)))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train.finetune(s)
            seconds = round(time.time() - start, 1)
            facts = json.loads((Path(folder) / "privacy.json").read_text())
            trained = runs.load(folder, base_path=s.base)        # adapter_config.json names the layers
            trained.model.to(device)
            adapter = torch.load(Path(folder) / "adapter_model.bin", weights_only=True)
            weights = sum(p.numel() for p in adapter.values())
        asked = torch.arange(cell["images"]) % classes
        but_for_epsilon = cell | dict(epsilon=LAPTOP["epsilon"])
        if cell["seed"] == 0 and SCALES[cell["scale"]].items() <= but_for_epsilon.items():
            with mock.patch.object(sample, "PICTURES", how):
                sample.class_strip(trained, strip(cell))                 # for --plots
        how = dataclasses.replace(how, guidance=0.0)
        noise = torch.Generator(device).manual_seed(cell["seed"])
        images = sample.generate(trained, asked, len(asked), how, batch=500, generator=noise, quiet=True)
        net = classifiers.classifier("CNN", shape, classes).to(device)
        classifiers.train_classifier(net, images, asked, cell["epochs"], cell["seed"])
        cloud = evaluate.gaussian(classifiers.features(reference_classifier[:-1], images))
        return dict(weights=weights, sigma=facts["sigma"], epsilon_rdp=float(facts["epsilon_rdp"]),
                    recognised=classifiers.recognised_share(reference_classifier, images, asked)[0],
                    CNN=classifiers.recognised_share(net, *test)[0],
                    seconds=seconds, device=where, torch=torch.__version__,
                    classifier_FID=evaluate.frechet(*cloud, known["mu"], known["S"]))
    return run


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (divisor n - 1; 0 for one value).

    Example: (1, 3) -> (2, 1.414)
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def groups(rows: list[dict], name: str) -> list[list[dict]]:
    """The rows of an experiment, one list for each setting, which holds the seeds.

    Of a component only the best learning rate is kept.
    """
    found = {}
    for row in rows:
        if row["experiment"] == name and (name != "components" or row["lr"] == best_rate(row, rows)):
            found.setdefault(tuple(row[c] for c in CELL if c != "seed"), []).append(row)
    return list(found.values())


def table(rows: list[dict]) -> str:
    """Tables for docs/results.md, one for each experiment and way of measuring: mean ± spread over seeds."""
    text, last = [], None
    figures = "trained weights,sigma,recognised %,CNN accuracy %,classifier-FID,seconds,n".split(",")
    for g in (g for name in SHOWN for g in groups(sorted(rows, key=lambda row: row["scale"]), name)):
        r = g[0]
        way = [r[c] for c in ("experiment", "scale", "images", "sample_steps", "epochs", "device", "torch")]
        if way != last:
            heads = [*SHOWN[way[0]], *figures]
            text += ["\n**{}**, scale {}: {:,} images of {} DDIM steps, CNN of {} epochs; {}, torch {}\n"
                     .format(*way),
                     f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        line = [COMPONENTS[r[c]][0] if c == "train" else f"{r[c]:g}" for c in SHOWN[way[0]]]
        line += [f"{r['weights']:,}", f"{r['sigma']:.3f}"]
        for column, digits, factor in (("recognised", 1, 100), ("CNN", 1, 100),
                                       ("classifier_FID", 2, 1), ("seconds", 0, 1)):
            mean, spread = mean_and_spread([factor * row[column] for row in g])
            line.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(g) > 1 else ""))
        text, last = [*text, f"| {' | '.join([*line, str(len(g))])} |"], way
    return "\n".join([
        *text,
        "\nMean ± sample standard deviation over n seeds. The learning rate of a component is the one with"
        "\nthe best CNN accuracy for seed 0. Runs with a seed are not private, and these figures are computed"
        "\nfrom private images: no guarantee covers them."])


def plots(rows: list[dict], evaluation: dict, out: Path) -> None:
    """Write two pictures in `out`.

    epsilon-strips.png has a row of samples for each epsilon; epsilon-quality.png plots figures against it.
    """
    import matplotlib.pyplot as plt
    found = sorted((g for g in groups(rows, "epsilon") if evaluation.items() <= g[0].items()),
                   key=lambda g: g[0]["epsilon"])
    if not found or not all(strip(g[0]).exists() for g in found):
        raise ValueError(f"nothing to draw: expected rows of --only epsilon for {evaluation}, and their "
                         f"pictures in {WORK}; make them without --plots")
    size = (6.5, 0.72 * len(found))
    figure, axes = plt.subplots(len(found), 1, figsize=size, squeeze=False, layout="tight")
    for axis, g in zip(axes[:, 0], found):
        axis.imshow(plt.imread(strip(g[0])))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"epsilon = {g[0]['epsilon']:g}", rotation=0, ha="right", va="center")
    figure.savefig(out / "epsilon-strips.png", dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="tight")
    for axis, column, title in zip(axes, ("CNN", "classifier_FID"), ("CNN accuracy", "classifier-FID")):
        means, spreads = zip(*(mean_and_spread([row[column] for row in g]) for g in found))
        axis.errorbar([f"{g[0]['epsilon']:g}" for g in found], means, spreads, fmt="o-", capsize=4)
        axis.set(xlabel="epsilon", ylabel=title, title=f"mean ± spread, {min(map(len, found))} seeds")
    figure.savefig(out / "epsilon-quality.png", dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")        # one line, exit code 2
    p.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments, with commas between")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...")
    p.add_argument("--scale", choices=tuple(SCALES), default="laptop",
                   help="gpu means B = 4096, K = 4, 300 steps, 10,000 images")
    p.add_argument("--images", type=int, default=None,
                   help="number of samples of each run (default: 500, or 10,000 with --scale gpu)")
    p.add_argument("--sample-steps", type=int, default=15, help="DDIM steps for the samples")
    p.add_argument("--epochs", type=int, default=20, help="epochs of the CNN that is trained on the samples")
    p.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--csv", nargs="+", type=Path, default=[ROOT / "benchmarks" / "ablations.csv"],
                   help="file of the rows")
    p.add_argument("--table", action="store_true", help="print the rows as Markdown, and run nothing")
    p.add_argument("--plots", action="store_true",
                   help="draw assets/epsilon-strips.png and epsilon-quality.png, and run nothing")
    a = p.parse_args()
    only, look = a.only.split(","), a.table or a.plots
    images = IMAGES[a.scale] if a.images is None else a.images
    evaluation = dict(scale=a.scale, images=images, sample_steps=a.sample_steps, epochs=a.epochs)
    try:
        rows = [row for path in a.csv for row in read(path)]
        rows = [row for i, row in enumerate(rows) if not any(same(row, other) for other in rows[:i])]
        if not set(only) <= set(EXPERIMENTS):
            raise ValueError(f"--only {a.only}: expected some of {','.join(EXPERIMENTS)}")
        if min(a.seeds, a.epochs) < 1 or not a.minutes > 0 or images < 10 or not 1 <= a.sample_steps <= 1000:
            raise ValueError("expected --seeds and --epochs >= 1, --minutes above 0, --images >= 10, "
                             "--sample-steps 1 to 1000")
        if not look and len(a.csv) > 1:
            raise ValueError("several --csv: expected only with --table or --plots; name one file for runs")
        if look and not rows:
            raise ValueError(f"no rows in {', '.join(map(str, a.csv))}; run it without --table and --plots")
        if a.table:
            print(table(rows))
        if a.plots:
            plots(rows, evaluation, ROOT / "assets")
        if not look:
            print("NOT PRIVATE: these runs have seeds, so anyone can repeat them with their noise. No "
                  "guarantee covers a comparison of settings on private images.\n"
                  f"rows: {a.csv[0]}", flush=True)
            checkpoint.try_writing(a.csv[0].resolve().parent)
            names = [name for name in EXPERIMENTS if name in only]
            todo = lambda rows: grid(names, a.seeds, evaluation, rows)
            lock = a.csv[0].with_name(f".{a.csv[0].name}.in-use")       # two processes would lose rows
            with checkpoint.alone(lock):
                work(a.csv[0], todo, real_runner(devices.pick(a.device)), a.minutes)
    except (ValueError, OSError) as e:
        p.error(str(e))
    except KeyboardInterrupt:
        p.exit(130, "\nstopped; the unfinished run is lost, and the same command continues\n")


if __name__ == "__main__":
    main()
