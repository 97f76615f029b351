"""train.py -- the paper's algorithm, once: public base, private low-rank adapters, a stated (epsilon, delta).

  $ python train.py                       # private fine-tuning: 60,000 MNIST images at epsilon = 10
  $ python train.py --epsilon 1 --out runs/mnist-eps1

The public base comes from pretrain.py. Read top to bottom: settings -> private plan -> the private loop -> the statement.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import os
import sys
import threading
from pathlib import Path

import torch
from torch.func import functional_call
from tqdm import tqdm

import accountant
import checkpoint
import data
import ddpm
import distributed
import dpsgd
import draws
import lora
import presets
import sample
import screen
import statement

# -----------------------------------------------------------------------------
# 1. settings: each field is a flag; beside it what it means, with symbol and unit, and which values do


def field(default, help, valid=lambda value: True, expected=""):
    return dataclasses.field(default=default, metadata=dict(help=help, valid=valid, expected=expected))


POSITIVE = (lambda value: 0 < value < math.inf, "a number above 0")
COUNT = (lambda value: value >= 1, "a whole number, at least 1")
SHARE = (lambda value: 0 <= value < 1, "at least 0 and below 1")
SEED = (lambda value: value is None or 0 <= value < 2**32, "0 to 2^32 - 1")
PRESET = (f"the paper's settings: {', '.join(presets.PRESETS)}; other flags win over them",
          lambda name: not name or name in presets.PRESETS, f"one of {', '.join(presets.PRESETS)}")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Settings of the private stage. No value may be computed from the private images."""
    preset: str = field("", *PRESET)
    data: str = field("mnist", "private images: " + ", ".join(data.KNOWN) 
                      + ", folder:PATH or npz:FILE", data.is_name,
                      f"one of {', '.join(data.KNOWN)}, folder:PATH or npz:FILE")
    classes: str = field("", "declared names of the classes of folder: and npz:, with commas "
                         "(default: those of the base)")
    data_dir: str = field("", "where their files are (default: the repository's own MNIST; else ./datasets)")
    size: int = field(32, "side in pixels that the images of folder: and npz: are resized and cropped to",
                      lambda n: n >= 8, "at least 8")
    base: str = field("assets/base.pt", "the public base model")
    out: str = field("runs/mnist", "folder of this run")
    # privacy: all public constants
    epsilon: float = field(10.0, "privacy budget epsilon, no unit; inf: no privacy, a baseline",
                           lambda e: e > 0, "a number above 0, or inf for a run without privacy")
    accountant: str = field("rdp", "which bound the noise is made for: rdp, or the tighter pld; both are stated",
                            lambda name: name in ("rdp", "pld"), "rdp or pld")
    delta: float = field(1e-5, "delta, a probability below 1/N", lambda d: 0 < d < 1, "a number above 0 and below 1/N")
    N: int = field(0, "declared number of private images (0: the data set's published size; needed for folder:)",
                   lambda n: n >= 0, "the declared number of private images")
    B: int = field(512, "expected batch size, images; sampling rate q = B/N", *COUNT)
    steps: int = field(110, "T, optimiser steps, one use of the private data each", *COUNT)
    C: float = field(0.003, "clipping norm of one image's gradient, in gradient units",
                     lambda c: dpsgd.SMALLEST_C <= c <= 1e30 or c == math.inf,
                     "a norm above 0, 1e-40 to 1e30")
    K: int = field(2, "noise multiplicity: draws of (t, noise) averaged inside one image's loss", *COUNT)
    timesteps: str = field("uniform", "how t is drawn: uniform (paper), or middle: more often where shape is decided",
                           lambda how: how in ddpm.TIMESTEPS, " or ".join(ddpm.TIMESTEPS))
    weighting: str = field("flat", "how an image's K draws count: flat (paper), or even: weighted by t so that none outvotes the rest",
                           lambda how: how in ddpm.WEIGHTINGS, " or ".join(ddpm.WEIGHTINGS))
    # what is trained
    train: str = field("lora", "lora (paper), lora+embed, lora+conv, attention (DP-LDM) or full",
                       lambda what: what in lora.WHAT, f"one of {', '.join(lora.WHAT)}")
    rank: int = field(16, "LoRA rank r", *COUNT)
    lora_alpha: float = field(16.0, "scale of the update, which is (lora_alpha / r) B A", *POSITIVE)
    # optimisation
    lr: float = field(2e-2, "learning rate eta of Adam at the first step, falling linearly to 0", *POSITIVE)
    ema: float = field(0.95, "decay of the adapter's running average, per step", *SHARE)
    drop: float = field(0.1, "share of labels replaced by the null class, for guidance", *SHARE)
    # run
    guidance: float = field(0.5, "guidance w of the sample grid and of sample.py's default",
                            lambda w: 0 <= w < math.inf, "a number >= 0")
    sample_steps: int = field(50, "DDIM steps of the pictures, and sample.py's default",
                              lambda n: 1 <= n <= ddpm.LINEAR.T, f"1 to {ddpm.LINEAR.T}")
    chunk: int = field(256, "images times draws per backward pass: memory only, the result is the same", *COUNT)
    device: str = field("auto", "auto, cuda, mps or cpu")
    seed: int | None = field(None, "reproducible and therefore NOT private (default: randomness of the operating system)", *SEED)
    peek: int = field(0, "steps between strips of samples in the run's folder (post-processing, free); 0: none",
                      lambda n: n >= 0, "0 or more")
    save_every: int = field(25, "steps between checkpoints", *COUNT)
    resume: bool = field(False, "go on from the checkpoint in --out")


def check(s):
    """Refuse what has no meaning, in one line that says what was got and what was expected; fill in the declared N."""
    def refuse(name: str, expected: str):
        raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected {expected}")
    for f in dataclasses.fields(s):
        if not f.metadata["valid"](getattr(s, f.name)):
            refuse(f.name, f.metadata["expected"])
    s = dataclasses.replace(s, N=s.N or data.KNOWN.get(s.data, (0,))[0])
    if s.N < 1:
        refuse("N", "the declared number of private images of folder: or npz:, at least 1")
    if s.B > s.N:
        refuse("B", f"at most N = {s.N}: the sampling rate is q = B/N")
    if s.delta < accountant.LEAST_DELTA:
        refuse("delta", f"at least {accountant.LEAST_DELTA:g}, what float64 can count with, and below 1/N")
    if s.delta >= 1 / s.N:
        refuse("delta", f"below 1/N = {1 / s.N:.3g}")
    if s.C == math.inf and s.epsilon < math.inf:
        refuse("C", "a finite norm: without clipping there is no guarantee (with --epsilon inf it may be inf)")
    return s


# -----------------------------------------------------------------------------
# 2. private fine-tuning                                                        [DP-LoRA Alg. 1]


def noised(images: torch.Tensor, labels: torch.Tensor, key: torch.Tensor, step: int, classes: int | None,
           s: Finetune) -> tuple[torch.Tensor, ...]:
    """(x0, labels, t, noise): a lot's images and K draws of each, functions of (key, step, the image) alone.

    So one image moves the sum by at most C even for someone who knows all draws: they need not be secret.
    Shapes: images (n, C, H, W) uint8, labels (n,) -> (n, C, H, W), (n,), (n, K), (n, K, C, H, W)
    """
    u, noise, drop = draws.t_noise_and_drop(draws.streams(key, step, images), s.K, images.shape[1:])
    if classes is not None:
        labels = labels.masked_fill(drop < s.drop, classes)              # the null class, for guidance
    return data.to_float(images), labels, ddpm.t_of(u, s.timesteps), noise


def private_gradients(model: ddpm.UNet, frozen: dict, s: Finetune):
    """per_sample(trainable, x0, labels, t, noise) -> one gradient per image, for dpsgd.private_gradient."""
    def losses(params, x0, labels, t, noise):
        def network(*args):
            return functional_call(model, (params, frozen), args)
        with ddpm.autocast(x0.device):
            return ddpm.loss(network, x0, labels, t, noise, weighting=s.weighting)    # (n,): mean of K draws

    def one_loss(params, *example):
        return losses(params, *(e[None] for e in example))[0]
    if s.train in lora.TARGETS:
        return functools.partial(dpsgd.per_sample_grads_by_copies, losses)
    return functools.partial(dpsgd.per_sample_grads, one_loss)


def finetune(s: Finetune) -> None:
    """Private images: the paper's algorithm. The comments (i) .. (vi) are its lines."""
    out, (rank, ranks, device) = Path(s.out), distributed.start(sample.pick_device(s.device))
    say = print if rank == 0 else lambda *_: None
    if s.seed is not None:
        torch.manual_seed(s.seed)                                        # of the factors A, the only global randomness
    model = ddpm.load_unet(Path(s.base))
    base = checkpoint.fingerprint(*model.state_dict().values())          # a name is not enough: files change
    adapted = lora.attach(model, lora.describe(s.train, s.rank, s.lora_alpha, model.classes is not None))
    model.to(device)
    trainable, frozen = lora.split(model)                                # all that private data can touch, and the rest

    # the plan: every constant is public and fixed before the first private image is read
    q = s.B / s.N
    sigma = accountant.calibrate(s.epsilon, s.delta, q, s.steps, s.accountant) if s.epsilon < math.inf else 0.0
    say(statement.plan(s, sigma, sum(p.numel() for p in trainable.values()), sum(p.numel() for p in model.parameters())))
    say(f"          {s.train}: {adapted} layers adapted; {ranks} x {device.type}")
    declared = declared_classes(s, model)
    if s.data not in data.KNOWN and declared:
        say("          declared classes, and the base's: " + data.table(**declared))
    images, labels = private_images(s, model)
    mechanism = dict(dataclasses.asdict(s), resume=True, out="", ranks=ranks, sigma=sigma,
                     base=base, private_images=checkpoint.fingerprint(images, labels))
    if rank == 0:
        prepare_folder(out, s.resume)
    images, labels = images[rank::ranks].to(device), labels[rank::ranks].to(device)           # this rank's own share

    secret = dpsgd.os_generator(None if s.seed is None else s.seed + rank)       # lots and privacy noise
    key = int.from_bytes(os.urandom(8), "little", signed=True) if s.seed is None else s.seed
    key = torch.tensor(key, device=device)                       # of t, noise, dropped labels: not secret
    distributed.same_everywhere({**trainable, "key": key})
    optimizer = torch.optim.Adam(trainable.values(), lr=s.lr)
    average = ddpm.EMA(trainable, s.ema)
    done, metrics = 0, []
    if s.resume:
        state = checkpoint.load(out / "checkpoint.pt", mechanism)
        done, metrics = checkpoint.restore(state, trainable, average, optimizer, [secret], rank, key)

    per_sample = private_gradients(model, frozen, s)
    stop = checkpoint.stop_cleanly() if ranks == 1 else threading.Event()
    for step in (bar := tqdm(range(done + 1, s.steps + 1), initial=done, total=s.steps, desc="private",
                            disable=screen.hide_bar(rank == 0))):
        lot = dpsgd.poisson_sample(len(images), q, secret).to(device)    # (i)   random size, 0 is legal
        examples = noised(images[lot], labels[lot], key, step, model.classes, s)     # K draws of (t, noise)
        gradient = dpsgd.private_gradient(                               # (ii)  one gradient per image,
            per_sample, trainable, examples,                             # (iii) clipped to C, summed,
            C=s.C, sigma=sigma, B=s.B, generator=secret,                 # (iv)  + noise once,
            chunk=max(1, s.chunk // s.K))                                # (v)   / B
        for name, p in trainable.items():
            p.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = s.lr * (1 - (step - 1) / s.steps)
        optimizer.step()                                                 # (vi)  post-processing: free
        average.update(trainable)
        spent, order = accountant.epsilon(q, sigma, step, s.delta)       # of the steps that ran
        metrics.append([step, spent, order])
        bar.set_postfix(epsilon_rdp=f"{spent:.3f}")
        peek = s.peek > 0 and step % s.peek == 0
        if peek or step % s.save_every == 0 or step == s.steps or stop.is_set():
            generators = distributed.states([secret])
            if rank == 0:
                state = checkpoint.snapshot(mechanism, step, metrics, trainable, average, optimizer,
                                            generators, key)
                checkpoint.save(out / "checkpoint.pt", state)
        if peek and rank == 0:                                   # after the save: no step is shown twice
            with average.applied(trainable):
                strip = out / f"peek-{step:05d}.png"
                sample.class_strip(strip, model, images.shape[1:], s.sample_steps, s.guidance, declared.get("labels"))
        if stop.is_set() and step < s.steps:
            sys.exit(f"stopped after step {step} of {s.steps}, epsilon spent so far {spent:.4f}; go on with --resume")
    if rank == 0:
        with average.applied(trainable):                                 # the average is what is published
            report(s, sigma, metrics, model, trainable, images.shape[1:], base)
    distributed.stop()


# -----------------------------------------------------------------------------
# 3. the run's folder


def declared_classes(s: Finetune, model: ddpm.UNet) -> dict:
    """classes: the declared names; labels: which class of the base each is. No image is read. {}: no classes."""
    if model.classes is None:
        return {}
    names = data.declared(s.data, s.classes, model.config["names"])
    labels = data.place(names, model.config["names"], model.classes)
    return dict(classes=names or [str(i) for i in labels], labels=labels)


def private_images(s: Finetune, model: ddpm.UNet) -> tuple[torch.Tensor, torch.Tensor]:
    """The private images and their labels, in the base's numbers. A class is found by its declared name: the order
    of the sub-folders that exist would move with one image.
    """
    declared = declared_classes(s, model)
    images, labels = data.load(s.data, "train", s.data_dir or None, s.size, declared.get("classes"),
                               model.config["image_channels"])
    if declared:
        places = torch.tensor(declared["labels"])
        known = (labels >= 0) & (labels < len(places))                   # an image whose label is not declared
        images, labels = images[known], places[labels[known]]            # counts as no image: refusing would tell
    fits(model, images, labels, s)
    return images, labels


def fits(model: ddpm.UNet, images: torch.Tensor, labels: torch.Tensor, s) -> None:
    """Refuse images that the network cannot take."""
    channels, classes, side = model.config["image_channels"], model.classes, images.shape[-1]
    step = model.patch * 2 ** (len(model.config["multipliers"]) - 1)
    if images.shape[1] != channels or side % step:
        raise ValueError(f"--data {s.data} has {images.shape[1]} channels and side {side}; expected "
                         f"{channels} channels and a side that {step} divides: use another base")
    if classes is not None and len(labels) and labels.max() >= classes:
        raise ValueError(f"--data {s.data} has labels up to {int(labels.max())}; expected labels below "
                         f"{classes}: use another base")


def prepare_folder(out: Path, resume: bool) -> None:
    """Make the run's folder; refuse to write over another run."""
    if resume:
        return
    mine = [name for name in ("privacy.json", "checkpoint.pt", "adapter_model.bin", "config.json") if (out / name).exists()]
    mine += sorted(strip.name for strip in out.glob("peek-*.png"))       # of a killed run: they count
    if mine:
        can_go_on = "checkpoint.pt" in mine and "privacy.json" not in mine
        hint = "--resume goes on with it, or choose" if can_go_on else "choose"
        raise ValueError(f"{out} already holds a run ({', '.join(mine)}); nothing was overwritten; {hint} another --out")
    checkpoint.try_writing(out)


def report(s: Finetune, sigma: float, metrics: list, model: ddpm.UNet, trainable: dict, shape: tuple,
           base: str) -> None:
    """Write the run's folder and say the statement on the screen."""
    out, facts = Path(s.out), statement.after(s, sigma, len(metrics))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["step", "epsilon_rdp", "best_order"], *metrics])
    checkpoint.write_text(out / "metrics.csv", table.getvalue())
    declared = declared_classes(s, model)
    config = dict(dataclasses.asdict(s), side=shape[-1], base_sha256=base) | declared
    checkpoint.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    lora.save(out, trainable, lora.describe(s.train, s.rank, s.lora_alpha, model.classes is not None))
    sample.before_and_after(out / "samples.png", ddpm.load_unet(Path(s.base)), model, shape, s.sample_steps,
                            s.guidance, declared.get("labels"))
    checkpoint.write_text(out / "privacy.json", json.dumps(facts, indent=2) + "\n")
    (out / "checkpoint.pt").unlink()                                     # and with it the state that made the noise

    print(f"\n{out}/: samples.png (public before | private after), adapter_model.bin, privacy.json, config.json, metrics.csv")
    print(statement.text(facts))
    print(f"next: python sample.py {out} --n 100 --out grid.png")


# -----------------------------------------------------------------------------
# 4. the command line


def parse(stage: type, argv: list[str]):
    """One flag per field of `stage`; --help prints them with their defaults."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")       # one line, exit code 2
    for f in dataclasses.fields(stage):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type if f.type in (int, float, str) else int)
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    chosen = presets.PRESETS.get(parser.parse_known_args(argv)[0].preset)
    if chosen:
        parser.set_defaults(**chosen[1])
    return parser, stage(**vars(parser.parse_args(argv)))


def main() -> None:
    parser, s = parse(Finetune, sys.argv[1:])
    with screen.one_line(parser.prog, "lower --chunk, which changes no result (a stopped run: with --resume)"):
        try:
            s = check(s)
            # two runs in one folder: the statement of one beside the adapter of the other
            lock = checkpoint.alone(Path(s.out) / ".in-use")
            with lock if distributed.first() else contextlib.nullcontext():
                finetune(s)
        except ConnectionError:                                  # no other error is another rank's fault
            distributed.lost()


if __name__ == "__main__":
    main()
