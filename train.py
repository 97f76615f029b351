"""train.py -- the algorithm of DP-LoRA (Tsai et al. 2025): private fine-tuning of low-rank adapters.

A public diffusion model, the base, is frozen, and LoRA factors are attached to its attention layers. Then the
following step is repeated T times. A lot is the random batch of one step. [DP-SGD: Abadi et al. 2016, Alg. 1]

    (i)    draw a lot: each image with probability q = B/N, independently          dpsgd.poisson_sample
    (ii)   compute ONE gradient for each image: of the mean loss of its K draws    ddpm.loss
    (iii)  clip each gradient to norm C at most, and sum                           dpsgd.clip_and_sum
    (iv)   add noise N(0, (sigma C)^2 I), once                                     dpsgd.add_noise
    (v)    divide by the declared B, not by the size of the lot                    dpsgd.private_gradient
    (vi)   make one step of Adam on the factors and the class embedding

A draw is a noise level t with a sample of the diffusion's noise. Before the first step, accountant.py finds
the noise multiplier sigma that keeps the wanted (epsilon, delta). After the last step it computes the epsilon
of the steps that ran. What is published is a running average of the trained weights, which reads no image.

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

EMA_DECAY = 0.95             # per step, of the adapter's running average, which spans about 20 steps
DROP = 0.1                   # share of labels that are replaced by the null class, which guidance needs
CHOICES = {"accountant": ACCOUNTANTS, "draws": ddpm.DRAWS, "train": lora.TARGETS,
           "precision": devices.PRECISIONS}                              # for --help and `check`


@dataclasses.dataclass(frozen=True)
class Settings:
    """The public constants of a run, each of them a flag.

    The defaults are for MNIST; support/recipes.py changes them for other data sets.
    """
    data: str = "mnist"          # private images: folder:PATH, npz:FILE or a name
    data_dir: str = ""           # folder with the files of the data set (default: assets/ or ./datasets)
    classes: str = ""            # declared class names of folder: or npz:, with commas; or their number
    size: int = 32               # side in pixels to which images of folder: and npz: are resized and cropped
    white: int = 65_535          # grey level of white in images of 16 bits; 4095 if they hold only 12 bits
    base: str = "assets/base.pt"     # file of the public base model
    start: str = "own"           # in latents, class embeddings start as: own (same name), mean, null, NAMES
    out: str = "runs/mnist"      # folder of this run
    epsilon: float = 10.0        # privacy budget epsilon, no unit; inf makes a baseline without privacy
    delta: float = 1e-5          # delta of the guarantee, no unit, below 1/N
    accountant: str = "rdp"      # bound on epsilon for which the noise is computed; the report states all
    N: int = 0                   # declared number of private images; 0: the published size of the data set
    B: int = 512                 # expected batch size in images; the sampling rate is q = B/N
    steps: int = 110             # number T of optimiser steps, each of which uses the private data once
    C: float = 0.003             # clipping norm of one image's gradient, in gradient-norm units
    K: int = 1                   # noise multiplicity: draws of (t, noise) that the loss of one image averages
    draws: str = "paper"         # distribution of t and weight of the loss at t (ddpm.DRAWS)
    train: str = "lora"          # what is trained; lora is the paper's choice, attention is DP-LDM's
    rank: int = 16               # LoRA rank r; lora_alpha = r, so that the update is B A
    lr: float = 2e-2             # learning rate of Adam at the first step; it falls linearly towards 0
    chunk: int = 128             # images times draws in one backward pass; affects memory and rounding only
    device: str = "auto"         # auto, cuda, mps or cpu
    precision: str = "auto"      # precision of the network; auto follows from the hardware and the network
    seed: int | None = None      # makes the run reproducible and NOT private (default: secret random numbers)
    peek: int = 0                # steps between pictures of samples (they cost no privacy); 0: none
    resume: bool = False         # continue from the checkpoint in --out


def check(s: Settings) -> Settings:
    """The settings with N filled in, if they have a meaning.

    Errors: one that has none -> ValueError, in one line that says what was got and what was expected
    """
    if s.data in data.KNOWN and s.N == 0:
        s = dataclasses.replace(s, N=data.KNOWN[s.data].N)

    def need(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected {expected}")
    need(data.is_name(s.data), "data",
         f"one of {', '.join(data.KNOWN)}, folder:PATH or npz:FILE{data.meant(s.data)}")
    for name, choices in CHOICES.items():
        need(getattr(s, name) in choices, name, f"one of {', '.join(choices)}")
    for name, least in dict(B=1, steps=1, K=1, rank=1, chunk=1, size=8, peek=0).items():
        need(getattr(s, name) >= least, name, f"a whole number, at least {least}")
    need(s.seed is None or 0 <= s.seed < 2**32, "seed", "a whole number, 0 to 2^32 - 1")
    need(0 < s.lr < math.inf, "lr", "a number above 0")
    need(s.epsilon > 0, "epsilon", "a number above 0, or inf for a run without privacy")
    need(1 <= s.white <= 65_535, "white", "a grey level, 1 to 65535")
    need(s.out != "", "out", "a folder for the run")
    if s.N == 0:
        raise ValueError(f"--data {s.data} has no published size: declare the number of its images with --N, "
                         f"at least 1 (--N 0 means the published size)")
    need(s.N >= 1, "N", "the declared number of private images, at least 1")
    need(s.B <= s.N, "B", f"at most N = {s.N}, because the sampling rate is q = B/N")
    need(s.B <= dpsgd.MOST_EXAMPLES // 4, "B",                   # // 4, because a lot can be larger than B
         f"at most {dpsgd.MOST_EXAMPLES // 4}, so that the sum of clipped gradients is exact")
    need(s.delta >= accountant.LEAST_DELTA, "delta",
         f"a number above 0, at least {accountant.LEAST_DELTA:g} (the accountant's limit), and below 1/N")
    need(s.delta < 1 / s.N, "delta", f"below 1/N = {1 / s.N:.3g}")
    unclipped = s.C == math.inf and s.epsilon == math.inf
    need(dpsgd.SMALLEST_C <= s.C <= 1e30 or unclipped, "C",
         "a norm above 0, 1e-40 to 1e30 (inf, which means no clipping, only with --epsilon inf)")
    return s


def with_draws(images: Tensor, labels: Tensor, hashes: Tensor, key: Tensor, step: int, classes, s) -> tuple:
    """(x0, labels, t, noise) of a lot: x0 are its images before noising, (t, noise) the K draws of each.

    hashes are the image hashes (draws.hashes). The draws of an image are a function of (key, step, hash), and
    the hash is a function of that image's bytes. So an image never changes the draws of another one, and
    moves the sum by at most C even for somebody who knows all draws.
    Shapes: images (n, C, H, W), labels, hashes (n,) -> (n, C, H, W), (n,), (n, K), (n, K, C, H, W)
            classes: the label of the null class, None for a network without classes
    """
    u, noise, drop = draws.t_noise_and_drop(draws.streams(key, step, hashes), s.K, images.shape[1:])
    if classes is not None:
        labels = labels.masked_fill(drop < DROP, classes)                # the null class
    return data.to_float(images), labels, ddpm.t_of(u, ddpm.DRAWS[s.draws].law), noise


def per_image_gradients(model: unet.UNet, frozen: dict, s: Settings):
    """The function per_sample(trainable, x0, labels, t, noise) -> one gradient for each image, unclipped."""
    def losses(params, x0, labels, t, noise):                            # (n,): each the mean of K draws
        def network(*args):
            return torch.func.functional_call(model, (params, frozen), args)
        with devices.autocast(x0.device, model, s.precision):
            return ddpm.loss(network, x0, labels, t, noise, weight=ddpm.DRAWS[s.draws].weight)
    if lora.TARGETS[s.train] is not None:                        # faster than vmap; needs the layers of lora
        return functools.partial(dpsgd.per_sample_grads_by_copies, losses)
    return functools.partial(dpsgd.per_sample_grads, dpsgd.loss_of_one(losses))


def rows_of_one_image(per_sample, trainable: dict, shape: tuple, n: int, key: Tensor, classes, s) -> list:
    """The gradients of n copies of one image of noise, for devices.one_thread_unless_equal.

    The weights are moved a little, because at the start the factors A have no gradient.
    """
    g = torch.Generator().manual_seed(0)
    moved = {name: p + 0.02 * torch.randn(p.shape, generator=g).to(p) for name, p in trainable.items()}
    image, zeros = torch.randn(1, *shape, generator=g), torch.zeros(n, dtype=torch.int64)
    examples = with_draws(image.expand(n, *shape), zeros, zeros, key, 0, classes, s)
    return list(per_sample(moved, *examples).values())


def finetune(s: Settings) -> None:
    """The paper's algorithm on the private images. The comments (i) to (vi) are the lines of its table."""
    rank, ranks, device = distributed.start(devices.pick(s.device))
    if s.seed is not None:
        torch.manual_seed(s.seed)                                # for the factors A alone
    run = runs.begin(s, device)                                  # the public base with a new adapter
    s, model = run.settings, run.model.to(device)
    trainable, frozen = lora.split(model)                        # all that private data can change; the rest

    # The plan: every constant is public, and is fixed before the first private image is read.
    q, sigma = s.B / s.N, 0.0
    if s.epsilon < math.inf:
        with screen.waiting(f"finding the noise by --accountant {s.accountant}"):
            sigma = accountant.calibrate(s.epsilon, s.delta, q, s.steps, ACCOUNTANTS[s.accountant])
    weights = sum(p.numel() for p in trainable.values())
    if rank == 0:
        print(privacy_report.plan(run, sigma, weights, f"{ranks} x {device.type}"))

    run, share = runs.private_share(run, rank, ranks, device)    # this rank's images
    key = draws.new_key(s.seed).to(device)                       # for t, noise, dropped labels: not secret
    per_sample, chunk = dpsgd.full_chunks(per_image_gradients(model, frozen, s), s.chunk // s.K,
                                          devices.threads(device))
    devices.one_thread_unless_equal(device, functools.partial(
        rows_of_one_image, per_sample, trainable, share.images.shape[1:], chunk, key, model.classes, s))
    mechanism = dict(dataclasses.asdict(s), sigma=sigma, base=run.base_sha256, code=runs.code(),
                     private_images=share.fingerprint)           # --resume compares it with the checkpoint's
    # All ranks must agree on the mechanism, or one image could be in the shares of two ranks. They must also
    # agree on their hardware, because an image's gradient must not depend on the rank that computes it.
    distributed.agree(mechanism | devices.kind(device))
    secret = Secret(distributed.bytes_of_the_first(new_key(s.seed)))     # lots and noise; new after --resume
    distributed.same_everywhere({**trainable, "key": key})
    optimizer, average = torch.optim.Adam(trainable.values(), lr=s.lr), ddpm.EMA(trainable, EMA_DECAY)
    progress = checkpoint.Progress(s.out, mechanism, trainable, average, optimizer, key)
    progress.begin(s.resume)
    bar = tqdm(progress.steps(s.steps), initial=progress.done, total=s.steps, desc="private",
               disable=screen.hide_bar(rank == 0))

    for step in bar:
        coins = secret.coins(step, share.total)[rank::ranks]             # one for each image of this rank
        lot = dpsgd.poisson_sample(coins, q).to(device)                  # (i)   of random size; 0 is legal
        examples = with_draws(share.images[lot], share.labels[lot], share.hashes[lot], key, step,
                              model.classes, s)
        gradient = dpsgd.private_gradient(
            per_sample, trainable, examples,                             # (ii)  one gradient per image,
            C=s.C, chunk=chunk,                                          # (iii) clipped to C, summed,
            sigma=sigma, normals=secret.normals(step, weights), B=s.B)   # (iv)  noise once, (v) divided by B
        for name, p in trainable.items():
            p.grad = gradient[name]
        optimizer.param_groups[0]["lr"] = s.lr * (1 - (step - 1) / s.steps)
        optimizer.step()                                                 # (vi)  post-processing
        average.update(trainable)
        spent, order = accountant.epsilon(q, sigma, step, s.delta)       # of the steps that ran
        bar.set_postfix(epsilon_rdp=f"{spent:.3f}")
        show = s.peek > 0 and step % s.peek == 0
        progress.record(step, s.steps, spent, order, save=show)
        # A step must be in the checkpoint before it is shown. Otherwise --resume could run it again with
        # other noise, and two looks at the private images would be seen where one was counted.
        if show and rank == 0:
            with average.applied(trainable):
                sample.class_strip(run, Path(s.out) / f"peek-{step:05d}.png")

    if rank == 0:
        with progress.ending(), average.applied(trainable):              # the average is what is published
            publish(run, sigma, trainable, progress.metrics)
    distributed.stop()


def publish(run: Run, sigma: float, trainable: dict, metrics: list) -> None:
    """Write the run's folder, its privacy report last.

    Errors: more was spent than promised -> RuntimeError, and nothing is written
    """
    facts = privacy_report.after(run.settings, sigma, len(metrics))
    runs.write(run, trainable, metrics)
    out = Path(run.settings.out)
    sample.before_and_after(out / "samples.png", runs.public(run), run)
    privacy_report.write(out, facts)


def main() -> None:
    named = CHOICES | dict(data=data.KNOWN)                      # for --help only; `check` allows more
    s = flags.parse(Settings, "train.py", __doc__, sys.argv[1:], recipes.of, named)
    with screen.one_line("train.py", "lower --chunk, which --resume allows, too"), distributed.answering():
        s = check(s)
        with checkpoint.alone(Path(s.out) / ".in-use", fresh=not s.resume):
            finetune(s)


if __name__ == "__main__":
    main()
