"""train.py -- the paper's algorithm, once: public base, private low-rank adapters, a stated (epsilon, delta).

  $ python train.py                       # private fine-tuning: 60,000 MNIST images at epsilon = 10
  $ python train.py --epsilon 1 --out runs/mnist-eps1
  $ python train.py pretrain              # makes the public base again (assets/base.pt)

Read top to bottom: settings -> public pre-training -> private plan -> the private loop -> the statement.
"""
import argparse
import csv
import dataclasses
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.func import functional_call
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import accountant
import checkpoint
import data
import ddpm
import dpsgd
import lora
import sample

# -----------------------------------------------------------------------------
# 1. settings: each field is a flag; its help gives symbol and unit


def field(default, help):
    return dataclasses.field(default=default, metadata=dict(help=help))


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Settings of the public stage."""
    steps: int = field(30_000, "optimiser steps")
    batch: int = field(128, "images per step")
    lr: float = field(1e-3, "peak learning rate of Adam (one cycle)")
    ema: float = field(0.999, "decay of the running average that is saved, per step")
    drop: float = field(0.1, "share of labels replaced by the null class, for guidance")
    seed: int = field(0, "public data, public seed")
    device: str = field("auto", "auto, cuda, mps or cpu")
    out: str = field("assets/base.pt", "where the base model goes")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Settings of the private stage. No default was, and no value may be, computed from the private images."""
    data: str = field("mnist", "private images: " + ", ".join(data.KNOWN) + " or folder:PATH")
    size: int = field(32, "side in pixels that the images of folder: are resized and cropped to")
    data_dir: str = field("", "where their files are (default: the repository's own MNIST; else ./datasets)")
    base: str = field("assets/base.pt", "the public base model")
    out: str = field("runs/mnist", "folder of this run")
    # privacy: all public constants
    epsilon: float = field(10.0, "privacy budget epsilon, no unit; inf: no privacy, a baseline")
    delta: float = field(1e-5, "delta, a probability; must be below 1/N")
    N: int = field(0, "declared number of private images (default: the data set's published size; needed for folder:)")
    B: int = field(512, "expected batch size, images; sampling rate q = B/N")
    steps: int = field(300, "T, optimiser steps, one use of the private data each")
    C: float = field(0.01, "clipping norm of one image's gradient, in gradient units")
    K: int = field(1, "noise multiplicity: draws of (t, noise) averaged inside one image's loss")
    # what is trained
    train: str = field("lora", "lora (paper), lora+conv, attention (DP-LDM) or full")
    rank: int = field(16, "LoRA rank r")
    lora_alpha: float = field(16.0, "scale of the update, which is (lora_alpha / r) B A")
    # optimisation
    lr: float = field(1e-2, "learning rate eta of Adam at the first step, falling linearly to 0")
    ema: float = field(0.95, "decay of the adapter's running average, per step")
    drop: float = field(0.1, "share of labels replaced by the null class, for guidance")
    # run
    guidance: float = field(1.0, "guidance w of the sample grid and of sample.py's default")
    chunk: int = field(256, "images per backward pass: memory only, the result is the same")
    device: str = field("auto", "auto, cuda, mps or cpu")
    seed: int | None = field(None, "reproducible and therefore NOT private (default: randomness of the operating system)")
    save_every: int = field(25, "steps between checkpoints")
    resume: bool = field(False, "go on from the checkpoint in --out")


def check(s: Finetune) -> Finetune:
    """Refuse what has no meaning, in one line that says what was got and expected; fill in the declared N."""
    if not s.data.startswith("folder:") and s.data not in data.KNOWN:
        raise ValueError(f"--data {s.data}: expected one of {', '.join(data.KNOWN)} or folder:PATH")
    N = s.N or (data.KNOWN[s.data][0] if s.data in data.KNOWN else 0)
    rules = [(N >= 1, f"--N {s.N}: expected the declared number of private images, at least 1"),
             (1 <= s.B <= N, f"--B {s.B}: expected 1 to N = {N} (the sampling rate q = B/N is at most 1)"),
             (s.epsilon > 0, f"--epsilon {s.epsilon}: expected a number > 0, or inf for a run without privacy"),
             (0 < s.delta < 1 / max(N, 1), f"--delta {s.delta}: expected above 0 and below 1/N = {1 / max(N, 1):.2e}"),
             (s.C > 0, f"--C {s.C}: expected a clipping norm > 0"),
             (s.C < math.inf or s.epsilon == math.inf, "--C inf: without clipping there is no guarantee; use --epsilon inf too"),
             (s.K >= 1, f"--K {s.K}: expected at least 1 draw per image"),
             (s.size >= 8, f"--size {s.size}: expected at least 8 pixels"),
             (s.steps >= 1, f"--steps {s.steps}: expected at least 1"),
             (s.rank >= 1, f"--rank {s.rank}: expected at least 1"),
             (math.isfinite(s.lora_alpha) and s.lora_alpha > 0, f"--lora-alpha {s.lora_alpha}: expected a number > 0"),
             (math.isfinite(s.lr) and s.lr > 0, f"--lr {s.lr}: expected a number > 0"),
             (0 <= s.ema < 1, f"--ema {s.ema}: expected at least 0 and below 1"),
             (0 <= s.drop < 1, f"--drop {s.drop}: expected at least 0 and below 1"),
             (math.isfinite(s.guidance) and s.guidance >= 0, f"--guidance {s.guidance}: expected a number >= 0"),
             (s.chunk >= 1, f"--chunk {s.chunk}: expected at least 1"),
             (s.save_every >= 1, f"--save-every {s.save_every}: expected at least 1"),
             (s.seed is None or 0 <= s.seed < 2**32, f"--seed {s.seed}: expected 0 to 2^32 - 1")]
    for ok, message in rules:
        if not ok:
            raise ValueError(message)
    lora.describe(s.train, s.rank, s.lora_alpha, True)
    return dataclasses.replace(s, N=N)


# -----------------------------------------------------------------------------
# 2. public pre-training: the ordinary DDPM loop on images that nobody owns     [DDPM Alg. 1]


def pretrain(s: Pretrain) -> None:
    device = sample.pick_device(s.device)
    torch.manual_seed(s.seed)
    generator = torch.Generator().manual_seed(s.seed)
    model = ddpm.UNet().to(device)
    params = dict(model.named_parameters())
    average = ddpm.EMA(params, s.ema)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, s.steps, pct_start=0.05)
    print(f"pre-training on {device}: {sum(p.numel() for p in params.values()):,} weights, glyphs drawn by code, {s}")
    mean, start = None, time.time()
    for step in (bar := tqdm(range(1, s.steps + 1), desc="public")):
        x0, labels = data.glyphs(s.batch, generator)
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
            ddpm.save_unet(Path(s.out), model, average.shadow)
    print(f"wrote {s.out}: {s.steps} steps of {s.batch}, {(time.time() - start) / 60:.0f} minutes")


# -----------------------------------------------------------------------------
# 3. private fine-tuning                                                        [DP-LoRA Alg. 1]


def private_gradients(model: ddpm.UNet, frozen: dict, s: Finetune, draws: torch.Generator):
    """per_sample(trainable, images, labels) -> one gradient per image, ready for dpsgd.private_gradient."""
    def losses(copies, x0, labels, t, noise):
        call = lambda *args: functional_call(model, (copies, frozen), args)
        with ddpm.autocast(x0.device):
            return ddpm.loss(call, x0, labels, t, noise)                 # (n,): the K draws of an image are averaged here

    def per_sample(trainable, images, labels):
        x0 = data.to_float(images)
        t, noise = ddpm.draw_t_and_noise(x0, s.K, draws)
        if model.classes is not None:
            drop = torch.rand(len(labels), generator=draws, device=labels.device) < s.drop
            labels = labels.masked_fill(drop, model.classes)
        if s.train in ("lora", "lora+conv"):
            return dpsgd.per_sample_grads_by_copies(losses, trainable, x0, labels, t, noise)
        one = lambda params, *example: losses(params, *(e[None] for e in example))[0]
        return dpsgd.per_sample_grads(one, trainable, x0, labels, t, noise)
    return per_sample


def finetune(s: Finetune) -> None:
    """Private images: the paper's algorithm. The comments (i) .. (vi) are its lines."""
    out, device = Path(s.out), sample.pick_device(s.device)
    model = ddpm.load_unet(Path(s.base)).to(device)
    adapted = lora.attach(model, lora.describe(s.train, s.rank, s.lora_alpha, model.classes is not None))
    model.to(device)
    trainable, frozen = lora.split(model)                                # all that private data can touch, and the rest

    # the plan: every constant is public and fixed before the first private image is read
    q = s.B / s.N
    sigma = accountant.calibrate(s.epsilon, s.delta, q, s.steps) if s.epsilon < math.inf else 0.0
    print(plan(s, sigma, trainable, frozen, adapted, device))
    prepare_folder(out, s.resume)
    images, labels = data.load(s.data, "train", s.data_dir or None, s.size)
    if images.shape[1] != model.config["image_channels"] or (model.classes and labels.max() >= model.classes):
        raise ValueError(f"{s.base} draws {model.config['image_channels']}-channel images of {model.classes} classes; "
                         f"{s.data} has {images.shape[1]} channels and labels up to {int(labels.max())}; use another --base")
    images, labels = images.to(device), labels.to(device)

    secret = dpsgd.os_generator(s.seed)                                  # lots and privacy noise
    draws = torch.Generator(device)                                      # t, diffusion noise, dropped labels: need not be secret
    draws.manual_seed(s.seed) if s.seed is not None else draws.seed()
    optimizer = torch.optim.Adam(trainable.values(), lr=s.lr)
    average = ddpm.EMA(trainable, s.ema)
    done, metrics = 0, []
    mechanism = dict(dataclasses.asdict(s), resume=True, out="", sigma=sigma, base=checkpoint.fingerprint(*frozen.values()),
                     private_images=checkpoint.fingerprint(images, labels))
    if s.resume:
        done, metrics = checkpoint.restore(checkpoint.load(out / "checkpoint.pt", mechanism), trainable, average, optimizer,
                                           [secret, draws])

    per_sample = private_gradients(model, frozen, s, draws)
    rdp = accountant.rdp(q, sigma, accountant.ORDERS)                    # of one step
    stop = checkpoint.stop_cleanly()
    for step in (bar := tqdm(range(done + 1, s.steps + 1), initial=done, total=s.steps, desc="private")):
        lot = dpsgd.poisson_sample(len(images), q, secret).to(device)                             # (i)   random size, 0 is legal
        gradient = dpsgd.private_gradient(per_sample, trainable, (images[lot], labels[lot]),      # (ii)  one gradient per image,
                                          C=s.C, sigma=sigma, B=s.B, generator=secret,            # (iii) clipped to C, summed,
                                          chunk=s.chunk)                                          # (iv)  + noise once, (v) / B
        for name, p in trainable.items():
            p.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = s.lr * (1 - (step - 1) / s.steps)
        optimizer.step()                                                                          # (vi)  post-processing: free
        average.update(trainable)
        spent, order = accountant.to_epsilon(step * rdp, accountant.ORDERS, s.delta)              # the steps that ran
        metrics.append([step, spent, order])
        bar.set_postfix(epsilon=f"{spent:.3f}")
        if step % s.save_every == 0 or step == s.steps or stop.is_set():
            checkpoint.save(out / "checkpoint.pt", checkpoint.snapshot(mechanism, step, metrics, trainable, average, optimizer,
                                                                       [secret, draws]))
        if stop.is_set() and step < s.steps:
            sys.exit(f"stopped after step {step} of {s.steps}, epsilon spent so far {spent:.4f}; go on with --resume")
    with torch.no_grad():                                                # the average is what is published
        for name, p in trainable.items():
            p.copy_(average.shadow[name])
    report(s, sigma, metrics, model, trainable, images.shape[1:])


# -----------------------------------------------------------------------------
# 4. what was promised, what was spent


NOT_COVERED = [
    "a person with several images: the unit is ONE image",
    "choices made by looking at the private images before this run: hyper-parameters tuned on them, N, the data set itself",
    "figures computed from private images afterwards (accuracy, FID, nearest neighbours)",
    "floating-point attacks: the noise is float32, from torch's generator, which is not cryptographic",
    "anything that the public base model saw: it saw only images drawn by code",
]


def plan(s: Finetune, sigma: float, trainable: dict, frozen: dict, adapted: int, device) -> str:
    """Every public constant of the run, before it starts."""
    weights = sum(p.numel() for p in trainable.values())
    total = weights + sum(p.numel() for p in frozen.values())
    lines = [f"plan      {s.data}: N = {s.N:,} declared, B = {s.B:,}, q = B/N = {s.B / s.N:.5f}, T = {s.steps} steps",
             f"          epsilon <= {s.epsilon:g} at delta = {s.delta:g}  ->  sigma = {sigma:.4f}; C = {s.C:g}, K = {s.K}; "
             f"the noise on the mean gradient has norm {sigma * weights ** 0.5 / s.B:.2f} C",
             f"          training {weights:,} of {total:,} weights ({s.train}, {adapted} layers) on {device}"]
    if s.epsilon == math.inf:
        lines.append("NO PRIVACY: epsilon is infinite. This run is a baseline; its output says as much as its images do.")
    if s.seed is not None:
        lines.append("NOT PRIVATE: with --seed anyone can compute the noise; this run is reproducible, for tests and teaching.")
    return "\n".join(lines)


def prepare_folder(out: Path, resume: bool) -> None:
    """Make the run's folder; refuse to write over another run."""
    mine = [name for name in ("privacy.json", "checkpoint.pt", "adapter_model.bin", "config.json") if (out / name).exists()]
    if mine and not resume:
        hint = "--resume goes on with it, or choose" if mine == ["checkpoint.pt"] else "choose"
        raise ValueError(f"{out} already holds a run ({', '.join(mine)}); nothing was overwritten; {hint} another --out")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / ".writable", "")                         # an unwritable folder is better known now
    (out / ".writable").unlink()


def statement(s: Finetune, sigma: float, steps: int) -> dict:
    """privacy.json. epsilon is computed again from the steps that ran; a run that broke its promise is refused."""
    if s.epsilon == math.inf:
        spent, order = math.inf, None
    else:
        spent, order = accountant.epsilon(s.B / s.N, sigma, steps, s.delta)
        if spent > s.epsilon:
            raise RuntimeError(f"spent epsilon = {spent} > promised {s.epsilon}: calibrate and epsilon disagree; nothing was saved")
    return dict(private=s.epsilon < math.inf and s.seed is None, epsilon="inf" if spent == math.inf else spent, delta=s.delta,
                neighbours="add or remove one image", unit_of_privacy="one image", N=s.N, B=s.B, q=s.B / s.N, C=s.C, K=s.K,
                sigma=sigma, steps=steps, accountant="RDP of the Poisson-sampled Gaussian mechanism", best_order=order,
                covers="the adapter and every image drawn with it, whatever else is known about the other images",
                does_not_cover=NOT_COVERED,
                warning=None if s.seed is None else f"reproducible with --seed {s.seed}, therefore not private")


def report(s: Finetune, sigma: float, metrics: list, model: ddpm.UNet, trainable: dict, shape: tuple) -> None:
    """Write the run's folder and say the statement on the screen."""
    out, facts = Path(s.out), statement(s, sigma, len(metrics))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["step", "epsilon", "best_order"], *metrics])
    checkpoint.write_text(out / "metrics.csv", table.getvalue())
    config = dict(dataclasses.asdict(s), side=shape[-1])
    checkpoint.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    lora.save(out, trainable, lora.describe(s.train, s.rank, s.lora_alpha, model.classes is not None))
    picture(s, model, shape)
    checkpoint.write_text(out / "privacy.json", json.dumps(facts, indent=2) + "\n")
    (out / "checkpoint.pt").unlink()                                     # and with it the state that made the noise

    print(f"\n{out}/: samples.png (public before | private after), adapter_model.bin, privacy.json, config.json, metrics.csv")
    for name, value in facts.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            if line is not None:
                print(f"  {name if i == 0 else '':<16} {line}")
    print(f"next: python sample.py {out} --n 100 --out grid.png")


def picture(s: Finetune, model: ddpm.UNet, shape: tuple, columns: int = 8) -> None:
    """samples.png: one row a class, the public model's images on the left, the private model's on the right, same noise."""
    device = next(model.parameters()).device
    rows = min(model.classes or 10, 10)
    labels = torch.arange(rows).repeat_interleave(columns) if model.classes else None
    sides = []
    for one in (ddpm.load_unet(Path(s.base)).to(device), model):
        same = torch.Generator(device).manual_seed(0)
        sides.append(sample.generate(one, labels, (rows * columns, *shape), guidance=s.guidance, generator=same, quiet=True))
    before, after = (make_grid(side.float() / 255, nrow=columns, padding=1, pad_value=0.3) for side in sides)
    gap = torch.ones(3, before.shape[1], 6)
    checkpoint.write_atomically(Path(s.out) / "samples.png", lambda f: save_image(torch.cat([before, gap, after], 2), f, format="png"))


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
    return parser, stage(**vars(parser.parse_args(argv)))


def main() -> None:
    argv = sys.argv[1:]
    stage = Pretrain if argv[:1] == ["pretrain"] else Finetune
    parser, s = parse(stage, argv[1:] if stage is Pretrain else argv)
    try:
        pretrain(s) if stage is Pretrain else finetune(check(s))
    except (ValueError, OSError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
