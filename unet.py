"""unet.py -- the network that predicts the noise.

It is a UNet (Ronneberger et al. 2015) of residual blocks and attention that is told t, as in Ho et al. 2020,
App. B, and also the class. The embeddings of t and of the class are added up, and the sum is added to the
features. (Dhariwal & Nichol 2021, "ADM", also scale the features by it.) Two things come from ADM: several
heads, and attention on several levels. No code in this file adds noise to images or depends on privacy.

  $ python unet.py            # what the default network is made of, part by part
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies: (n,) -> (n, width).

    Source: Vaswani et al. 2017, Sec. 3.5
    """
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(embedding)))).

    skip is the identity if c_in = c_out, else a 1 x 1 convolution.
    Shapes: x (n, c_in, h, w), embedding (n, e) -> (n, c_out, h, w)
    """

    def __init__(self, c_in: int, c_out: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(embedding, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        _zero(self.conv2)

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x))) + self.embed(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """x + proj(softmax(Q K^T / sqrt(d)) V), where each pixel is a token: (n, c, h, w) -> the same.

    qkv and proj are plain nn.Linear layers, because DP-LoRA adapts them. The softmax is written out, because
    torch.func.vmap has no rule for the backward pass of torch's fused attention.
    Errors: channels that `heads` does not divide -> ValueError
    Source: Vaswani et al. 2017, Eq. 1
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"Attention: {channels} channels cannot be split into {heads} heads")
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        _zero(self.proj)

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                         # (n, hw, c)
        qkv = self.qkv(tokens).view(n, h * w, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                     # (n, heads, hw, d) each
        weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)      # (n, heads, hw, hw)
        tokens = self.proj((weight @ v).transpose(1, 2).reshape(n, h * w, c))    # (n, hw, c)
        return x + tokens.transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    """Predicts the noise in x_t.

    Shapes: x (n, C, H, W), t (n,), labels (n,) -> (n, C, H, W)
    blocks:           residual blocks of each level on the way down; each level has one more on the way up
    attention_levels: levels on which each block is followed by attention (0 is the finest). The middle of the
                      network always has attention
    classes:          their number. The label `classes` itself is the null class, which guidance needs. With
                      None the network is unconditional and ignores labels
    patch:            each patch x patch square of pixels becomes channels on the way in, and pixels again
                      on the way out
    names:            those of the classes, in the order of their labels; a private class is found by its name
    """

    def __init__(self, image_channels: int = 1, channels: int = 32, multipliers: tuple = (1, 2),
                 blocks: int = 1, attention_levels: tuple = (1,), heads: int = 4,
                 classes: int | None = 10, patch: int = 2, names: list[str] | None = None):
        super().__init__()
        self.classes, self.patch, self.channels = classes, patch, channels
        self.config = dict(image_channels=image_channels, channels=channels,
                           multipliers=list(multipliers), blocks=blocks,
                           attention_levels=list(attention_levels), heads=heads, classes=classes,
                           patch=patch, names=names)
        e = 2 * channels                                                 # width of the two embeddings
        self.time = nn.Sequential(nn.Linear(channels, e), nn.SiLU(), nn.Linear(e, e))
        self.class_embedding = nn.Embedding(classes + 1, e) if classes is not None else None

        def stage(c_in, c_out, level):
            attends = level is None or level in attention_levels
            block = ResidualBlock(c_in, c_out, e)
            return nn.ModuleList([block, Attention(c_out, heads) if attends else nn.Identity()])

        c = channels
        self.conv_in = nn.Conv2d(image_channels * patch**2, c, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [c]
        for level, m in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(stage(c, channels * m, level))
                c = channels * m
                skips.append(c)
            if level < len(multipliers) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([stage(c, c, None)])
        self.middle.append(nn.ModuleList([ResidualBlock(c, c, e), nn.Identity()]))
        for level, m in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), channels * m, level))
                c = channels * m
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm_out = nn.GroupNorm(8, c)
        self.conv_out = nn.Conv2d(c, image_channels * patch**2, 3, padding=1)
        _zero(self.conv_out)

    def forward(self, x, t, labels=None):
        embedding = self.time(time_embedding(t, self.channels))
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.classes) if labels is None else labels
            embedding = embedding + self.class_embedding(labels)
        embedding = F.silu(embedding)

        x = self.conv_in(F.pixel_unshuffle(x, self.patch))               # (n, c, H/patch, W/patch)
        skips = [x]
        for stage in self.down:
            x = run(stage, x, embedding)
            skips.append(x)
        for stage in self.middle:
            x = run(stage, x, embedding)
        for stage in self.up:
            if isinstance(stage, nn.Conv2d):                             # to the next finer level
                x = stage(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            else:
                x = run(stage, torch.cat([x, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


def run(stage: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    """Run one stage of the UNet: a strided convolution, or a residual block and its attention."""
    if isinstance(stage, nn.Conv2d):
        return stage(x)
    block, attention = stage
    return attention(block(x, embedding))


def _zero(layer: nn.Module) -> None:
    """Set an output layer to 0: each block starts as its skip connection, the network as the constant 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


if __name__ == "__main__":
    model = UNet()
    for name, part in model.named_children():
        print(f"{name:<16} {sum(p.numel() for p in part.parameters()):>8,} weights")
    print(f"{'together':<16} {sum(p.numel() for p in model.parameters()):>8,}")
    x = torch.randn(2, 1, 28, 28)
    out = model(x, torch.tensor([0, 999]), torch.tensor([3, model.classes]))
    print(f"{tuple(x.shape)} -> {tuple(out.shape)}; the untrained network predicts {out.abs().max():g}, "
          f"because its last layer starts at 0")
