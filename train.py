"""train.py -- the paper's algorithm, once: public base, private low-rank adapters, a stated (epsilon, delta).

  $ python train.py                       # private fine-tuning: 60,000 MNIST images at epsilon = 10
  $ python train.py --epsilon 1 --out runs/mnist-eps1
  $ python train.py pretrain              # makes the public base (assets/base.pt) again, as runs/base.pt

Read top to bottom: settings -> public pre-training -> private plan -> the private loop -> the statement.
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import sys
import threading
import time
from pathlib import Path

import torch
from torch.func import functional_call
from tqdm import tqdm

import accountant
import checkpoint
import clothes
import data
import ddpm
import distributed
import dpsgd
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
DRAWN = {"glyphs": data.glyphs, "clothes": clothes.clothes}      # public images that code draws
PRESET = (f"the paper's settings: {', '.join(presets.PRESETS)}; other flags win over them",
          lambda name: not name or name in presets.PRESETS, f"one of {', '.join(presets.PRESETS)}")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Settings of the public stage."""
    preset: str = field("", *PRESET)
    data: str = field("glyphs", "public images: glyphs or clothes (drawn by code), or a data set that is public for you, named as "
                      "in finetuning", lambda name: name in DRAWN or data.is_name(name),
                      "glyphs, clothes or a data set")
    data_dir: str = field("", "where their files are")
    size: int = field(32, "side in pixels of the images of folder:", lambda n: n >= 8, "at least 8")
    base: str = field("", "a public base to go on from (default: random weights)")
    steps: int = field(30_000, "optimiser steps", *COUNT)
    batch: int = field(128, "images per step", *COUNT)
    lr: float = field(1e-3, "peak learning rate of Adam (one cycle)", *POSITIVE)
    ema: float = field(0.999, "decay of the running average that is saved, per step", *SHARE)
    drop: float = field(0.1, "share of labels replaced by the null class, for guidance", *SHARE)
    seed: int = field(0, "public data, public seed", *SEED)
    device: str = field("auto", "auto, cuda, mps or cpu")
    out: str = field("runs/base.pt", "where the base model goes; a file that exists is never overwritten")


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
    C: float = field(0.003, "clipping norm of one image's gradient, in gradient units", lambda c: c > 0, "a norm above 0")
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
    if isinstance(s, Pretrain):
        return s
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
# 2. public pre-training: the ordinary DDPM loop on images that nobody owns     [DDPM Alg. 1]


def pretrain(s: Pretrain) -> None:
    device, out = sample.pick_device(s.device), Path(s.out)
    if out.exists():
        raise ValueError(f"--out {out} exists; nothing was overwritten; choose another --out or move it away")
    torch.manual_seed(s.seed)
    generator = torch.Generator().manual_seed(s.seed)
    model = (ddpm.load_unet(Path(s.base)) if s.base else ddpm.UNet(**(presets.PRESETS[s.preset][0] if s.preset else {}))).to(device)
    draw = DRAWN.get(s.data)
    images, classes = draw(1) if draw else data.load(s.data, "train", s.data_dir or None, s.size,
                                                     channels=model.config["image_channels"])
    if model.classes is not None:
        model.config["names"] = data.class_names(s.data)
    fits(model, images, classes, s)
    checkpoint.try_writing(out.parent)
    params = dict(model.named_parameters())
    average = ddpm.EMA(params, s.ema)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, s.steps, pct_start=0.05 + 1e-9)   # + : 20 steps divide by 0
    print(f"pre-training on {device}: {sum(p.numel() for p in params.values()):,} weights; {s}")
    mean, start = None, time.time()
    for step in (bar := tqdm(range(1, s.steps + 1), desc="public", disable=screen.hide_bar())):
        if draw:
            x0, labels = draw(s.batch, generator)
        else:
            pick = torch.randint(len(images), (s.batch,), generator=generator)
            x0, labels = data.to_float(images[pick]), classes[pick]
        if model.classes is not None:
            labels[torch.rand(s.batch, generator=generator) < s.drop] = model.classes
        t, noise = ddpm.draw_t_and_noise(x0, 1, generator)
        with ddpm.autocast(device):
            loss = ddpm.loss(model, x0.to(device), labels.to(device), t.to(device), noise.to(device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(params)
        if step % 500 == 0 or step == s.steps:
            mean = loss.item() if mean is None else 0.8 * mean + 0.2 * loss.item()
            bar.set_postfix(loss=f"{mean:.4f}")
            ddpm.save_unet(out, model, average.shadow)
    print(f"wrote {out}: {s.steps} steps of {s.batch}, {(time.time() - start) / 60:.0f} minutes")


# -----------------------------------------------------------------------------
# 3. private fine-tuning                                                        [DP-LoRA Alg. 1]


def private_gradients(model: ddpm.UNet, frozen: dict, s: Finetune, draws: torch.Generator):
    """per_sample(trainable, images, labels) -> one gradient per image, ready for dpsgd.private_gradient."""
    def losses(copies, x0, labels, t, noise):
        call = lambda *args: functional_call(model, (copies, frozen), args)
        with ddpm.autocast(x0.device):
            return ddpm.loss(call, x0, labels, t, noise, weighting=s.weighting)  # (n,): the K draws of an image are averaged here

    def per_sample(trainable, images, labels):
        x0 = data.to_float(images)
        t, noise = ddpm.draw_t_and_noise(x0, s.K, draws, timesteps=s.timesteps)
        if model.classes is not None:
            drop = torch.rand(len(labels), generator=draws, device=labels.device) < s.drop
            labels = labels.masked_fill(drop, model.classes)
        if s.train in lora.TARGETS:
            return dpsgd.per_sample_grads_by_copies(losses, trainable, x0, labels, t, noise)
        one = lambda params, *example: losses(params, *(e[None] for e in example))[0]
        return dpsgd.per_sample_grads(one, trainable, x0, labels, t, noise)
    return per_sample


def finetune(s: Finetune) -> None:
    """Private images: the paper's algorithm. The comments (i) .. (vi) are its lines."""
    out, (rank, ranks, device) = Path(s.out), distributed.start(sample.pick_device(s.device))
    say = print if rank == 0 else lambda *_: None
    if s.seed is not None:
        torch.manual_seed(s.seed)                                        # of the factors A, the only global randomness
    model = ddpm.load_unet(Path(s.base))
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
                     base=checkpoint.fingerprint(*frozen.values()), private_images=checkpoint.fingerprint(images, labels))
    if rank == 0:
        prepare_folder(out, s.resume)
    images, labels = images[rank::ranks].to(device), labels[rank::ranks].to(device)           # this rank's own share

    secret = dpsgd.os_generator(None if s.seed is None else s.seed + 2 * rank)                # lots and privacy noise
    draws = torch.Generator(device)                                      # t, diffusion noise, dropped labels: need not be secret
    draws.manual_seed(s.seed + 2 * rank + 1) if s.seed is not None else draws.seed()
    distributed.same_everywhere(trainable)
    optimizer = torch.optim.Adam(trainable.values(), lr=s.lr)
    average = ddpm.EMA(trainable, s.ema)
    done, metrics = 0, []
    if s.resume:
        done, metrics = checkpoint.restore(checkpoint.load(out / "checkpoint.pt", mechanism), trainable, average, optimizer,
                                           [secret, draws], rank)

    per_sample = private_gradients(model, frozen, s, draws)
    stop = checkpoint.stop_cleanly() if ranks == 1 else threading.Event()
    for step in (bar := tqdm(range(done + 1, s.steps + 1), initial=done, total=s.steps, desc="private",
                            disable=screen.hide_bar(rank == 0))):
        lot = dpsgd.poisson_sample(len(images), q, secret).to(device)                             # (i)   random size, 0 is legal
        gradient = dpsgd.private_gradient(per_sample, trainable, (images[lot], labels[lot]),      # (ii)  one gradient per image,
                                          C=s.C, sigma=sigma, B=s.B, generator=secret,            # (iii) clipped to C, summed,
                                          chunk=max(1, s.chunk // s.K))                           # (iv)  + noise once, (v) / B
        for name, p in trainable.items():
            p.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = s.lr * (1 - (step - 1) / s.steps)
        optimizer.step()                                                                          # (vi)  post-processing: free
        average.update(trainable)
        spent, order = accountant.epsilon(q, sigma, step, s.delta)                                # of the steps that ran
        metrics.append([step, spent, order])
        bar.set_postfix(epsilon_rdp=f"{spent:.3f}")
        if s.peek and step % s.peek == 0 and rank == 0:
            with average.applied(trainable):
                sample.class_strip(out / f"peek-{step:05d}.png", model, images.shape[1:], s.sample_steps,
                                   s.guidance, declared.get("labels"))
        if step % s.save_every == 0 or step == s.steps or stop.is_set():
            generators = distributed.states([secret, draws])
            if rank == 0:
                checkpoint.save(out / "checkpoint.pt", checkpoint.snapshot(mechanism, step, metrics, trainable, average, optimizer,
                                                                           generators))
        if stop.is_set() and step < s.steps:
            sys.exit(f"stopped after step {step} of {s.steps}, epsilon spent so far {spent:.4f}; go on with --resume")
    if rank == 0:
        with average.applied(trainable):                                 # the average is what is published
            report(s, sigma, metrics, model, trainable, images.shape[1:])
    distributed.stop()


# -----------------------------------------------------------------------------
# 4. the run's folder


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
    fits(model, images, labels, s)
    if not declared:
        return images, labels
    places = torch.tensor(declared["labels"])
    if labels.max() >= len(places):
        raise ValueError(f"--data {s.data} has labels up to {int(labels.max())}, "
                         f"expected them below {len(places)}, the number of declared classes")
    return images, places[labels]


def fits(model: ddpm.UNet, images: torch.Tensor, labels: torch.Tensor, s) -> None:
    """Refuse images that the network cannot take."""
    channels, classes, side = model.config["image_channels"], model.classes, images.shape[-1]
    step = model.patch * 2 ** (len(model.config["multipliers"]) - 1)
    if images.shape[1] != channels or (classes and labels.max() >= classes) or side % step:
        raise ValueError(f"--data {s.data} has {images.shape[1]} channels, side {side} and labels up to {int(labels.max())}; "
                         f"expected {channels} channels, a side that {step} divides and labels below {classes}: use another base")


def prepare_folder(out: Path, resume: bool) -> None:
    """Make the run's folder; refuse to write over another run."""
    if resume:
        return
    mine = [name for name in ("privacy.json", "checkpoint.pt", "adapter_model.bin", "config.json") if (out / name).exists()]
    if mine:
        hint = "--resume goes on with it, or choose" if mine == ["checkpoint.pt"] else "choose"
        raise ValueError(f"{out} already holds a run ({', '.join(mine)}); nothing was overwritten; {hint} another --out")
    checkpoint.try_writing(out)


def report(s: Finetune, sigma: float, metrics: list, model: ddpm.UNet, trainable: dict, shape: tuple) -> None:
    """Write the run's folder and say the statement on the screen."""
    out, facts = Path(s.out), statement.after(s, sigma, len(metrics))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["step", "epsilon_rdp", "best_order"], *metrics])
    checkpoint.write_text(out / "metrics.csv", table.getvalue())
    declared = declared_classes(s, model)
    config = dict(dataclasses.asdict(s), side=shape[-1]) | declared
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
# 5. the command line


def parse(stage: type, argv: list[str]):
    """One flag per field of `stage`; --help prints them with their defaults."""
    parser = argparse.ArgumentParser(prog="train.py" + (" pretrain" if stage is Pretrain else ""),
                                     description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")       # one line, exit code 2
    for f in dataclasses.fields(stage):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type if f.type in (int, float, str) else int)
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    chosen = presets.PRESETS.get(parser.parse_known_args(argv)[0].preset)
    if chosen and stage is Finetune:
        parser.set_defaults(**chosen[1])
    return parser, stage(**vars(parser.parse_args(argv)))


def main() -> None:
    argv = sys.argv[1:]
    stage = Pretrain if argv[:1] == ["pretrain"] else Finetune
    parser, s = parse(stage, argv[1:] if stage is Pretrain else argv)
    with screen.one_line(parser.prog, "lower --batch" if stage is Pretrain else
                         "lower --chunk, which changes no result (a stopped run: with --resume)"):
        try:
            s = check(s)
            if stage is Pretrain:
                return pretrain(s)
            # two runs in one folder: the statement of one beside the adapter of the other
            lock = checkpoint.alone(Path(s.out) / ".in-use")
            with lock if distributed.first() else contextlib.nullcontext():
                finetune(s)
        except RuntimeError as e:
            if not torch.distributed.is_initialized() or screen.out_of_memory(e):
                raise
            distributed.lost()                                           # an all-reduce that nobody answered


if __name__ == "__main__":
    main()
