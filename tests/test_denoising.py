"""Property tests of benchmarks/denoising.py: all settings are compared alike."""
import sys

import pytest
import torch

import ddpm
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import denoising  # noqa: E402

IMAGES = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 10


def test_a_network_that_predicts_nothing_loses_the_noises_own_variance_at_every_t():
    losses = denoising.denoising_losses(lambda x_t, t, label: torch.zeros_like(x_t), IMAGES, LABELS)
    expected = [1.0] * len(denoising.TIMESTEPS)
    assert losses == pytest.approx(expected, abs=0.03)                   # 64 x 784 draws: 5 standard errors


def test_a_network_that_knows_the_image_loses_nothing():
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise, solved for the noise, at each t that is asked."""
    x0 = IMAGES.float() / 127.5 - 1
    def solve(x_t, t, label):
        a = ddpm.LINEAR.alpha_bar[t].float()[:, None, None, None]
        return (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    assert max(denoising.denoising_losses(solve, IMAGES, LABELS)) < 1e-4


def test_the_size_of_the_batches_changes_nothing():
    blind = lambda x_t, t, label: 0.3 * x_t
    at_once = denoising.denoising_losses(blind, IMAGES, LABELS)
    assert denoising.denoising_losses(blind, IMAGES, LABELS, batch=7) == pytest.approx(at_once, rel=1e-5)
