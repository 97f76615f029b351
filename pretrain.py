"""pretrain.py -- the public stages: an autoencoder, and a diffusion model of public images alone.

The ordinary DDPM loop (Ho et al. 2020, Alg. 1) on images that nobody owns, or that are public for you; with
--autoencoder the same loop on their latents (Rombach et al. 2022, Sec. 3.2).

  $ python pretrain.py                                   # drawn digits: assets/base.pt again, as runs/base.pt
  $ python pretrain.py autoencoder --data folder:PHOTOS --out runs/ae.pt
  $ python pretrain.py --unet photos --autoencoder runs/ae.pt --data folder:PHOTOS --out runs/photos.pt

Ctrl-C or a crash costs nothing: the state is kept beside --out, --resume goes on, and --out appears when all
is done.
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

# public images by code: modules with draw() and NAMES; a new one is a row here
DRAWN = {"glyphs": glyphs, "clothes": clothes, "smears": smears, "faces": faces}
POOL = 20_000                # drawings whose latents are made once; pixels are drawn anew at each step
HELD_OUT = 20                # every 20th public photograph only measures
SAVE_EVERY = 500             # steps between checkpoints
EMA_DECAY = 0.999            # of the running average that is saved, per step
DROP = 0.1                   # share of labels replaced by the null class, so that guidance has one
KL_WEIGHT = 1e-4             # w of autoencoder.loss: nats -> squared grey values, of [-1, 1]

UNETS = {                    # shapes of unet.UNet
    "small": dict(),                                                     # 28 x 28 x 1, in patches of 2 x 2
    "photos": dict(image_channels=4, channels=48, multipliers=(1, 2, 2), attention_levels=(1, 2),
                   classes=202, patch=1),                                # latents 16 x 16 x 4 of 64 x 64 x 3
    "cifar10": dict(image_channels=3, channels=128, multipliers=(1, 2, 2), blocks=2, attention_levels=(1, 2),
                    heads=8, classes=10, patch=1),
    "celeba64": dict(image_channels=3, channels=128, multipliers=(1, 2, 4), blocks=2,
                     attention_levels=(0, 1, 2), heads=8, classes=None, patch=2)}

CHOICES = {"unet": UNETS, "draws": ddpm.DRAWS}                   # --help and `check` follow these


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = "glyphs"           # public images: folder:PATH, npz:FILE or a name
    mix: str = ""                  # more public images, under the null class: a name or folder:PATH
    share: float = 0.5             # share of --mix among the images of a step
    data_dir: str = ""             # where their files are
    size: int = 64                 # side in pixels of the images of folder:
    white: int = 65_535            # grey level of white in 16-bit images; of 12 bits in a 16-bit file: 4095
    unet: str = "small"            # shape of the UNet
    base: str = ""                 # a public base, or autoencoder, to go on from (default: random weights)
    autoencoder: str = ""          # diffuse in this autoencoder's latents (default: the base's, or pixels)
    draws: str = "paper"           # how t is drawn and weighted, see ddpm.DRAWS
    flip: bool = False             # mirror half of the photographs (an autoencoder's: always), never digits
    crop: int = 32                 # side of the pieces an autoencoder is trained on, pixels
    channels: int = 4              # numbers of an autoencoder's latent at each position
    steps: int = 30_000            # optimiser steps
    batch: int = 128               # images per step
    lr: float = 1e-3               # peak learning rate of Adam (one cycle)
    seed: int = 0                  # public data, public seed
    device: str = "auto"           # auto, cuda, mps or cpu
    out: str = "runs/base.pt"      # where the model goes; a file that exists is never overwritten
    resume: bool = False           # go on from the state that an interrupted run left beside --out


def check(s: Settings, foreign: tuple = ()) -> None:
    """Refuse what has no meaning, in one line. foreign: fields that only the other stage uses."""
    for name in foreign:
        if getattr(s, name) != getattr(Settings, name):
            raise ValueError(f"--{name} {getattr(s, name)}: expected only by "
                             f"`python pretrain.py{'' if 'unet' in foreign else ' autoencoder'}`; leave it "
                             f"out")
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
        raise ValueError(f"--seed {s.seed}: expected 0 to 2^32 - 1")
    if Path(s.out).exists():
        raise ValueError(f"--out {s.out} exists; nothing was overwritten; choose another --out or move it "
                         f"away")


def optimise(s: Settings, model: nn.Module, loss: Callable[[torch.Generator], Tensor]) -> dict[str, Tensor]:
    """s.steps steps of Adam on loss(generator); the running average of model's weights, name -> tensor.

    All randomness comes from that one generator, so that a resumed run is the run that was not interrupted.
    """
    params, generator = dict(model.named_parameters()), torch.Generator().manual_seed(s.seed)
    average = ddpm.EMA(params, EMA_DECAY)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    warm_up = 0.05 + 1e-9                                                # + : 20 steps divide by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, s.steps, pct_start=warm_up)
    kept = Path(s.out + ".checkpoint")
    settings = dict(dataclasses.asdict(s), images=[s.data, s.size])      # a private run compares them itself
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
        raise ValueError(f"{kept} was left by a run that did not finish; --resume goes on with it, or delete "
                         f"it")
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
        late = time.monotonic() - saved > checkpoint.SECONDS             # a step may take seconds
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
    last = "" if mean is None else f", loss {mean:.4f}"                   # None: all steps were done before
    print(f"{s.steps} steps of {s.batch}, {minutes:.0f} minutes since the start or --resume{last}")
    return average.shadow


def pretrain(s: Settings) -> None:
    """The public base: a UNet that predicts the noise in public images, or in their latents."""
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
    draw, law = None, ddpm.DRAWS[s.draws]
    if s.data in DRAWN:
        draw = DRAWN[s.data].draw
    channels = model.config["image_channels"] if coder is None else coder.config["image_channels"]
    if draw:
        with screen.waiting(f"drawing {s.data}"):
            images, classes = draw(1 if coder is None else POOL, torch.Generator().manual_seed(s.seed))
        draw = draw if coder is None else None
    else:
        images, classes = data.load(s.data, "train", s.data_dir or None, s.size, channels=channels,
                                    white=s.white)
    if model.classes is not None:
        names = list(DRAWN[s.data].NAMES) if s.data in DRAWN else class_names(s.data)
        own = s.base or s.data in DRAWN
        if own and names and len(names) != model.classes:                # other classes: a table of their own
            lora.new_classes(model, names)
        model.config["names"] = names
    if coder is not None:
        coder.to(device)
        mirrored = [autoencoder.to_latents(coder, images.flip(3))] if s.flip else []
        images = torch.stack([autoencoder.to_latents(coder, images), *mirrored]).cpu()
    elif not draw:
        images = torch.stack([images, images.flip(3)] if s.flip else [images])       # (1 or 2, N, C, H, W)

    base.fits(model, images if draw else images[0], classes, s.data)     # latents, as the network takes them

    others = mixed_in(s, images, coder) if s.mix else None

    def loss(generator):
        if draw:
            x0, labels = draw(s.batch, generator)
        else:
            side = torch.randint(len(images), (s.batch,), generator=generator)
            pick = torch.randint(len(classes), (s.batch,), generator=generator)
            x0, labels = data.to_float(images[side, pick]), classes[pick]
        if model.classes is not None:
            labels[torch.rand(s.batch, generator=generator) < DROP] = model.classes
        if others is not None:
            replaced = torch.rand(s.batch, generator=generator) < s.share
            pick = torch.randint(len(others), (int(replaced.sum()),), generator=generator)
            x0[replaced] = data.to_float(others[pick])
            if model.classes is not None:
                labels[replaced] = model.classes
        t, noise = ddpm.draw_t_and_noise(x0, 1, generator, law=law.law)
        with devices.autocast(device, model):
            return ddpm.loss(model, x0.to(device), labels.to(device), t.to(device), noise.to(device),
                             weight=law.weight).mean()

    print(f"public base on {device}: {sum(p.numel() for p in model.parameters()):,} weights; {s}")
    base.save(out, model, optimise(s, model, loss), coder)
    Path(s.out + ".checkpoint").unlink()
    print(f"wrote {out}")


def for_other_latents(model: unet.UNet, channels: int) -> unet.UNet:
    """The same network for latents of another number of channels: its first and last layer start afresh."""
    new = unet.UNet(**dict(model.config, image_channels=channels))
    old = model.state_dict()
    fitting = {name: p for name, p in new.state_dict().items() if p.shape == old[name].shape}
    new.load_state_dict({name: old[name] for name in fitting}, strict=False)
    return new


def mixed_in(s: Settings, images: Tensor, coder) -> Tensor:
    """The images of --mix as the network takes them: of the size of `images`, in grey where those are."""
    from torchvision.transforms import functional        # here: it takes as long to import as torch itself
    side = s.size if coder is not None else images.shape[-1]
    others, _ = data.load(s.mix, "train", s.data_dir or None, side, white=s.white)
    if coder is not None:
        return autoencoder.to_latents(coder, others).cpu()
    if images.shape[-3] == 1 and others.shape[1] == 3:
        return functional.rgb_to_grayscale(others)
    return others


def train_autoencoder(s: Settings) -> None:
    """E and D on random crops of public photographs, then the public scale of z."""
    device, out = devices.pick(s.device), Path(s.out)
    checkpoint.try_writing(out.parent)
    torch.manual_seed(s.seed)
    images, _ = data.load(s.data, "train", s.data_dir or None, s.size, white=s.white)
    if len(images) < 2:
        raise ValueError(f"--data {s.data} has {screen.count(len(images), 'image')}; expected at least 2, "
                         f"one to train on and one to measure with")
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    test, images = images[held_out], images[~held_out]
    if s.base:
        model = autoencoder.load(Path(s.base))
    else:
        model = autoencoder.Autoencoder(images.shape[1], latent_channels=s.channels)
    model.requires_grad_(True).to(device, memory_format=torch.channels_last)
    room = images.shape[-1] - s.crop + 1
    if room < 1 or s.crop % model.f:
        raise ValueError(f"--crop {s.crop}: expected a multiple of {model.f}, at most the images' "
                         f"{images.shape[-1]}")

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
    print(f"wrote {out}; {len(test)} held-out public images: {autoencoder.psnr(test, back):.2f} dB")


def main() -> None:
    argv, stage, foreign = sys.argv[1:], pretrain, ("crop", "channels")
    if argv[:1] == ["autoencoder"]:
        argv, stage = argv[1:], train_autoencoder
        foreign = ("unet", "autoencoder", "draws", "flip", "mix", "share")
    named = CHOICES | dict(data=[*DRAWN, *data.KNOWN])           # for --help alone: `check` allows more
    s = flags.parse(Settings, "pretrain.py", __doc__, argv, choices=named)
    with screen.one_line("pretrain.py", "lower --batch"):
        check(s, foreign)
        with checkpoint.alone(Path(s.out + ".in-use")):
            stage(s)


if __name__ == "__main__":
    main()
