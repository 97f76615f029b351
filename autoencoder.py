"""autoencoder.py -- a smaller space to diffuse in: z = E(x) has 16 times fewer positions; D(z) leads back.

This is a KL autoencoder (Kingma & Welling 2014; Rombach et al. 2022, "LDM", Sec. 3.1). It is trained on
public images alone and then frozen. ddpm.py, dpsgd.py and the private loop work on latents z exactly as on
images x, and the guarantee is the same:

    E reads one image at a time. Two sets of images that differ by one image therefore become two sets of
    latents that differ by one latent, and DP-SGD on the latents has the same (epsilon, delta). The number by
    which z is scaled is part of the public file. A scale that is measured on the private images would let
    each image change the latents of all others.

  $ python autoencoder.py     # originals above reconstructions, and the size of both: runs/autoencoder.png
"""
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from machinery import devices, screen

SIDE = 64                    # pixels, of the public photographs; smaller images are enlarged to it for E
LIMIT = 5.0                  # a sampler clips latents, whose standard deviation is about 1, to +-LIMIT


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (n, c, h, w) -> the same, each image by itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Autoencoder(nn.Module):
    """The encoder E and the decoder D.

    Shapes: E: (n, C, H, W) -> mean and log-variance of z, (n, c, H/f, W/f) each; D: z -> (n, C, H, W)
    patch:  each patch x patch square of pixels becomes channels on the way in, and pixels again on the way
            out, as in unet.py
    blocks: how many residual blocks each level of E has; each level of D has one more. From one level of E to
            the next, height and width are halved
    z is f = patch * 2^(levels - 1) times smaller than x in height and in width. The default is f = 4. The
    published code mostly has f = 2, which is patch = 1 with two levels. There is no attention, so any side
    that f divides will do.
    """

    def __init__(self, image_channels: int = 3, channels: int = 64, multipliers: tuple = (1, 2),
                 blocks: tuple = (1, 2), latent_channels: int = 4, patch: int = 2):
        super().__init__()
        self.config = dict(image_channels=image_channels, channels=channels, multipliers=list(multipliers),
                           blocks=list(blocks), latent_channels=latent_channels, patch=patch)
        self.latent_channels, self.f = latent_channels, patch * 2 ** (len(multipliers) - 1)
        self.register_buffer("scale", torch.ones(()))            # z = scale * mean; public, see measure_scale
        widths, last = [channels * m for m in multipliers], len(multipliers) - 1

        down = [nn.PixelUnshuffle(patch), nn.Conv2d(image_channels * patch**2, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            down += [Block(width) for _ in range(blocks[level])]
            if level < last:
                down.append(nn.Conv2d(width, widths[level + 1], 3, stride=2, padding=1))
        down += [nn.GroupNorm(8, widths[-1]), nn.SiLU(),
                 nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*down)

        up = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for level, width in reversed(list(enumerate(widths))):
            up += [Block(width) for _ in range(blocks[level] + 1)]
            if level > 0:
                conv = nn.Conv2d(width, widths[level - 1], 3, padding=1)
                up.append(nn.Sequential(OrderedDict(twice=nn.Upsample(scale_factor=2.0), conv=conv)))
        up += [nn.GroupNorm(8, widths[0]), nn.SiLU(),
               nn.Conv2d(widths[0], image_channels * patch**2, 3, padding=1), nn.PixelShuffle(patch)]
        self.decoder = nn.Sequential(*up)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q(z | x) = N(mu(x), diag sigma^2(x)) as (mu, log sigma^2), not scaled. [Kingma & Welling, Eq. 9]"""
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        return mu, log_var.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """The image of a z that is not scaled."""
        return self.decoder(z)


def kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """(n,): KL( N(mu, sigma^2) || N(0, I) ) in nats, summed over z.        [Kingma & Welling 2014, App. B]"""
    return (0.5 * (mu.square() + log_var.exp() - 1 - log_var)).flatten(1).sum(1)


def loss(model: Autoencoder, x: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """(n,): ( |x - D(mu + sigma noise)|^2 + w KL ) / (number of values of x).   [Kingma & Welling, Eq. 10]

    noise ~ N(0, I) has z's shape, and w = kl_weight is small. The KL term keeps z from growing without bound
    and sigma from falling to 0. D thus learns to accept a z that is slightly wrong, as a sampler's is. (LDM,
    Eq. 25, has an L1 error, a perceptual loss and a discriminator.)
    """
    mu, log_var = model.encode(x)
    z = mu + (0.5 * log_var).exp() * noise                       # Kingma & Welling's reparameterisation
    error = (model.decode(z) - x).square().flatten(1).sum(1)
    return (error + kl_weight * kl(mu, log_var)) / x[0].numel()


# -----------------------------------------------------------------------------
# images <-> latents, as diffusion sees them


def latent_shape(model: Autoencoder, shape: tuple) -> tuple[int, int, int]:
    """The shape (c, h, w) of z for images of shape (C, H, W)."""
    height, width = (max(side, SIDE) // model.f for side in shape[1:])
    return model.latent_channels, height, width


def resized(x: Tensor, size: tuple, **how) -> Tensor:
    """x at another size, by bicubic interpolation: (n, C, H, W) -> (n, C, *size)."""
    near = x.cpu() if x.device.type == "mps" else x                      # mps has it since torch 2.8 only
    return F.interpolate(near, size=size, mode="bicubic", **how).to(x.device)


def as_photographs(model: Autoencoder, images: Tensor) -> Tensor:
    """What E takes: uint8 (n, C, H, W) -> float in [-1, 1], at least SIDE x SIDE.

    A grey image is copied into each of E's channels.
    """
    x = data.to_float(images)
    if x.shape[1] == 1:
        x = x.expand(-1, model.config["image_channels"], -1, -1)
    if x.shape[-1] < SIDE:
        x = resized(x, (SIDE, SIDE)).clamp(-1, 1)
    return x


@torch.no_grad()
def to_latents(model: Autoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """z = scale * mu(x) for each image: uint8 (N, C, H, W) -> float32 (N, c, h, w), on the images' device.

    Guarantee: latent i depends on image i and on public constants, and on nothing else. On a CPU this holds
               to the last bit, for which support/runs.py:private_share tests the machine. Rounding depends on
               the size of a batch, so the last batch is filled up to the size of the others. An image that
               two threads encode together is rounded differently, so each thread gets whole images
    """
    device = model.scale.device
    batch += -batch % devices.threads(device)
    z = torch.empty(len(images), *latent_shape(model, images.shape[1:]), device=images.device)
    for start in screen.bar(range(0, len(images), batch), "z = E(x)", "batch"):
        part = images[start:start + batch]
        full = F.pad(part, (0, 0) * 3 + (0, batch - len(part))).to(device)
        mu, _ = model.encode(as_photographs(model, full))
        z[start:start + batch] = (model.scale * mu)[:len(part)].to(z.device)
    return z


@torch.no_grad()
def to_images(model: Autoencoder, z: Tensor, shape: tuple, batch: int = 64) -> Tensor:
    """D(z / scale) as uint8 images of `shape`, (C, H, W): float (n, c, h, w) -> (n, *shape).

    Images that were enlarged for E are shrunk again. A grey image is the mean of D's channels.
    """
    parts = []
    for part in screen.bar(z.split(batch), "x = D(z)", "batch"):
        x = model.decode(part.to(model.scale.device) / model.scale)
        if x.shape[-1] > shape[-1]:
            x = resized(x, shape[1:], antialias=True)
        if shape[0] == 1:
            x = x.mean(1, keepdim=True)
        parts.append(data.to_uint8(x))
    return torch.cat(parts)


@torch.no_grad()
def measure_scale(model: Autoencoder, public_images: Tensor) -> None:
    """Set the scale to 1 / (standard deviation of mu over PUBLIC images).

    z then has a standard deviation of 1, like the diffusion's noise.

    Source: Rombach et al. 2022, App. G. They measure it on the first training batch, which in a private run
            would be a leak
    """
    model.scale.fill_(1)
    model.scale.fill_(1 / to_latents(model, public_images).std().item())


def psnr(images: Tensor, others: Tensor) -> float:
    """Mean over the images of 10 log10(255^2 / mean squared error), in dB.

    Shapes: images, others uint8 (N, C, H, W)
    """
    mse = (images.float() - others.float()).square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * mse.clamp(min=1e-9).log10()).mean().item()


# -----------------------------------------------------------------------------
# on disk: half precision, which halves the file and does not visibly change an image


def state(model: Autoencoder) -> dict:
    """Shape and weights, for a file: in float16, except the scale, which stays as it was measured."""
    weights = {name: p.detach().cpu().half() for name, p in model.state_dict().items()}
    return dict(config=model.config, model=dict(weights, scale=model.scale.detach().cpu().clone()))


def from_state(saved: dict) -> Autoencoder:
    """The autoencoder that `state` describes, frozen: private data never change a weight of E or D."""
    model = Autoencoder(**saved["config"])
    model.load_state_dict(saved["model"])
    return model.requires_grad_(False)


def load(path: Path) -> Autoencoder:
    """Read the autoencoder in `path`, which is a file of its own or a base that was trained in its latents.

    Errors: a missing, truncated or foreign file, or a base that works in pixels -> ValueError in one line
    """
    if not Path(path).is_file():
        raise ValueError(f"no autoencoder at {path}; make one with `python pretrain.py autoencoder`")
    try:
        return from_state(torch.load(path, map_location="cpu", weights_only=True)["autoencoder"])
    except Exception as e:
        raise ValueError(f"{path} holds no autoencoder ({screen.cause(e)}); expected a file written by "
                         f"`python pretrain.py autoencoder`, or a base that works in latents") from None


if __name__ == "__main__":
    from torchvision.utils import save_image
    model = load(data.ASSETS / "photos.pt")                      # the autoencoder of the base of photos
    images = data.load("cells", "test")[0][::178]                # 16 blood cells; it was not trained on them
    z = to_latents(model, images)
    back = to_images(model, z, images.shape[1:])
    print(f"x {tuple(images.shape[1:])} -> z {tuple(z.shape[1:])}: f = {model.f}, so {model.f**2} times "
          f"fewer positions, and {images[0].numel() // z[0].numel()} times fewer numbers")
    print(f"z has standard deviation {z.std():.2f} on these cells, and 1 on public photographs")
    Path("runs").mkdir(exist_ok=True)
    save_image(torch.cat([images, back]).float() / 255, "runs/autoencoder.png", nrow=16)
    print(f"D(E(x)) has a PSNR of {psnr(images, back):.1f} dB; runs/autoencoder.png: blood cells above, "
          f"D(E(x)) below")
