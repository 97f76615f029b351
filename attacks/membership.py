"""membership.py -- a weak attack on real images: it guesses which of them were in the training set.

The score of an image is its loss under the public model minus its loss after fine-tuning. Yeom et al. 2018
use the loss itself as the score. Watson et al. 2022 subtract it from the loss under a model that was trained
without the image.

  $ python -m attacks.membership                  # without noise, and with epsilon = 1
  $ python -m attacks.membership --epsilon 10
"""
import dataclasses
import math

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

import accountant
import base
import data
import ddpm
import dpsgd
import lora
import train
import unet
from machinery import draws, screen
from machinery.secret import Secret, new_key

# few images and many steps, so that an adapter trained without noise remembers its images
MEMBERS = train.Settings(N=64, B=32, steps=400, C=0.01, K=1, lr=1e-2, delta=1e-3, epsilon=1.0)


def finetuned(s: train.Settings, sigma: float, pictures: Tensor, labels: Tensor, seed: int) -> unet.UNet:
    """A model fine-tuned by the loop of train.finetune, without files, full chunks and running average."""
    torch.manual_seed(seed)
    model = base.load(s.base).model
    lora.attach(model, lora.describe(s.train, s.rank, s.rank, model.classes is not None))
    trainable, frozen = lora.split(model)
    gradients, key = train.per_image_gradients(model, frozen, s), torch.tensor(seed)
    hashes = draws.hashes(pictures)
    secret, optimizer = Secret(new_key(seed)), torch.optim.Adam(trainable.values(), lr=s.lr)
    weights = sum(p.numel() for p in trainable.values())
    for step in screen.bar(range(s.steps), f"training with sigma = {sigma:.2f}", "step"):
        lot = dpsgd.poisson_sample(secret.coins(step, len(pictures)), s.B / s.N)
        examples = train.with_draws(pictures[lot], labels[lot], hashes[lot], key, step, model.classes, s)
        noisy = dpsgd.private_gradient(gradients, trainable, examples, C=s.C, sigma=sigma, B=s.B,
                                       normals=secret.normals(step, weights))
        for name, p in trainable.items():
            p.grad = noisy[name]
        optimizer.param_groups[0]["lr"] = s.lr * (1 - step / s.steps)
        optimizer.step()
    return model


@torch.no_grad()
def losses(model: unet.UNet, pictures: Tensor, labels: Tensor, K: int = 64) -> Tensor:
    """(n,): the loss of each image, averaged over K draws of (t, noise) that are the same for every model."""
    generator, x0 = torch.Generator().manual_seed(0), data.to_float(pictures)
    parts = screen.bar(list(zip(x0.split(8), labels.split(8))), "losses", "batch")
    return torch.cat([ddpm.loss(model, x, l, *ddpm.draw_t_and_noise(x, K, generator)) for x, l in parts])


def auc(members, others) -> float:
    """P(a member's score > another image's); ties count half. 1 is a perfect attack, 0.5 is a coin toss."""
    return float(mannwhitneyu(members, others).statistic / (len(members) * len(others)))


def membership(s: train.Settings, seed: int) -> None:
    """Print how well the attack does against the same training without noise and with it."""
    sigmas = [0.0, accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)]
    pictures, labels = (part[:2 * s.N] for part in data.load("mnist"))
    before = losses(base.load(s.base).model, pictures, labels)
    print(f"{s.N} MNIST images (members) are trained on, and {s.N} others are not; {s.steps} steps with "
          f"B = {s.B}.\nThe score of an image is how far its loss fell.\n\n"
          f"{'epsilon':>8} {'sigma':>6}  loss: members  others    AUC  advantage\n"
          f"{'(before)':>8} {'':>6} {before[:s.N].mean():>14.4f} {before[s.N:].mean():>7.4f}")
    for epsilon, sigma in zip((math.inf, s.epsilon), sigmas):
        after = losses(finetuned(s, sigma, pictures[:s.N], labels[:s.N], seed), pictures, labels)
        members, others = (before - after).split(s.N)
        middle = (before - after).median()               # guess "member" if the loss fell further
        advantage = (members > middle).float().mean() - (others > middle).float().mean()
        print(f"{epsilon:>8g} {sigma:>6.2f} {after[:s.N].mean():>14.4f} {after[s.N:].mean():>7.4f} "
              f"{auc(members, others):>6.2f} {advantage:>10.2f}")
    print(WEAK.format(error=math.sqrt((2 * s.N + 1) / 12) / s.N))        # standard deviation: Mann & Whitney


WEAK = """
AUC:       the probability that a member's loss fell further than that of another image. A perfect attack
           has 1. A coin toss has 0.5, with a standard deviation of {error:.2f}.
advantage: the share of members that are called members, minus the share of others that are.

This attack is weak: it knows only losses, and its figures are averages over images. If it succeeds without
noise, an adapter remembers the images it was trained on. If it fails with noise, that proves nothing: with so
much noise, 64 images teach the adapter little. epsilon bounds what can be found out about a single image;
python audit.py compares this bound with a stronger attack, on the private step."""


def main() -> None:
    parser = screen.Parser(__doc__)
    parser.add_argument("--epsilon", type=float, default=1.0, help="epsilon of the run with noise")
    parser.add_argument("--seed", type=int, default=0, help="seed of both runs, which makes both NOT private")
    a = parser.parse_args()
    with screen.one_line(parser.prog, "close other programs"):
        if not 0 <= a.seed < 2**32:
            raise ValueError(f"--seed {a.seed}: expected a whole number, 0 to 2^32 - 1")
        membership(dataclasses.replace(MEMBERS, epsilon=a.epsilon), a.seed)


if __name__ == "__main__":
    main()
