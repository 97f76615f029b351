"""Properties of the draws that belong to one image: whose they are, and their laws."""
import numpy as np
import pytest
import scipy.stats
import torch

import ddpm
import train
from machinery import draws

KEY = torch.tensor(-7)
MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The published algorithm, in whole numbers that cannot overflow.        [Steele, Lea & Flood 2014]"""
    words = []
    for k in range(1, count + 1):
        z = (seed + k * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        words.append(z ^ (z >> 31))
    return words


def pictures(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_outputs_are_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(1234567, 3) == published
    seeds = [0, 1, -1, 2**63 - 1, -2**63, 1234567]
    found = draws.outputs(torch.tensor(seeds), 2, 3).tolist()
    for seed, row in zip(seeds, found):
        assert [word & MASK for word in row] == splitmix64(seed & MASK, 5)[2:], seed


@pytest.mark.parametrize("lot", [[3], [3, 0], [7, 1, 3], list(range(8))], ids=str)
def test_an_images_draws_do_not_depend_on_who_else_is_in_the_lot_or_where_it_stands(lot, monkeypatch):
    monkeypatch.setattr(train, "DROP", 0.5)
    s, images, labels = train.Settings(K=3), pictures(8), torch.arange(8)
    alone = train.with_draws(images[3:4], labels[3:4], draws.hashes(images[3:4]), KEY, 5, 10, s)
    together = train.with_draws(images[lot], labels[lot], draws.hashes(images)[lot], KEY, 5, 10, s)
    for mine, everybodys in zip(alone, together):
        assert torch.equal(mine[0], everybodys[lot.index(3)])


@pytest.mark.parametrize("change", [dict(key=KEY + 1), dict(step=2), dict(pixel=1)], ids=str)
def test_another_key_step_or_image_has_draws_of_its_own(change):
    images = pictures(500)
    before = draws.t_noise_and_drop(draws.streams(KEY, 1, draws.hashes(images)), 2, (1, 4, 4))
    images[:, 0, 3, 3] += change.get("pixel", 0)                         # one grey level of one pixel
    streams = draws.streams(change.get("key", KEY), change.get("step", 1), draws.hashes(images))
    after = draws.t_noise_and_drop(streams, 2, (1, 4, 4))
    for one, other in zip(before, after):
        correlation = np.corrcoef(one.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 5 / one.numel() ** 0.5 and not torch.equal(one, other)


def test_an_image_is_named_by_every_bit_it_has():
    """Also where it is no picture but a latent, of float32."""
    rows = torch.randn(12).view(torch.uint8).repeat(385, 1)              # one latent, 384 bits
    for bit in range(384):
        rows[bit, bit // 8] ^= 1 << bit % 8
    assert len(set(draws.hashes(rows.view(torch.float32).view(385, 3, 2, 2)).tolist())) == 385


def test_draws_have_the_laws_they_are_said_to_have_and_the_K_of_an_image_share_nothing():
    streams = draws.streams(KEY, 1, draws.hashes(pictures(4000)))
    u, noise, drop = draws.t_noise_and_drop(streams, 2, (1, 3, 3))       # 9: an odd number
    for uniform in (u.flatten(), drop):
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-3 and noise.isfinite().all()
    columns = torch.cat([u, drop[:, None], noise.flatten(1)], dim=1)     # 2 + 1 + 18 numbers an image
    between = np.corrcoef(columns.T.numpy()) - np.eye(columns.shape[1])
    assert abs(between).max() < 5 / 4000**0.5, "two numbers of an image go together"


def test_a_label_is_dropped_image_by_image_at_the_declared_rate():
    zeros, s = torch.zeros(4000, dtype=torch.int64), train.Settings()
    images = pictures(4000)
    labels = train.with_draws(images, zeros, draws.hashes(images), KEY, 1, 10, s)[1]
    assert set(labels.tolist()) == {0, 10}
    assert abs((labels == 10).float().mean() - train.DROP) < 5 * (0.09 / 4000) ** 0.5


@pytest.mark.parametrize("how", ddpm.DRAWS)
def test_t_is_made_of_the_images_own_uniforms_as_declared(how):
    s, images = train.Settings(K=2, draws=how), pictures(50)
    u = draws.t_noise_and_drop(draws.streams(KEY, 1, draws.hashes(images)), 2, (1, 4, 4))[0]
    t = train.with_draws(images, torch.zeros(50, dtype=torch.int64), draws.hashes(images), KEY, 1, 10, s)[2]
    assert torch.equal(t, ddpm.t_of(u, ddpm.DRAWS[how].law))
