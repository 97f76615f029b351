"""ddpm.py -- add noise to images, and turn noise into new images.

This is denoising diffusion (Ho et al. 2020, "DDPM") with sampling by DPM-Solver++ (Lu et al. 2022, the
default) or DDIM (Song et al. 2021). It works with any network that predicts the noise; unet.py has one. No
code here depends on privacy, but some comments say what matters for it.

  $ python ddpm.py            # ten images at eight noise levels, and ten new ones: runs/ddpm.png
"""
import contextlib
import dataclasses
import functools
import math
import os
from typing import Callable, NamedTuple

import torch
from torch import Tensor

# -----------------------------------------------------------------------------
# 1. the forward process: x_0 -> x_t


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much signal is left at each of the T noise levels; t = 0 is the least noisy, T - 1 the noisiest.

    At t = 0 an image already has one small step of noise; DDPM calls it x_1. The image without noise is x_0.

    kind "linear":  beta rises linearly from 0.0015 to 0.0195, times 1000/T, as the DP-LoRA paper says (Tsai
                    et al. 2025; Ho et al. have 0.0001 to 0.02). Its released code is linear in sqrt(beta),
                    and ends at 0.0155 for MNIST and CIFAR-10.
    kind "cosine":  alpha_bar_t = f(t + 1)/f(0), f(t) = cos^2( (t/T + s)/(1 + s) pi/2 ), s = 0.008, but no
                    beta is above 0.999                                            [Nichol & Dhariwal 2021]
    Errors:         T < 1, or another kind -> ValueError when alpha_bar is first used
    """
    T: int = 1000
    kind: str = "linear"

    @functools.cached_property
    def alpha_bar(self) -> Tensor:
        """(T,) float32: alpha_bar_t = prod_{s<=t} (1 - beta_s), the share of signal variance left at t."""
        if self.T < 1:
            raise ValueError(f"Schedule: T = {self.T}, expected at least 1 step")
        if self.kind == "linear":
            beta = torch.linspace(0.0015, 0.0195, self.T, dtype=torch.float64) * (1000 / self.T)
        elif self.kind == "cosine":
            share = torch.arange(self.T + 1, dtype=torch.float64) / self.T
            f = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"Schedule: kind = {self.kind!r}, expected 'linear' or 'cosine'")
        return (1 - beta.clamp(max=0.999)).cumprod(0).float()


LINEAR = Schedule()


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule = LINEAR) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise: t + 1 small steps at once.    [DDPM Eq. 4]

    Shapes: x0, noise (..., C, H, W), t (...) -> (..., C, H, W); leading dimensions broadcast
    """
    a = schedule.alpha_bar.to(x0.device)[t][..., None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


# The next functions say how training draws t, and how it weights the loss at t.


def uniform(u: Tensor, T: int) -> Tensor:
    """t is uniform on 0, ..., T - 1: u in [0, 1) -> t.                                     [DDPM, DP-LoRA]"""
    return (T * u).long()


def middle(u: Tensor, T: int) -> Tensor:
    """t/T has the distribution Beta(2, 3): u in [0, 1) -> t.                       [after Choi et al. 2022]

    82% of the draws are at t = 100 to 650 of 1000, where the shape is decided. With `uniform` it is 55%.
    """
    x = torch.arange(1, T + 1, device=u.device) / T
    below = x**2 * (6 - 8 * x + 3 * x**2)                                # P(t < 1), ..., P(t < T)
    return torch.searchsorted(below, u, right=True)


def flat(a: Tensor) -> Tensor:
    """w(t) = 1, for a = alpha_bar_t.                                                       [DDPM, DP-LoRA]"""
    return torch.ones_like(a)


def even(a: Tensor) -> Tensor:
    """w(t) = min(sqrt((1 - a) / a), 10), for a = alpha_bar_t.                  [compare Hang et al. 2023]

    The length of the gradient at t is roughly proportional to 1/w(t), so with this weight all draws of an
    image count about equally. It is made for K > 1 with clipping.
    """
    return ((1 - a) / a).sqrt().clamp(max=10)


class Draws(NamedTuple):
    """How training draws t, and how it weights the loss at t."""
    law: Callable                # (u, T) -> t
    weight: Callable             # alpha_bar_t -> w(t)


# To add a distribution of t or a weight, add a row here.
DRAWS = {"paper": Draws(uniform, flat), "middle": Draws(middle, flat), "even": Draws(uniform, even),
         "middle-even": Draws(middle, even)}


def t_of(u: Tensor, law: Callable = uniform, schedule: Schedule = LINEAR) -> Tensor:
    """The K values of t of each image, in 0..T-1, made from uniform numbers by `law`.          [DDPM Alg. 1]

    The distribution is cut into K equal slices and each slice gives one value (stratified sampling; compare
    Kingma et al. 2021). The mean loss over the K values then has the same expectation as with independent
    values, and varies less.
    Shapes: u (n, K) in [0, 1) -> (n, K) int64
    Errors: K < 1 -> ValueError
    """
    K = u.shape[1]
    if K < 1:
        raise ValueError(f"t_of: K = {K}, expected at least 1 draw per image")
    slices = (torch.arange(K, device=u.device) + u) / K
    return law(slices, schedule.T).clamp(max=schedule.T - 1)             # the last slice can round up to 1


def draw_t_and_noise(x0: Tensor, K: int, generator: torch.Generator | None = None,
                     schedule: Schedule = LINEAR, law: Callable = uniform) -> tuple[Tensor, Tensor]:
    """K draws of (t, noise) for each image: noise ~ N(0, I), and t as in `t_of`.

    The draws of an image depend on the order of the batch, so use this for public images only. The draws of
    private images come from machinery/draws.py.
    Shapes: x0 (n, C, H, W) -> t (n, K) int64, noise (n, K, C, H, W)
    """
    t = t_of(torch.rand((len(x0), K), device=x0.device, generator=generator), law, schedule)
    return t, torch.randn((len(x0), K, *x0.shape[1:]), device=x0.device, generator=generator)


def loss(model, x0: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor, schedule: Schedule = LINEAR,
         weight: Callable = flat) -> Tensor:
    """Each image's loss: the mean over its K draws of w(t) ||noise - model(x_t, t, label)||^2 / (CHW).

    The mean is taken here, inside the loss of one image, so one image still has ONE gradient for dpsgd.py to
    clip. The K draws therefore cost no extra privacy.
    weight: alpha_bar_t -> w(t); `flat` or `even`
    Shapes: x0 (n, C, H, W), labels (n,) or None, t (n, K), noise (n, K, C, H, W) -> (n,)
    Source: DDPM Eq. 14; the mean over K draws is noise multiplicity, Dockhorn et al. 2023, Sec. 3.2
    """
    n, K = t.shape
    x_t = q_sample(x0[:, None], t, noise, schedule)                      # (n, K, C, H, W)
    if labels is not None:
        labels = labels[:, None].expand(n, K).reshape(n * K)
    predicted = model(x_t.reshape(n * K, *x0.shape[1:]), t.reshape(n * K), labels)    # (n K, C, H, W)
    errors = (predicted.reshape(noise.shape) - noise).square().flatten(2).mean(2)     # (n, K)
    return (weight(schedule.alpha_bar.to(x0.device)[t]) * errors).mean(1)


# -----------------------------------------------------------------------------
# 2. the reverse process: noise -> image


def predict_noise(model, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """(1 + w) eps(x_t, label) - w eps(x_t, null), with w = guidance.     [Ho & Salimans 2022, Eq. 6]"""
    if guidance == 0 or labels is None:
        return model(x_t, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.classes)])
    with_label, without = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return (1 + guidance) * with_label - guidance * without


@torch.no_grad()
def ddim_sample(model, labels: Tensor | None, shape: tuple, steps: int = 50, eta: float = 1.0,
                guidance: float = 0.0, generator: torch.Generator | None = None,
                schedule: Schedule = LINEAR, limit: float = 1.0) -> Tensor:
    """Images from noise in `steps` jumps.                                                      [DDIM Eq. 12]

    Sampling starts at t = T - 1, the noisiest level that training visits. The last jump goes to
    alpha_bar = 1 and adds no noise.
    eta:    0 is deterministic, 1 is as random as DDPM; above 1, a negative number under the square root of
            Eq. 12 is replaced by 0
    limit:  no image has values beyond it; it is 1 for pixels and autoencoder.LIMIT for latents
    Shapes: labels (n,) or None, shape = (n, C, H, W) -> (n, C, H, W) in [-limit, limit]
    Errors: steps outside 1..T, eta or guidance < 0 -> ValueError
    """
    if not (0 <= eta < math.inf and 0 <= guidance < math.inf):
        raise ValueError(f"eta = {eta}, guidance = {guidance}, expected numbers >= 0")
    device = next(model.parameters()).device
    x = torch.randn(shape, device=device, generator=generator)
    for t, a, a_next in jumps(steps, schedule):
        noise = predict_noise(model, x, torch.full((shape[0],), t, device=device), labels, guidance)
        x0 = ((x - (1 - a) ** 0.5 * noise) / a**0.5).clamp(-limit, limit)  # the image that x and noise imply
        noise = (x - a**0.5 * x0) / (1 - a) ** 0.5                        # the noise that agrees with it
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5  # DDIM Eq. 16; 0 at the last step
        x = a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * noise
        if sigma > 0:
            x = x + sigma * torch.randn(shape, device=device, generator=generator)
    return x


@torch.no_grad()
def dpm_sample(model, labels: Tensor | None, shape: tuple, steps: int = 50, eta: float = 0.0,
               guidance: float = 0.0, generator: torch.Generator | None = None, schedule: Schedule = LINEAR,
               limit: float = 1.0) -> Tensor:
    """DDIM with eta = 0, made second order.               [DPM-Solver++(2M), Lu et al. 2022, Alg. 2]

        D = x0 + h / (2 h_last) (x0 - last_x0),    h = lambda_next - lambda,    lambda = log sqrt(a / (1 - a))

    h_last is the h of the jump before. A jump of DDIM goes towards x0, the image that x and the predicted
    noise imply. Here it goes towards D, which is x0 extrapolated to the middle of the jump; that is the
    update of Alg. 2. The error then falls with the square of 1/steps. At the first jump there is no last_x0,
    and at the last one lambda_next is infinite, so these two are jumps of DDIM.
    eta is not used, because only the start is random. Shapes, Errors: as ddim_sample
    """
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance = {guidance}, expected a number >= 0")
    device = next(model.parameters()).device
    x = torch.randn(shape, device=device, generator=generator)
    last_x0, last_lam = None, None
    for t, a, a_next in jumps(steps, schedule):
        noise = predict_noise(model, x, torch.full((shape[0],), t, device=device), labels, guidance)
        x0 = ((x - (1 - a) ** 0.5 * noise) / a**0.5).clamp(-limit, limit)
        lam = half_log_snr(a)
        D = x0
        if last_x0 is not None and a_next < 1:                       # not at the first jump, nor the last
            D = x0 + (half_log_snr(a_next) - lam) / (lam - last_lam) / 2 * (x0 - last_x0)
        noise = (x - a**0.5 * D) / (1 - a) ** 0.5
        x = a_next**0.5 * D + (1 - a_next) ** 0.5 * noise
        last_x0, last_lam = x0, lam
    return x


def jumps(steps: int, schedule: Schedule) -> list[tuple[int, float, float]]:
    """(t, alpha_bar at t, alpha_bar after the jump) for each jump from t = T - 1 down to the image itself.

    Errors: steps outside 1..T -> ValueError
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps = {steps}, expected 1 to {schedule.T}")
    times = torch.linspace(schedule.T - 1, 0, steps).round().long().tolist()
    alpha_bar = [float(schedule.alpha_bar[t]) for t in times] + [1.0]
    return list(zip(times, alpha_bar, alpha_bar[1:]))


def half_log_snr(a: float) -> float:
    """lambda of the DPM-Solver papers: the log of the ratio of amplitudes, which is half of log SNR."""
    return 0.5 * math.log(a / (1 - a))


def ddpm_sample(model, labels: Tensor | None, shape: tuple, steps: int = 1000, eta: float = 1.0,
                guidance: float = 0.0, generator: torch.Generator | None = None,
                schedule: Schedule = LINEAR, limit: float = 1.0) -> Tensor:
    """DDPM's sampler, which is DDIM with steps = T and eta = 1.             [DDPM Alg. 2; DDIM Sec. 4.1]

    Of the two variances that DDPM considers for a step, this is the smaller: that of x_{t-1} given x_t and
    x_0. steps and eta are not used. Shapes, Errors: as ddim_sample
    """
    return ddim_sample(model, labels, shape, schedule.T, 1.0, guidance, generator, schedule, limit)


# To add a sampler, add a row here. Every sampler takes the arguments of ddim_sample.
SAMPLERS = {"ddim": ddim_sample, "ddpm": ddpm_sample, "dpm": dpm_sample}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn. All of it is post-processing, so it costs no privacy."""
    sampler: str = "dpm"         # dpm (second order) needs few steps, ddim (first order) more, ddpm 1000
    steps: int = 20              # number of jumps from noise to image, 1 to 1000 (ddpm always makes 1000)
    eta: float = 1.0             # randomness of ddim: 0 is deterministic, 1 is as random as DDPM
    guidance: float = 0.5        # strength w of classifier-free guidance; 0 means none

    def check(self) -> None:
        """Raise ValueError, in one line, for a setting that has no meaning."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler {self.sampler}: expected one of {', '.join(SAMPLERS)}")
        if not 1 <= self.steps <= LINEAR.T:
            raise ValueError(f"--steps {self.steps}: expected 1 to {LINEAR.T}")
        for name in ("eta", "guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number >= 0")

    def draw(self, model, labels: Tensor | None, shape: tuple, generator: torch.Generator | None = None,
             limit: float = 1.0) -> Tensor:
        """Images or latents of `shape`, drawn by the chosen sampler."""
        return SAMPLERS[self.sampler](model, labels, shape, self.steps, self.eta, self.guidance, generator,
                                      limit=limit)


# -----------------------------------------------------------------------------
# 3. the average of the weights, with which pictures are drawn


class EMA:
    """Running average of parameters: shadow <- d shadow + (1 - d) value, d = min(decay, (1 + n) / (10 + n)).

    n counts the updates. d is small at first, so that the average forgets its start. Call `update` once per
    optimiser step.
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

    def state_dict(self) -> dict:
        """Its whole state, for a checkpoint."""
        return dict(shadow=self.shadow, updates=self.updates)

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict returned, in place."""
        self.updates = state["updates"]
        for name, p in state["shadow"].items():
            self.shadow[name].copy_(p)

    @contextlib.contextmanager
    def applied(self, params: dict[str, Tensor]):
        """Inside the `with`, params hold the average. Afterwards they hold again what they held before."""
        before = {name: p.detach().clone() for name, p in params.items()}
        put(self.shadow, params)
        try:
            yield
        finally:
            put(before, params)


def put(values: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    """params <- values, in place."""
    for name, p in params.items():
        p.data.copy_(values[name])


if __name__ == "__main__":
    from torchvision.utils import save_image
    import base
    from drawings import glyphs
    x0, labels = glyphs.draw(10, torch.Generator().manual_seed(4))
    t = torch.tensor([0, 50, 100, 200, 300, 450, 650, 999])
    noise = torch.randn(10, 8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x_t = q_sample(x0[:, None], t.expand(10, 8), noise)                  # (10, 8, 1, 28, 28)
    print("  t     alpha_bar   share of signal")
    for step in t.tolist():
        a = LINEAR.alpha_bar[step].item()
        print(f"{step:4d}   {a:10.6f}   {'#' * round(40 * a):<40}|")
    model = base.load("assets/base.pt").model
    new = ddim_sample(model, labels, x0.shape, steps=50, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([x_t, new[:, None]], 1).flatten(0, 1)
    os.makedirs("runs", exist_ok=True)
    save_image((rows.clamp(-1, 1) + 1) / 2, "runs/ddpm.png", nrow=9)
    print("runs/ddpm.png: ten images at these t; the last column has new images of the same classes, sampled "
          "from pure noise")
