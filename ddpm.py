"""ddpm.py -- noise an image; undo it.

Denoising diffusion (Ho et al. 2020, "DDPM"), sampling by DDIM (Song et al. 2021), and the UNet that
predicts the noise (Dhariwal & Nichol 2021, "ADM"). Nothing here knows about privacy.

  $ python ddpm.py            # an image at eight noise levels, and back: runs/ddpm.png
"""
import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import autoencoder
import checkpoint

# -----------------------------------------------------------------------------
# 1. the forward process: x_0 -> x_t


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much signal is left at each of the T steps; t = 0 is the least noisy, t = T - 1 nearly pure noise.

    kind "linear":  beta rises linearly from 0.0015 to 0.0195 over T steps   [the paper; its released code is
                    linear in sqrt(beta), and ends at 0.0155 for MNIST and CIFAR-10]
    kind "cosine":  alpha_bar(t) = cos^2( (t/T + s)/(1 + s) pi/2 ), s = 0.008      [Nichol & Dhariwal 2021]
    """
    T: int = 1000
    kind: str = "linear"

    @functools.cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) float32: alpha_bar_t = prod_{s<=t} (1 - beta_s), the share of signal variance left after step t."""
        if self.T < 1:
            raise ValueError(f"Schedule: T = {self.T}, expected at least 1 step")
        if self.kind == "linear":
            beta = torch.linspace(0.0015, 0.0195, self.T, dtype=torch.float64) * (1000 / self.T)
        elif self.kind == "cosine":
            f = torch.cos((torch.arange(self.T + 1, dtype=torch.float64) / self.T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"Schedule: kind = {self.kind!r}, expected 'linear' or 'cosine'")
        return (1 - beta.clamp(max=0.999)).cumprod(0).float()


LINEAR = Schedule()
TIMESTEPS = ("uniform", "middle")                                       # how training draws t: see t_of
WEIGHTINGS = ("flat", "even")                                           # how its losses are weighted: see loss


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule = LINEAR) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise: t steps of noising at once.   [DDPM Eq. 4]

    Shapes: x0, noise (..., C, H, W), t (...) -> (..., C, H, W); leading dimensions broadcast
    """
    a = schedule.alpha_bar.to(x0.device)[t][..., None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def t_of(u: Tensor, timesteps: str = "uniform", schedule: Schedule = LINEAR) -> Tensor:
    """The K values of t of each image, on 0..T-1, made from uniform numbers.   [DDPM Alg. 1]

    They come from K equal slices of their law, one each, so that their mean loss has the same expectation
    as with independent draws and varies less.                    [stratified sampling; compare Kingma et al. 2021]
    timesteps "uniform":  t/T uniform on [0, 1)                                                [DDPM, the paper]
    timesteps "middle":   t/T as Beta(2, 3): 82% of the draws are at t = 100 to 650, where shape is decided, in place
                          of 55%                                                 [after Choi et al. 2022]
    Shapes: u (n, K) in [0, 1) -> (n, K) int64
    """
    K = u.shape[1]
    if K < 1 or timesteps not in TIMESTEPS:
        raise ValueError(f"t_of: K = {K}, timesteps = {timesteps!r}, expected at least 1 draw per image, "
                         f"{' or '.join(TIMESTEPS)}")
    slices = (torch.arange(K, device=u.device) + u) / K
    if timesteps == "uniform":
        t = (schedule.T * slices).long()
    else:
        x = torch.arange(1, schedule.T + 1, device=u.device) / schedule.T
        below = x**2 * (6 - 8 * x + 3 * x**2)                            # P(t < 1), ..., P(t < T)
        t = torch.searchsorted(below, slices, right=True)
    return t.clamp(max=schedule.T - 1)                                   # the last slice can round up to 1


def draw_t_and_noise(x0: Tensor, K: int, generator: torch.Generator | None = None,
                     schedule: Schedule = LINEAR, timesteps: str = "uniform") -> tuple[Tensor, Tensor]:
    """K draws of (t, noise) for each image: noise ~ N(0, I), t as in `t_of`. For public images: what an image
    gets depends on who comes before it; private ones get theirs from draws.py.

    Shapes: x0 (n, C, H, W) -> t (n, K) int64, noise (n, K, C, H, W)
    """
    t = t_of(torch.rand((len(x0), K), device=x0.device, generator=generator), timesteps, schedule)
    return t, torch.randn((len(x0), K, *x0.shape[1:]), device=x0.device, generator=generator)


def loss(model, x0: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor, schedule: Schedule = LINEAR,
         weighting: str = "flat") -> Tensor:
    """Each image's loss: the mean over its K draws of w(t) ||noise - model(x_t, t, label)||^2 / (CHW).  [DDPM Eq. 14]

    The mean over K is taken here, inside one image's loss, so that one image still has ONE gradient
    for dpsgd.py to clip: K draws cost no extra privacy.          [noise multiplicity, Dockhorn et al. 2023, Sec. 3.2]
    weighting "flat":  w(t) = 1                                                                [DDPM, the paper]
    weighting "even":  w(t) = min(sqrt((1 - alpha_bar_t) / alpha_bar_t), 10), about one over the length of the gradient
                       at t: no draw outvotes the image's others. Made for K > 1 and clipping [compare Hang et al. 2023]
    Shapes: x0 (n, C, H, W), labels (n,) or None, t (n, K), noise (n, K, C, H, W) -> (n,)
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"loss: weighting = {weighting!r}, expected {' or '.join(WEIGHTINGS)}")
    n, K = t.shape
    x_t = q_sample(x0[:, None], t, noise, schedule)                        # (n, K, C, H, W)
    labels = None if labels is None else labels[:, None].expand(n, K).reshape(n * K)
    predicted = model(x_t.reshape(n * K, *x0.shape[1:]), t.reshape(n * K), labels)   # (n K, C, H, W)
    errors = (predicted.reshape(noise.shape) - noise).square().flatten(2).mean(2)          # (n, K)
    if weighting == "even":
        a = schedule.alpha_bar.to(x0.device)[t]
        errors = errors * ((1 - a) / a).sqrt().clamp(max=10)
    return errors.mean(1)


# -----------------------------------------------------------------------------
# 2. the reverse process: noise -> image


def predict_noise(model, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """(1 + w) eps(x_t, label) - w eps(x_t, null), w = guidance; w = 0 is the plain model.   [Ho & Salimans 2022, Eq. 6]"""
    if guidance == 0 or labels is None:
        return model(x_t, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.classes)])
    with_label, without = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return (1 + guidance) * with_label - guidance * without


@torch.no_grad()
def ddim_sample(model, labels: Tensor | None, shape: tuple, steps: int = 50, eta: float = 1.0, guidance: float = 0.0,
                generator: torch.Generator | None = None, schedule: Schedule = LINEAR, order: int = 1) -> Tensor:
    """From noise to images in `steps` jumps; eta = 0 is deterministic, eta = 1 as random as DDPM.   [DDIM Eq. 12]

    Starts at t = T - 1, the noisiest level that training visits; the last jump goes to alpha_bar = 1 and adds no noise.
    order = 2, with eta = 0: the image that is aimed for follows its trend since the last jump, so that the error falls with
    the square of 1/steps. The default, order = 1, is DDIM.                          [DPM-Solver++(2M), Lu et al. 2022, Alg. 2]
    Shapes: labels (n,) or None, shape = (n, C, H, W) -> (n, C, H, W) in [-1, 1]
    Errors: steps outside 1..T, eta or guidance < 0, order 2 with eta > 0 -> ValueError
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps = {steps}, expected 1 to {schedule.T}")
    if not (0 <= eta < math.inf and 0 <= guidance < math.inf):
        raise ValueError(f"eta = {eta}, guidance = {guidance}, expected numbers >= 0")
    if order not in (1, 2) or order == 2 and eta > 0:
        raise ValueError(f"order = {order} with eta = {eta}, expected 1, or 2 with eta = 0")
    device = next(model.parameters()).device
    x = torch.randn(shape, device=device, generator=generator)
    times = torch.linspace(schedule.T - 1, 0, steps).round().long().tolist()
    alpha_bar = [float(schedule.alpha_bar[t]) for t in times] + [1.0]
    log_snr = lambda i: 0.5 * math.log(alpha_bar[i] / (1 - alpha_bar[i]))             # lambda in the DPM-Solver papers
    previous = None
    for i, (t, a, a_next) in enumerate(zip(times, alpha_bar, alpha_bar[1:])):
        noise = predict_noise(model, x, torch.full((shape[0],), t, device=device), labels, guidance)
        x0 = seen = ((x - (1 - a) ** 0.5 * noise) / a**0.5).clamp(-1, 1)  # the image it thinks it sees
        if order == 2 and 0 < i < steps - 1:
            x0 = seen + (log_snr(i + 1) - log_snr(i)) / (log_snr(i) - log_snr(i - 1)) / 2 * (seen - previous)
        previous = seen
        noise = (x - a**0.5 * x0) / (1 - a) ** 0.5                        # the noise that agrees with it
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5  # DDIM Eq. 16; 0 at the last step
        x = a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * noise
        if sigma > 0:
            x = x + sigma * torch.randn(shape, device=device, generator=generator)
    return x


def ddpm_sample(model, labels: Tensor | None, shape: tuple, guidance: float = 0.0,
                generator: torch.Generator | None = None, schedule: Schedule = LINEAR) -> Tensor:
    """All T reverse steps with the posterior variance: DDIM with steps = T and eta = 1.   [DDPM Alg. 2; DDIM Sec. 4.1]"""
    return ddim_sample(model, labels, shape, schedule.T, 1.0, guidance, generator, schedule)


# -----------------------------------------------------------------------------
# 3. the network


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies: (n,) -> (n, width).   [Transformer Sec. 3.5]"""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm( conv(silu(norm(x))) + embedding ))): (n, c_in, h, w), (n, e) -> (n, c_out, h, w)."""

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
    """x + proj(softmax(Q K^T / sqrt(d)) V), pixels as tokens: (n, c, h, w) -> the same.   [Vaswani et al. 2017, Eq. 1]

    qkv and proj are plain nn.Linear, the layers that the paper adapts. The softmax is written out:
    torch.func.vmap has no rule for the fused one.
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
        tokens = self.norm(x).flatten(2).transpose(1, 2)                                        # (n, hw, c)
        q, k, v = self.qkv(tokens).view(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # 3 x (n, heads, hw, d)
        weight = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)                     # (n, heads, hw, hw)
        tokens = self.proj((weight @ v).transpose(1, 2).reshape(n, h * w, c))                   # (n, hw, c)
        return x + tokens.transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    """Predicts the noise in x_t: model(x, t, labels), (n, C, H, W), (n,), (n,) -> (n, C, H, W).

    blocks residual blocks per level on the way down, one more on the way up; attention after each block of
    the levels in attention_levels (0 is the finest) and in the middle. classes: number of classes, the label
    `classes` itself being the null class for guidance; None: unconditional, labels are ignored. patch: each
    patch x patch square of pixels becomes channels on the way in and pixels again on the way out. names: what
    the classes are called, in the order of their labels; a private folder's classes are found by them.
    """

    def __init__(self, image_channels: int = 1, channels: int = 32, multipliers: tuple = (1, 2), blocks: int = 1,
                 attention_levels: tuple = (1,), heads: int = 4, classes: int | None = 10, patch: int = 2,
                 names: list[str] | None = None):
        super().__init__()
        self.classes, self.patch, self.channels = classes, patch, channels
        self.config = dict(image_channels=image_channels, channels=channels, multipliers=list(multipliers),
                           blocks=blocks, attention_levels=list(attention_levels), heads=heads, classes=classes,
                           patch=patch, names=names)
        e = 2 * channels                                                 # width of the embedding of t and label
        self.time = nn.Sequential(nn.Linear(channels, e), nn.SiLU(), nn.Linear(e, e))
        self.class_embedding = nn.Embedding(classes + 1, e) if classes is not None else None

        def stage(c_in, c_out, level):
            attends = level is None or level in attention_levels
            return nn.ModuleList([ResidualBlock(c_in, c_out, e), Attention(c_out, heads) if attends else nn.Identity()])

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
        self.middle = nn.ModuleList([stage(c, c, None), nn.ModuleList([ResidualBlock(c, c, e), nn.Identity()])])
        for level, m in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(c + skips.pop(), channels * m, level))
                c = channels * m
            if level > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm_out, self.conv_out = nn.GroupNorm(8, c), nn.Conv2d(c, image_channels * patch**2, 3, padding=1)
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
    """One stage of the UNet: a strided convolution, or a residual block and its attention."""
    if isinstance(stage, nn.Conv2d):
        return stage(x)
    block, attention = stage
    return attention(block(x, embedding))


def _zero(layer: nn.Module) -> None:
    """Zero-initialised outputs: each block starts as the identity, the network as the constant 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for the network's forward and backward pass where the hardware is made for it, else float32 as ever.

    Only what runs inside is affected: losses stay float32, all of dpsgd.py's norms, sums and noise float64.
    """
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(False)
    elif device.type == "cpu":                                           # a private name: may be missing
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def save_unet(path: Path, model: UNet, weights: dict[str, Tensor] | None = None, coder=None) -> None:
    """Write a UNet's shape and weights (or other weights of that shape, such as an average); replaces `path` at once.

    With the autoencoder in whose latents it works, both go into the one file, in half precision.
    """
    weights, extra = weights or model.state_dict(), {}
    if coder is not None:
        weights, extra = {name: p.half() for name, p in weights.items()}, dict(autoencoder=autoencoder.state(coder))
    checkpoint.save(Path(path), dict(config=model.config, model=weights, **extra), mode=0o644)


GARMENTS = ["T-shirt-top", "trouser", "pullover", "dress", "coat",
            "sandal", "shirt", "sneaker", "bag", "ankle boot"]
ASSETS = Path(__file__).resolve().parent / "assets"
SHIPPED = {ASSETS / "base.pt": list("0123456789"), ASSETS / "base-clothes.pt": GARMENTS}     # their files hold no names


def load_unet(path: Path) -> UNet:
    """Read what `save_unet` wrote; weights only, no code is unpickled. A relative path that is not found from
    here is looked for beside the code, so that assets/base.pt is found from any directory.

    Errors: missing, truncated or foreign file -> ValueError in one line
    """
    beside = Path(__file__).parent / path                                # `path` itself if that is absolute
    path = beside if not Path(path).exists() and beside.is_file() else path
    if not Path(path).is_file():
        raise ValueError(f"no base model at {path}; make one with `python pretrain.py` or pass --base")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = UNet(**saved["config"])
        model.config["names"] = model.config["names"] or SHIPPED.get(Path(path).resolve())
        model.load_state_dict(saved["model"])
    except Exception as e:
        raise ValueError(f"{path} is not a base model of this project ({type(e).__name__}); "
                         f"expected a file written by `python pretrain.py`") from None
    return model


class EMA:
    """Running average of parameters: shadow <- d shadow + (1 - d) value, d = min(decay, (1 + n) / (10 + n)).

    The warm-up (n counts updates) lets the average forget its start. Update once per optimiser step.
    """

    def __init__(self, params: dict[str, Tensor], decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, params: dict[str, Tensor]) -> None:
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, p in params.items():
            self.shadow[name].lerp_(p, 1 - d)

    @contextlib.contextmanager
    def applied(self, params: dict[str, Tensor]):
        """Inside the `with`, params hold the average; afterwards, what they held before."""
        before = {name: p.detach().clone() for name, p in params.items()}
        copy = lambda values: [p.data.copy_(values[name]) for name, p in params.items()]
        copy(self.shadow)
        try:
            yield
        finally:
            copy(before)


if __name__ == "__main__":
    from torchvision.utils import save_image
    import data
    x0, labels = data.glyphs(10, torch.Generator().manual_seed(4))
    t = torch.tensor([0, 50, 100, 200, 300, 450, 650, 999])
    x_t = q_sample(x0[:, None], t.expand(10, 8), torch.randn(10, 8, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    print("  t     alpha_bar   signal : noise")
    for step in t.tolist():
        a = LINEAR.alpha_bar[step].item()
        print(f"{step:4d}   {a:10.6f}   {'#' * round(40 * a):<40}|")
    try:
        model = load_unet(data.ASSETS / "base.pt")
        back = ddim_sample(model, labels, x0.shape, steps=50, generator=torch.Generator().manual_seed(0))
    except ValueError as e:
        back = torch.zeros_like(x0)
        print(e)
    rows = torch.cat([x_t.flatten(0, 1).view(10, 8, 1, 28, 28), back[:, None]], 1).flatten(0, 1)
    os.makedirs("runs", exist_ok=True)
    save_image((rows.clamp(-1, 1) + 1) / 2, "runs/ddpm.png", nrow=9)
    print("runs/ddpm.png: ten images at these eight t, and in the last column what the public model makes of pure noise")
