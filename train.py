"""train.py -- the paper's algorithm, once: public base, private low-rank adapters, a stated (epsilon, delta).

A public base is frozen, LoRA factors are attached to its attention layers. Then, T times:     [DP-SGD Alg. 1]

    (i)    a lot: each of the N images is in it with probability q = B/N           dpsgd.poisson_sample
    (ii)   ONE gradient an image, of the mean loss of its K draws of (t, noise)    ddpm.loss
    (iii)  clip it: to norm C at most; and sum                                     dpsgd.clip_and_sum
    (iv)   add noise N(0, (sigma C)^2 I), once                                     dpsgd.add_noise
    (v)    divide by the declared B, not by the lot's size                         dpsgd.private_gradient
    (vi)   a step of Adam on the factors and the class embedding: post-processing

Before: the sigma that keeps (epsilon, delta); after: the epsilon of the steps that ran     accountant.py

  $ python train.py --epsilon 10 --out runs/mnist         # the defaults: 60,000 MNIST images
"""
import dataclasses
import functools
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import accountant
import data
import ddpm
import dpsgd
import lora
import sample
import unet
from machinery import checkpoint, devices, distributed, draws, flags, screen
from machinery.secret import Secret, new_key
from support import privacy_report, recipes, runs
from support.privacy_report import ACCOUNTANTS
from support.runs import Run

EMA_DECAY = 0.95             # of the adapter's running average, per step: it remembers about 20 of 110 steps
DROP = 0.1                   # share of labels replaced by the null class, so that guidance has one
CHOICES = {"accountant": ACCOUNTANTS, "draws": ddpm.DRAWS, "train": lora.WHAT,
           "precision": devices.PRECISIONS}                              # --help and `check` follow these


@dataclasses.dataclass(frozen=True)
class Settings:
    """Public constants, each a flag. The defaults are MNIST's; other --data: support/recipes.py"""
    data: str = "mnist"          # private images: folder:PATH, npz:FILE or a name
    data_dir: str = ""           # where their files are (default: assets/ or ./datasets)
    classes: str = ""            # declared names of folder: and npz:, with commas, or their number
    size: int = 32               # side in pixels to which images of folder: and npz: are resized and cropped
    white: int = 65_535          # grey level of white in 16-bit images; of 12 bits in a 16-bit file: 4095
    base: str = "assets/base.pt"     # the public base model
    start: str = "own"           # colour's class rows: own (the base's of that name), mean, null, NAMES
    out: str = "runs/mnist"      # folder of this run
    epsilon: float = 10.0        # privacy budget epsilon, no unit; inf: no privacy, a baseline
    delta: float = 1e-5          # delta, a probability below 1/N
    accountant: str = "rdp"      # the bound that the noise is made for; the report states all of them
    N: int = 0                   # declared number of private images (0: the data set's published size)
    B: int = 512                 # expected batch size, images; sampling rate q = B/N
    steps: int = 110             # T, optimiser steps, one use of the private data each
    C: float = 0.003             # clipping norm of one image's gradient, in gradient units
    K: int = 1                   # noise multiplicity: draws of (t, noise) averaged inside one image's loss
    draws: str = "paper"         # how t is drawn and weighted, see ddpm.DRAWS
    train: str = "lora"          # which layers: lora is the paper's, attention DP-LDM's
    rank: int = 16               # LoRA rank r; lora_alpha = r, so that the update is B A
    lr: float = 2e-2             # learning rate of Adam at the first step, falling linearly to 0
    chunk: int = 128             # images times draws per backward pass: memory; same result up to rounding
    device: str = "auto"         # auto, cuda, mps or cpu
    precision: str = "auto"      # of the network: bfloat16 or float32; auto: see machinery/devices.py
    seed: int | None = None      # reproducible, NOT private (default: randomness of the operating system)
    peek: int = 0                # steps between strips of samples in the run's folder (free); 0: none
    resume: bool = False         # go on from the checkpoint in --out


def check(s: Settings) -> Settings:
    """Refuse what has no meaning, in one line that says what was got and what was expected; fill in N."""
    if s.data in data.KNOWN and s.N == 0:
        s = dataclasses.replace(s, N=data.KNOWN[s.data].N)

    def need(true: bool, name: str, expected: str) -> None:
        if not true:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected {expected}")
    need(data.is_name(s.data), "data",
         f"one of {', '.join(data.KNOWN)}, folder:PATH or npz:FILE{data.meant(s.data)}")
    for name, choices in CHOICES.items():
        need(getattr(s, name) in choices, name, f"one of {', '.join(choices)}")
    for name, least in dict(B=1, steps=1, K=1, rank=1, chunk=1, size=8, peek=0).items():
        need(getattr(s, name) >= least, name, f"a whole number, at least {least}")
    need(s.seed is None or 0 <= s.seed < 2**32, "seed", "0 to 2^32 - 1")
    need(0 < s.lr < math.inf, "lr", "a number above 0")
    need(s.epsilon > 0, "epsilon", "a number above 0, or inf for a run without privacy")
    need(1 <= s.white <= 65_535, "white", "a grey level, 1 to 65535")
    need(s.out != "", "out", "a folder for the run")
    if s.N == 0:
        raise ValueError(f"--data {s.data} has no published size: declare the number of its images with --N, "
                         f"at least 1 (--N 0 is for data sets that have one)")
    need(s.N >= 1, "N", "the declared number of private images of folder: or npz:, at least 1")
    need(s.B <= s.N, "B", f"at most N = {s.N}: the sampling rate is q = B/N")
    need(s.B <= dpsgd.MOST_EXAMPLES // 4, "B", f"at most {dpsgd.MOST_EXAMPLES // 4}, so that sums are exact")
    need(s.delta >= accountant.LEAST_DELTA, "delta",
         f"above 0, at least {accountant.LEAST_DELTA:g}, what float64 can count with, and below 1/N")
    need(s.delta < 1 / s.N, "delta", f"below 1/N = {1 / s.N:.3g}")
    need(dpsgd.SMALLEST_C <= s.C <= 1e30 or s.C == s.epsilon == math.inf, "C",
         "a norm above 0, 1e-40 to 1e30: no guarantee without clipping (with --epsilon inf it may be inf)")
    return s


def with_draws(images: Tensor, labels: Tensor, names: Tensor, key: Tensor, step: int, classes, s) -> tuple:
    """(x0, labels, t, noise): a lot's images, clean, and K draws of each, from (key, step, name) alone.

    A name is made of one image's bytes, so no image moves the sum by more than C, all draws known or not.
    Shapes: images (n, C, H, W), labels, names (n,) -> (n, C, H, W), (n,), (n, K), (n, K, C, H, W)
    """
    u, noise, drop = draws.t_noise_and_drop(draws.streams(key, step, names), s.K, images.shape[1:])
    if classes is not None:
        labels = labels.masked_fill(drop < DROP, classes)                # the null class, for guidance
    return data.to_float(images), labels, ddpm.t_of(u, ddpm.DRAWS[s.draws].law), noise


def per_image_gradients(model: unet.UNet, frozen: dict, s: Settings):
    """per_sample(trainable, x0, labels, t, noise) -> one gradient per image, not yet clipped or noised."""
    def losses(params, x0, labels, t, noise):                            # (n,): mean of K draws
        def network(*args):
            return torch.func.functional_call(model, (params, frozen), args)
        with devices.autocast(x0.device, model, s.precision):
            return ddpm.loss(network, x0, labels, t, noise, weight=ddpm.DRAWS[s.draws].weight)
    if s.train in lora.TARGETS:
        return functools.partial(dpsgd.per_sample_grads_by_copies, losses)   # one backward pass: faster
    return functools.partial(dpsgd.per_sample_grads, dpsgd.loss_of_one(losses))


def finetune(s: Settings) -> None:
    """Private images: the paper's algorithm. The comments (i) .. (vi) are its lines."""
    rank, ranks, device = distributed.start(devices.pick(s.device))
    if s.seed is not None:
        torch.manual_seed(s.seed)                                # of the factors A; all else has generators
    run = runs.begin(s, device)                                  # the public base and an adapter
    s, model = run.settings, run.model.to(device)
    trainable, frozen = lora.split(model)                        # all that private data can touch; the rest

    # the plan: every constant is public and fixed before the first private image is read
    q, sigma = s.B / s.N, 0.0
    if s.epsilon < math.inf:
        with screen.waiting(f"finding the noise by --accountant {s.accountant}"):
            sigma = accountant.calibrate(s.epsilon, s.delta, q, s.steps, ACCOUNTANTS[s.accountant])
    weights = sum(p.numel() for p in trainable.values())
    if rank == 0:
        print(privacy_report.plan(run, sigma, weights, f"{ranks} x {device.type}"))
    run, share = runs.private_share(run, rank, ranks, device)    # its images, as the network takes them
    mechanism = dict(dataclasses.asdict(s), sigma=sigma, base=run.base_sha256,
                     private_images=share.fingerprint)           # --resume compares it, and so do the ranks:
    distributed.agree(mechanism | devices.kind(device))          # else an image could be in two ranks' shares
    secret = Secret(distributed.bytes_of_the_first(new_key(s.seed)))     # of lots and privacy noise
    key = draws.new_key(s.seed).to(device)                       # of t, noise, dropped labels: not secret
    distributed.same_everywhere({**trainable, "key": key})
    optimizer, average = torch.optim.Adam(trainable.values(), lr=s.lr), ddpm.EMA(trainable, EMA_DECAY)
    progress = checkpoint.Progress(s.out, mechanism, trainable, average, optimizer, key)
    progress.begin(s.resume)
    per_sample, chunk = dpsgd.full_chunks(per_image_gradients(model, frozen, s), s.chunk // s.K)
    bar = tqdm(progress.steps(s.steps), initial=progress.done, total=s.steps, desc="private",
               disable=screen.hide_bar(rank == 0))

    for step in bar:
        coins = secret.coins(step, share.total)[rank::ranks]             # one for each image of all ranks
        lot = dpsgd.poisson_sample(coins, q).to(device)                  # (i)   random size, 0 is legal
        examples = with_draws(share.images[lot], share.labels[lot], share.names[lot], key, step,
                              model.classes, s)
        gradient = dpsgd.private_gradient(
            per_sample, trainable, examples,                             # (ii)  one gradient per image,
            C=s.C, chunk=chunk,                                          # (iii) clipped to C, summed,
            sigma=sigma, normals=secret.normals(step, weights), B=s.B)   # (iv)  + noise once, (v) / B
        for name, p in trainable.items():
            p.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = s.lr * (1 - (step - 1) / s.steps)
        optimizer.step()                                                 # (vi)  post-processing: free
        average.update(trainable)
        spent, order = accountant.epsilon(q, sigma, step, s.delta)       # of the steps that ran
        bar.set_postfix(epsilon_rdp=f"{spent:.3f}")
        show = s.peek > 0 and step % s.peek == 0
        progress.record(step, s.steps, spent, order, save=show)      # first: no step that is shown runs again
        if show and rank == 0:
            with average.applied(trainable):
                sample.class_strip(run, Path(s.out) / f"peek-{step:05d}.png")

    if rank == 0:
        with progress.ending(), average.applied(trainable):              # the average is what is published
            publish(run, sigma, trainable, progress.metrics)
    distributed.stop()


def publish(run: Run, sigma: float, trainable: dict, metrics: list) -> None:
    """The run's folder, its privacy report last. Nothing is written if more was spent than promised."""
    facts = privacy_report.after(run.settings, sigma, len(metrics))
    runs.write(run, trainable, metrics)
    out = Path(run.settings.out)
    sample.before_and_after(out / "samples.png", runs.public(run), run)
    privacy_report.write(out, facts)


def main() -> None:
    named = CHOICES | dict(data=data.KNOWN)                      # for --help alone: `check` allows more
    s = flags.parse(Settings, "train.py", __doc__, sys.argv[1:], recipes.of, named)
    with screen.one_line("train.py", "lower --chunk, also with --resume"), distributed.answering():
        s = check(s)
        with checkpoint.alone(Path(s.out) / ".in-use", fresh=not s.resume):
            finetune(s)


if __name__ == "__main__":
    main()
