"""pretrain.py -- training on public images alone: an autoencoder, and a diffusion model, the public base.

It is the ordinary DDPM training loop (Ho et al. 2020, Alg. 1), on images that need no protection: drawings
made by code, or public photographs. With --autoencoder it runs on their latents (Rombach et al. 2022, Sec.
3.2).

  $ python pretrain.py                                   # drawn digits: assets/base.pt again, as runs/base.pt
  $ python pretrain.py autoencoder --data folder:PHOTOS --out runs/ae.pt
  $ python pretrain.py --unet photos --autoencoder runs/ae.pt --data folder:PHOTOS --out runs/photos.pt

The state is saved beside --out every 500 steps, every minute, and at Ctrl-C. --resume continues from it. The
file --out itself appears when all steps are done.
"""
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import autoencoder
import base
import data
import ddpm
import lora
import unet
from drawings import clothes, faces, glyphs, smears
from machinery import checkpoint, devices, flags, screen
from support.classes import class_names

# Public images drawn by code: modules with draw() and NAMES. A new one is a row here.
DRAWN = {"glyphs": glyphs, "clothes": clothes, "smears": smears, "faces": faces}
POOL = 20_000                # drawings that a base on latents learns from; a base on pixels gets new ones
HELD_OUT = 20                # every 20th public photograph is held out to measure an autoencoder
SAVE_EVERY = 500             # steps between checkpoints
EMA_DECAY = 0.999            # per step, of the running average of the weights, which is what is saved
DROP = 0.1                   # share of labels that are replaced by the null class, which guidance needs
KL_WEIGHT = 1e-4             # w of autoencoder.loss: from nats to squared pixel values, which lie in [-1, 1]

UNETS = {                    # shapes of unet.UNet
    "small": dict(),                                                     # 28 x 28 x 1, in patches of 2 x 2
    "photos": dict(image_channels=4, channels=48, multipliers=(1, 2, 2), attention_levels=(1, 2),
                   classes=202, patch=1),                                # latents 16 x 16 x 4 of 64 x 64 x 3
    "photos-large": dict(image_channels=4, channels=96, multipliers=(1, 2, 2), blocks=2,
                         attention_levels=(1, 2), heads=8, classes=202, patch=1),        # for a GPU
    "cifar10": dict(image_channels=3, channels=128, multipliers=(1, 2, 2), blocks=2, attention_levels=(1, 2),
                    heads=8, classes=10, patch=1),
    "celeba64": dict(image_channels=3, channels=128, multipliers=(1, 2, 4), blocks=2,
                     attention_levels=(0, 1, 2), heads=8, classes=None, patch=2)}

CHOICES = {"unet": UNETS, "draws": ddpm.DRAWS}                   # for --help and `check`


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of both stages, each of them a flag."""
    data: str = "glyphs"           # public images: folder:PATH, npz:FILE or a name
    mix: str = ""                  # more public images, without classes: a name, folder:PATH or npz:FILE
    share: float = 0.5             # share of --mix among the images of a step
    data_dir: str = ""             # folder with the files of the data sets (default: assets/ or ./datasets)
    size: int = 64                 # side in pixels to which folder: and npz: images are resized and cropped
    white: int = 65_535            # grey level of white in images of 16 bits; 4095 if they hold only 12 bits
    unet: str = "small"            # shape of the UNet
    base: str = ""                 # public base, or autoencoder, to continue from (default: random weights)
    autoencoder: str = ""          # file of an autoencoder, in whose latents to work (default: the base's)
    draws: str = "paper"           # distribution of t and weight of the loss at t (ddpm.DRAWS)
    flip: bool = False             # mirror half of the images; not for digits (always on for an autoencoder)
    crop: int = 32                 # side in pixels of the squares that an autoencoder is trained on
    channels: int = 4              # channels of an autoencoder's latents
    steps: int = 30_000            # number of optimiser steps
    batch: int = 128               # images per step
    lr: float = 1e-3               # peak learning rate of Adam (it rises, then falls: one cycle)
    seed: int = 0                  # of all random numbers; public, since the images are
    device: str = "auto"           # auto, cuda, mps or cpu
    compile: bool = False          # compile the UNet with torch.compile; meant for a GPU, and slow to start
    out: str = "runs/base.pt"      # file for the model; a file that exists is never overwritten
    resume: bool = False           # continue from the state that an interrupted run left beside --out


def check(s: Settings, foreign: tuple = ()) -> None:
    """Refuse settings that have no meaning, in one line. foreign: fields that only the other stage uses.

    Errors: one of them -> ValueError
    """
    for name in foreign:
        if getattr(s, name) != getattr(Settings, name):
            raise ValueError(f"--{name} {getattr(s, name)}: expected only by "
                             f"`python pretrain.py{'' if 'unet' in foreign else ' autoencoder'}`; leave the "
                             f"flag out")
    if s.data not in DRAWN and not data.is_name(s.data):
        raise ValueError(f"--data {s.data}: expected {', '.join(DRAWN)}, {', '.join(data.KNOWN)}, "
                         f"folder:PATH or npz:FILE{data.meant(s.data)}")
    if not 1 <= s.white <= 65_535:
        raise ValueError(f"--white {s.white}: expected a grey level, 1 to 65535")
    for name, choices in CHOICES.items():
        if getattr(s, name) not in choices:
            raise ValueError(f"--{name} {getattr(s, name)}: expected one of {', '.join(choices)}")
    if s.mix and not data.is_name(s.mix):
        raise ValueError(f"--mix {s.mix}: expected one of {', '.join(data.KNOWN)}, folder:PATH or npz:FILE")
    if not 0 < s.share < 1:
        raise ValueError(f"--share {s.share}: expected a number between 0 and 1")
    if s.channels < 1:
        raise ValueError(f"--channels {s.channels}: expected at least 1")
    for name in ("size", "crop"):
        if getattr(s, name) < 8:
            raise ValueError(f"--{name} {getattr(s, name)}: expected a side of at least 8 pixels")
    for name in ("steps", "batch"):
        if getattr(s, name) < 1:
            raise ValueError(f"--{name} {getattr(s, name)}: expected a whole number, at least 1")
    if not 0 < s.lr < math.inf:
        raise ValueError(f"--lr {s.lr}: expected a number above 0")
    if not 0 <= s.seed < 2**32:
        raise ValueError(f"--seed {s.seed}: expected a whole number, 0 to 2^32 - 1")
    if Path(s.out).exists():
        raise ValueError(f"--out {s.out} exists; nothing was overwritten; choose another --out or move the "
                         f"file away")


def optimise(s: Settings, model: nn.Module, loss: Callable[[torch.Generator], Tensor]) -> dict[str, Tensor]:
    """Make s.steps steps of Adam on loss(generator) and return the running average of the model's weights.

    All random numbers come from that one generator, whose state is saved. So a run that was interrupted and
    resumed is the same as one that was not.
    Returns: name -> tensor
    Errors:  a state of an earlier run that is not to be resumed -> ValueError
    """
    params, generator = dict(model.named_parameters()), torch.Generator().manual_seed(s.seed)
    average = ddpm.EMA(params, EMA_DECAY)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    warm_up = 0.05 + 1e-9            # share of steps; at 0.05 and 20 steps OneCycleLR divides by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, s.steps, pct_start=warm_up)
    kept = Path(s.out + ".checkpoint")
    # checkpoint.load lets `data` and `size` change, as a private run compares a fingerprint of its images.
    # A public run has none, so its images are compared by their name.
    settings = dict(dataclasses.asdict(s), images=[s.data, s.size])
    done = 0
    if s.resume:
        state = checkpoint.load(kept, settings)
        done = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
    elif kept.exists():
        raise ValueError(f"{kept} was left by a run that did not finish; continue that run with --resume, or "
                         f"delete the file")
    stop = checkpoint.stop_cleanly()
    mean, begin, saved = None, time.time(), time.monotonic()
    bar = tqdm(range(done + 1, s.steps + 1), initial=done, total=s.steps, desc="public",
               disable=screen.hide_bar())
    for step in bar:
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        average.update(params)
        if step % 50 == 0 or step == s.steps:
            mean = value.item() if mean is None else 0.9 * mean + 0.1 * value.item()
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if mean is not None:
            screen.tell_a_log(step, s.steps, f"loss={mean:.4f}")
        late = time.monotonic() - saved > checkpoint.SECONDS             # one step may take seconds
        if step % SAVE_EVERY == 0 or step == s.steps or late or stop.is_set():
            checkpoint.save(kept, dict(
                settings=settings, step=step, model=model.state_dict(), average=average.state_dict(),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(), generator=generator.get_state()))
            saved = time.monotonic()
        if stop.is_set():
            sys.exit(f"stopped after step {step} of {s.steps}; go on with --resume")
    screen.answer_signals()
    minutes = (time.time() - begin) / 60
    last = "" if mean is None else f"; loss {mean:.4f}"                  # None: all steps were done before
    print(f"{s.steps} steps of {screen.count(s.batch, 'image')}; {minutes:.0f} minutes since the start or "
          f"--resume{last}")
    return average.shadow


def pretrain(s: Settings) -> None:
    """Train the public base: a UNet that predicts the noise in public images, or in their latents."""
    device, out = devices.pick(s.device), Path(s.out)
    checkpoint.try_writing(out.parent)
    torch.manual_seed(s.seed)
    coder = autoencoder.load(Path(s.autoencoder)) if s.autoencoder else None
    if s.base:
        model, own_coder, _ = base.load(s.base)
        coder = coder or own_coder
        if coder is not None and model.config["image_channels"] != coder.latent_channels:
            model = for_other_latents(model, coder.latent_channels)
    else:
        shape = dict(UNETS[s.unet])
        if coder is not None:
            shape["image_channels"] = coder.latent_channels
        model = unet.UNet(**shape)
    model.to(device)
    draws = ddpm.DRAWS[s.draws]                                          # how t is drawn and weighted
    channels = model.config["image_channels"] if coder is None else coder.config["image_channels"]
    draw = None                              # makes new drawings in each step; None: `images` holds all
    if s.data in DRAWN and coder is None:
        draw = DRAWN[s.data].draw
    if draw and s.flip:
        raise ValueError(f"--flip: expected only with images on disk or with an --autoencoder, because "
                         f"new {s.data} are drawn in each step")
    if s.data in DRAWN:
        pool = POOL if draw is None else 1                               # one drawing shows the shape of all
        with screen.waiting(f"drawing {s.data}"):
            images, all_labels = DRAWN[s.data].draw(pool, torch.Generator().manual_seed(s.seed))
    else:
        images, all_labels = data.load(s.data, "train", s.data_dir or None, s.size, channels=channels,
                                       white=s.white)
    if model.classes is not None:
        names = list(DRAWN[s.data].NAMES) if s.data in DRAWN else class_names(s.data)
        # The table of class embeddings gets one row for each class. The exception is a new network on pixels
        # of images from disk. It keeps the rows that UNETS gives it, because each private class needs one.
        fitted = bool(s.base) or s.data in DRAWN or coder is not None
        if fitted and names and len(names) != model.classes:
            lora.new_classes(model, names)
        model.config["names"] = names
    if coder is not None:
        coder.to(device)
        flipped = [autoencoder.to_latents(coder, images.flip(3))] if s.flip else []
        images = torch.stack([autoencoder.to_latents(coder, images), *flipped]).cpu()
    elif not draw:
        images = torch.stack([images, images.flip(3)] if s.flip else [images])       # (1 or 2, N, C, H, W)

    base.fits(model, images if draw else images[0], all_labels, s.data)  # pixels or latents
    others = mixed_in(s, images, coder) if s.mix else None
    network = torch.compile(model) if s.compile else model               # the same weights

    def loss(generator):
        if draw:
            x0, labels = draw(s.batch, generator)
        else:
            mirrored = torch.randint(len(images), (s.batch,), generator=generator)       # 0 or 1
            pick = torch.randint(len(all_labels), (s.batch,), generator=generator)
            x0, labels = data.to_float(images[mirrored, pick]), all_labels[pick]
        if model.classes is not None:
            labels[torch.rand(s.batch, generator=generator) < DROP] = model.classes
        if others is not None:
            replaced = torch.rand(s.batch, generator=generator) < s.share
            pick = torch.randint(len(others), (int(replaced.sum()),), generator=generator)
            x0[replaced] = data.to_float(others[pick])
            if model.classes is not None:
                labels[replaced] = model.classes
        t, noise = ddpm.draw_t_and_noise(x0, 1, generator, law=draws.law)
        with devices.autocast(device, model):
            return ddpm.loss(network, x0.to(device), labels.to(device), t.to(device), noise.to(device),
                             weight=draws.weight).mean()

    print(f"public base on {device}: {sum(p.numel() for p in model.parameters()):,} weights; {s}")
    base.save(out, model, optimise(s, model, loss), coder)
    Path(s.out + ".checkpoint").unlink()
    print(f"wrote {out}")


def for_other_latents(model: unet.UNet, channels: int) -> unet.UNet:
    """The same network for latents with another number of channels.

    Only the first and the last layer change their shapes. The first one starts with random weights and the
    last one with zeros, as in a new network.
    """
    new = unet.UNet(**dict(model.config, image_channels=channels))
    old = model.state_dict()
    fitting = {name: p for name, p in new.state_dict().items() if p.shape == old[name].shape}
    new.load_state_dict({name: old[name] for name in fitting}, strict=False)
    return new


def mixed_in(s: Settings, images: Tensor, coder) -> Tensor:
    """The images of --mix as the network takes them: as large as `images`, and grey if those are grey.

    Errors: a data set of another size, which is not resized -> ValueError
    """
    from torchvision.transforms import functional        # imported here, as it takes as long as torch itself
    side = s.size if coder is not None else images.shape[-1]
    others, _ = data.load(s.mix, "train", s.data_dir or None, side, white=s.white)
    if coder is not None:
        others = autoencoder.to_latents(coder, others).cpu()
    elif images.shape[-3] == 1 and others.shape[1] == 3:
        others = functional.rgb_to_grayscale(others)
    if others.shape[-3:] != images.shape[-3:]:
        raise ValueError(f"--mix {s.mix}: its images reach the network as {tuple(others.shape[-3:])}, those "
                         f"of --data {s.data} as {tuple(images.shape[-3:])}; expected the same shape")
    return others


def train_autoencoder(s: Settings) -> None:
    """Train encoder and decoder on random crops of public photographs, then measure the scale of latents."""
    device, out = devices.pick(s.device), Path(s.out)
    checkpoint.try_writing(out.parent)
    torch.manual_seed(s.seed)
    images, _ = data.load(s.data, "train", s.data_dir or None, s.size, white=s.white)
    if len(images) < 2:
        raise ValueError(f"--data {s.data} has {screen.count(len(images), 'image')}; expected at least 2, "
                         f"one to train on and one to measure the autoencoder with")
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    test, images = images[held_out], images[~held_out]
    if s.base:
        model = autoencoder.load(Path(s.base))
    else:
        model = autoencoder.Autoencoder(images.shape[1], latent_channels=s.channels)
    model.requires_grad_(True).to(device, memory_format=torch.channels_last)
    room = images.shape[-1] - s.crop + 1
    if room < 1 or s.crop % model.f:
        raise ValueError(f"--crop {s.crop}: expected a multiple of {model.f}, at most {images.shape[-1]}, "
                         f"the side of the images")

    def loss(generator):
        pick = torch.randint(len(images), (s.batch,), generator=generator).tolist()
        y, x = torch.randint(room, (2, s.batch), generator=generator).tolist()
        pieces = [images[i, :, top:top + s.crop, left:left + s.crop] for i, top, left in zip(pick, y, x)]
        pieces = data.to_float(torch.stack(pieces).to(device))
        mirrored = (torch.rand(s.batch, generator=generator) < 0.5).to(device)
        pieces = torch.where(mirrored[:, None, None, None], pieces.flip(3), pieces)
        small = s.crop // model.f
        noise = torch.randn(s.batch, model.latent_channels, small, small, generator=generator)
        with devices.autocast(device, model):
            return autoencoder.loss(model, pieces, noise.to(device), KL_WEIGHT).mean()

    print(f"autoencoder on {device}: {sum(p.numel() for p in model.parameters()):,} weights; {s}")
    average = optimise(s, model, loss)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])
    autoencoder.measure_scale(model, images[:10_000])
    checkpoint.save(out, dict(autoencoder=autoencoder.state(model)), mode=0o644)
    Path(s.out + ".checkpoint").unlink()
    model = autoencoder.load(out).to(device)                             # as stored, in half precision
    back = autoencoder.to_images(model, autoencoder.to_latents(model, test), test.shape[1:]).cpu()
    print(f"wrote {out}; mean PSNR of {screen.count(len(test), 'held-out public image')}: "
          f"{autoencoder.psnr(test, back):.2f} dB")


def main() -> None:
    argv, stage, foreign = sys.argv[1:], pretrain, ("crop", "channels")
    if argv[:1] == ["autoencoder"]:
        argv, stage = argv[1:], train_autoencoder
        foreign = ("unet", "autoencoder", "draws", "flip", "mix", "share", "compile")
    named = CHOICES | dict(data=[*DRAWN, *data.KNOWN])           # for --help only; `check` allows more
    s = flags.parse(Settings, "pretrain.py", __doc__, argv, choices=named)
    with screen.one_line("pretrain.py", "lower --batch"):
        check(s, foreign)
        with checkpoint.alone(Path(s.out + ".in-use")):
            stage(s)


if __name__ == "__main__":
    main()
