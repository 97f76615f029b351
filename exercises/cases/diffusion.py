"""diffusion.py -- the cases of ex01 to ex05 and ex14: noising, loss, one jump, LoRA, latents."""
import functools
import math
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from grade import Case, on
import autoencoder
import data
import ddpm
import lora
from cases.inputs import AFRESH, CHANCE, new, rand, whole

COSINE = ddpm.Schedule(T=50, kind="cosine")


def some() -> ddpm.Schedule:
    return ddpm.Schedule(T=CHANCE.randint(60, 900), kind=CHANCE.choice(("linear", "cosine")))


def noising():
    say, one = functools.partial(on, ddpm.q_sample), torch.ones(1, 1, 1, 1)
    yield say("signal alone", "the signal is scaled by the ROOT of alpha_bar, because alpha_bar is a share "
              "of variance and not of amplitude.", one, torch.tensor([500]), 0 * one)
    yield say("noise alone", "the noise is scaled by sqrt(1 - alpha_bar), so that the variances add up to 1 "
              "at every t.", 0 * one, torch.tensor([500]), one)
    yield say("two images, each at its own t", "every image has its own t, so alpha_bar[t] has to line up "
              "with the dimension that counts images: alpha_bar[t][..., None, None, None].",
              torch.ones(2, 1, 1, 2), torch.tensor([0, 999]), torch.ones(2, 1, 1, 2), on_shape=True)
    yield say("another schedule", "use the schedule that is passed in. A model has to be sampled on the "
              "schedule that it was trained on.", one, torch.tensor([20]), one, COSINE)
    yield say(AFRESH, "leading dimensions broadcast, so that the loss can noise one image K times.",
              new(2, 1, 1, 1, 2), whole(999, 2, 3), new(2, 3, 1, 1, 2), on_shape=True)
    schedule = some()
    yield say(AFRESH, "use the schedule that is passed in.", new(2, 1, 1, 2), whole(schedule.T, 2),
              new(2, 1, 1, 2), schedule)


def wants(x, t, labels):
    """Refuse shapes that a UNet would refuse."""
    if x.ndim != 4 or t.shape != x.shape[:1] or labels is not None and labels.shape != t.shape:
        given = ", ".join("None" if part is None else str(tuple(part.shape)) for part in (x, t, labels))
        raise ValueError(f"the model got x, t and labels of the shapes {given}, but expected (n K, C, H, W), "
                         f"(n K,), and (n K,) or None")


def half(x, t, labels):
    """the model x/2"""
    wants(x, t, labels)
    return x / 2


def knowing(x, t, labels):
    """the model x t/1000 + label"""
    wants(x, t, labels)
    return x * t.view(-1, 1, 1, 1) / 1000 + (0 if labels is None else labels.view(-1, 1, 1, 1))


def losses():
    say, t = functools.partial(on, ddpm.loss), torch.tensor
    yield say("one image, one draw", "noise the image, call the model, square the difference to the noise, "
              "and average over C, H, W.", half, torch.ones(1, 1, 1, 2), None, t([[500]]),
              rand(0, 1, 1, 1, 1, 2))
    yield say("one image, two draws", "an image's loss is the MEAN over its K draws. A sum makes its "
              "gradient K times as long. With two rows for two draws the image would be clipped twice and "
              "could move the sum by K C, while the noise is made for C.",
              half, torch.ones(1, 1, 1, 1), None, t([[100, 900]]), rand(1, 1, 2, 1, 1, 1), on_shape=True)
    yield say("two images", "the result has one number for each image, (n,), and not one for the lot. What "
              "is not separate cannot be clipped separately.",
              half, rand(2, 2, 1, 1, 1), None, t([[100], [900]]), rand(3, 2, 1, 1, 1, 1), on_shape=True)
    yield say("two images with labels, two draws", "rows i K to i K + K - 1 belong to image i, so its label "
              "is repeated K times in a row (0, 0, 1, 1). In the order 0, 1, 0, 1 a row gets the label of "
              "another image.",
              knowing, rand(4, 2, 1, 1, 1), t([0, 1]), t([[100, 200], [300, 900]]), rand(5, 2, 2, 1, 1, 1),
              on_shape=True)
    yield say("another schedule", "pass the schedule on to q_sample.", half, rand(6, 1, 1, 2, 2), None,
              t([[3]]), rand(7, 1, 1, 1, 2, 2), COSINE)
    yield say(AFRESH, "the rules are the same for five colour images of three draws each.", knowing,
              new(5, 3, 4, 4), whole(9, 5), whole(999, 5, 3), new(5, 3, 3, 4, 4))
    schedule = some()
    yield say(AFRESH, "pass the schedule on to q_sample.", knowing, new(2, 1, 2, 2), None,
              whole(schedule.T, 2, 2), new(2, 2, 1, 2, 2), schedule)


def ddim_step(x: Tensor, noise: Tensor, a: float, a_next: float, eta: float, fresh: Tensor) -> Tensor:
    """The repository's ddim_sample, made to take this one jump, on these levels and with these draws."""
    seen, levels = [], [a] if a_next == 1 else [a_next, a]

    class Fixed(torch.nn.Linear):                                # any module with a parameter has a device
        classes = None

        def forward(self, x_t, t, labels):
            seen.append(x_t)
            return noise
    schedule = SimpleNamespace(T=len(levels), alpha_bar=torch.tensor(levels, dtype=torch.float64))
    with mock.patch("torch.randn", side_effect=[x, fresh]):
        end = ddpm.ddim_sample(Fixed(1, 1), None, x.shape, steps=len(levels), eta=eta, schedule=schedule)
    return end if a_next == 1 else seen[1]


def jumps():
    say, pixel = functools.partial(on, ddim_step), lambda v: torch.tensor(float(v)).view(1, 1, 1, 1)
    yield say("the last jump", "at a_next = 1 all noise is gone, so the answer is the image that the model "
              "sees.", pixel(0.3), pixel(0.1), 0.25, 1.0, 0.0, pixel(9))
    yield say("a jump half-way, eta = 0", "scale the image to the new level, and add the same noise back "
              "with its new factor sqrt(1 - a_next).", pixel(0.3), pixel(0.1), 0.25, 0.64, 0.0, pixel(9))
    yield say("a guess outside [-1, 1]", "the image is clipped first. Then the noise has to be computed "
              "AGAIN from the clipped image, since otherwise the two no longer add up to x.", pixel(2),
              pixel(0.1), 0.25, 0.64, 0.0, pixel(9))
    yield say("eta = 1", "the old noise gets the factor sqrt(1 - a_next - sigma^2), so that old and fresh "
              "noise together have the variance 1 - a_next. Check sigma, too: only (1 - a_next) is divided "
              "by (1 - a).", pixel(0.3), pixel(0.1), 0.25, 0.64, 1.0,
              pixel(0.5))
    yield say("eta = 1.5", "here 1 - a_next - sigma^2 is below 0. Take max(..., 0) under the root, or the "
              "image is NaN.", pixel(0.3), pixel(0.1), 0.25, 0.64, 1.5, pixel(0.5))
    for _ in range(3):
        a = CHANCE.uniform(0.1, 0.8)
        yield say(AFRESH, "the four lines hold for all images and levels.", new(2, 1, 1, 2), new(2, 1, 1, 2),
                  a, CHANCE.uniform(a, 1), CHANCE.random(), new(2, 1, 1, 2))


# -----------------------------------------------------------------------------
# ex04, ex05: LoRA


def layer(W: Tensor, b: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> lora.LoRALinear:
    made = lora.LoRALinear(torch.nn.Linear(*W.shape[::-1]), r, lora_alpha)
    with torch.no_grad():
        for p, value in ((made.base.weight, W), (made.base.bias, b), (made.lora_A, A), (made.lora_B, B)):
            p.copy_(value)
    return made


def lora_forward(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    return layer(W, b, A, B, lora_alpha, r)(x).detach()


def merged_weight(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    model = torch.nn.Sequential(layer(W, torch.zeros(len(W)), A, B, lora_alpha, r))
    return lora.merge(model)[0].weight.detach()


def layers():
    say, eye, t = functools.partial(on, lora_forward), torch.eye(2), torch.tensor
    yield say("B = 0, the first step", "with B = 0 the layer is the public one, W x + b.", t([5., 7.]),
              eye, t([1., 2.]), t([[1., 0.]]), torch.zeros(2, 1), 1.0, 1)
    yield say("rank 1", "x goes first through A (to r numbers), then through B (to d_out numbers).",
              t([5., 7.]), eye, torch.zeros(2), t([[1., 0.]]), t([[0.], [2.]]), 1.0, 1)
    yield say("lora_alpha = 3, r = 2", "the update is scaled by lora_alpha / r, not by lora_alpha. The "
              "division lets one learning rate serve every r, if the entries of A are as large at every r. "
              "(In this repository they have standard deviation 1/r, so train.py takes lora_alpha = r.)",
              t([1., 1.]), eye, t([1., 2.]), eye, eye, 3.0, 2)
    r = CHANCE.randint(2, 3)
    yield say(AFRESH, "x has any number of leading dimensions, and its vectors are in the last one: x @ "
              "W.mT.", new(2, 2, 4), new(5, 4), new(5), new(r, 4), new(5, r), CHANCE.uniform(4, 9), r,
              on_shape=True)


def merges():
    say, t, eye = functools.partial(on, merged_weight), torch.tensor, torch.eye(2)
    yield say("rank 1", "B A is (d_out, r) times (r, d_in), which has the shape of W.", torch.zeros(2, 2),
              t([[1., 2.]]), t([[3.], [4.]]), 1.0, 1, on_shape=True)
    yield say("lora_alpha = 3, r = 2", "the scale lora_alpha / r belongs to the update, not to W.",
              eye, eye, eye, 3.0, 2)
    r = CHANCE.randint(2, 3)
    yield say(AFRESH, "the shape of W is (d_out, d_in).", new(5, 4), new(r, 4), new(5, r),
              CHANCE.uniform(4, 9), r, on_shape=True)


# -----------------------------------------------------------------------------
# ex14: latents


def private_latents(encode, public: Tensor, private: Tensor) -> Tensor:
    """The repository's two functions with this encoder in place of an autoencoder, at the images' size."""
    mu, _ = encode(data.to_float(public))
    model = SimpleNamespace(encode=encode, scale=torch.ones(()), latent_channels=mu.shape[1],
                            f=public.shape[-1] // mu.shape[-1], config=dict(image_channels=public.shape[1]))
    with mock.patch("autoencoder.SIDE", 1):                              # no enlarging
        autoencoder.measure_scale(model, public)
        return autoencoder.to_latents(model, private)


def sure(x):
    """mu = x, sigma = 0"""
    if not x.is_floating_point():
        raise TypeError(f"E got {x.dtype}, expected floats in [-1, 1]")
    return x, torch.full_like(x, -math.inf)


def unsure(x):
    """mu = x, sigma = 1"""
    return x, torch.zeros_like(x)


def doubled(x):
    """mu = (x, 10 x), two channels, sigma = 0"""
    return sure(torch.cat([x, 10 * x], dim=1))


def real(x):
    """autoencoder.Autoencoder.encode, random weights, f = 4"""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return autoencoder.Autoencoder(channels=8, blocks=(1, 1)).encode(x)


def grey(*levels: int, pixels: int = 1) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, pixels)


def encodings():
    say, public, close = functools.partial(on, private_latents), grey(0, 255), grey(102, 153)
    yield say("private images that are the public ones", "grey levels become floats in [-1, 1] before E "
              "reads them. The latent is mu(x) divided by one number, the standard deviation of mu over all "
              "public images, as .std() computes it.", sure, public, public, on_shape=True)

    def moved(f):                                # the private images may vary more than the public ones
        before, after = f(sure, close, grey(51, 102)), f(sure, close, grey(51, 102, 255))
        return (after[:2] - before).abs().max().item()
    yield Case("a white image joins two dark ones", "the two dark images did not change, so their latents "
               "must not change either. Every image has a share in a number that is measured on the private "
               "images, be it a scale or a mean. An image that joins then moves everybody's latent and "
               "everybody's gradient, while the noise hides only one image that moves the sum by C. Measure "
               "such a number on the public images.",
               {"encode": sure, "public": close, "private": "levels 51, 102; then 51, 102, 255",
                "measured": "how far the latents of 51 and 102 move"}, moved, expected=0.0)
    yield say("private images darker than the public ones", "s is that of the public images, whatever is "
              "encoded. The private latents' own standard deviation is then not 1, and must not be made 1. "
              "To scale each image by itself would keep the guarantee, but dark and bright images would get "
              "the same latent.",
              sure, grey(0, 255, 255, 0, pixels=2), grey(0, 51, 51, 102, pixels=2))
    yield say("a latent of two channels", "s is one number for all channels, because the decoder D divides "
              "by one number, z / s.", doubled, public, grey(51), on_shape=True)
    yield say("an encoder that is not sure", "the latent is the mean mu, not a draw from N(mu, sigma^2). A "
              "draw is no leak. But latents are computed once and each step adds its own noise to them, so z "
              "should be the latent from which D gives the image back best.", unsure, public, grey(51, 102))
    yield say("no private image", "the empty set is a neighbour of a set of one image. The result has no "
              "rows, but the other dimensions of latents.",
              sure, public, grey(), on_shape=True)
    yield say(AFRESH, "the rules are the same for images in colour and a real encoder.", real,
              *(whole(256, n, 3, 16, 16).to(torch.uint8) for n in (6, 5)))
