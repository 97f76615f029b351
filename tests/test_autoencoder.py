"""Property tests of autoencoder.py: what a latent depends on, and that the loss is the one in the paper."""
import copy
import math

import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn as nn

import autoencoder
import base
import data

IMAGES = torch.randint(256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
SMALL = IMAGES[:, :, :16, :16]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return autoencoder.Autoencoder(channels=8)


@pytest.mark.parametrize("patch, multipliers, f", [
    (1, (1,), 1), (1, (1, 2), 2), (2, (1,), 2), (2, (1, 2), 4), (2, (1, 1, 2), 8)])
def test_f_is_the_patch_times_two_to_the_number_of_halvings(patch, multipliers, f):
    model = autoencoder.Autoencoder(channels=8, multipliers=multipliers, blocks=(1, 1, 1), patch=patch)
    mu, log_var = model.encode(torch.zeros(2, 3, 16, 16))
    assert model.f == f and mu.shape == log_var.shape == (2, 4, 16 // f, 16 // f)
    assert model.decode(mu).shape == (2, 3, 16, 16)


def test_the_encoder_reads_one_image_alone(model):
    """Change image 2 of a batch beyond recognition: the latents of the others do not move by one bit."""
    others = torch.tensor([0, 1, 3, 4, 5])
    changed = IMAGES.clone()
    changed[2] = 255 - changed[2]
    before, after = autoencoder.to_latents(model, IMAGES), autoencoder.to_latents(model, changed)
    assert torch.equal(before[others], after[others]) and not torch.equal(before[2], after[2])


def test_no_layer_averages_over_the_batch(model):
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())


def test_kl_equals_numerical_integration():
    mu, sigma = 0.7, 0.4
    q, p = scipy.stats.norm(mu, sigma), scipy.stats.norm(0, 1)
    integrand = lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z))
    exact, _ = scipy.integrate.quad(integrand, mu - 10 * sigma, mu + 10 * sigma)
    ours = autoencoder.kl(torch.full((1, 2, 3, 3), mu), torch.full((1, 2, 3, 3), 2 * math.log(sigma)))
    assert ours.item() == pytest.approx(18 * exact, rel=1e-5)


def test_the_loss_is_the_squared_error_plus_w_times_kl_per_value_of_x(model):
    x = data.to_float(SMALL)
    noise = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    mu, log_var = model.encode(x)
    back = model.decode(mu + log_var.exp().sqrt() * noise)
    for i, value in enumerate(autoencoder.loss(model, x, noise, 0.5)):
        error, kl = (back[i] - x[i]).square().mean(), autoencoder.kl(mu[i:i + 1], log_var[i:i + 1])[0]
        expected = error + 0.5 * kl / (3 * 16 * 16)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_scaled_public_latents_have_standard_deviation_1_and_the_way_back_undoes_the_scale(model):
    autoencoder.measure_scale(model, IMAGES)
    z = autoencoder.to_latents(model, IMAGES)
    assert z.std().item() == pytest.approx(1, rel=1e-4)
    mu, _ = model.encode(data.to_float(IMAGES))
    back = autoencoder.to_images(model, z, (3, 64, 64))
    assert torch.equal(back, data.to_uint8(model.decode(z / model.scale)))
    torch.testing.assert_close(z / model.scale, mu)


def test_latents_may_lie_on_another_device_than_the_autoencoder(model):
    """The device "meta", which has shapes and no numbers, stands for a GPU."""
    back = autoencoder.to_images(copy.deepcopy(model).to("meta"), torch.zeros(2, 4, 16, 16), (3, 64, 64))
    assert back.device.type == "meta" and back.shape == (2, 3, 64, 64)


def test_a_latent_is_the_same_to_the_last_bit_in_any_company(model):
    """However many others there are, and wherever this one stands: so it depends on its image alone."""
    together = autoencoder.to_latents(model, IMAGES)
    for i in range(len(IMAGES)):
        assert torch.equal(autoencoder.to_latents(model, IMAGES[i:i + 1])[0], together[i])
    assert torch.equal(autoencoder.to_latents(model, IMAGES.flip(0)), together.flip(0))
    assert torch.equal(autoencoder.to_latents(model, IMAGES.repeat(12, 1, 1, 1))[-6:], together)


@pytest.mark.parametrize("file", ["photos.pt", "faces.pt"])
def test_on_three_threads_a_place_in_the_batch_changes_no_bit_of_a_latent(file):
    """With 64 images on three threads two of them had other bits."""
    torch.set_num_threads(3)
    try:
        z = autoencoder.to_latents(base.load(f"assets/{file}").coder, IMAGES[:1].expand(66, -1, -1, -1))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(z, z[:1].expand_as(z))


def test_a_small_images_latent_depends_on_no_other_image(model):
    """Enlarging overshoots, and what is beyond the range of pixels is cut off; not of those beside it."""
    dull = SMALL // 4 + 96
    alone, beside = (autoencoder.to_latents(model, x) for x in (dull, torch.cat([dull, SMALL])))
    assert torch.equal(alone, beside[:6])


def test_latents_are_near_the_encoders_mean_whatever_the_batch(model):
    expected = model.scale * model.encode(data.to_float(IMAGES))[0]
    for batch in (1, 4):
        ours = autoencoder.to_latents(model, IMAGES, batch)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32), (1, 64), (3, 64), (3, 96)])
def test_grey_and_small_images_become_photographs_and_come_back(model, channels, side):
    """The way there and back alone, D(E(x)) = x: a picture keeps its shape and loses little."""
    smooth = torch.linspace(0, 3, side).sin()
    images = (255 * smooth[:, None] * smooth.flip(0)).abs().to(torch.uint8).expand(2, channels, side, side)
    x = autoencoder.as_photographs(model, images)
    assert x.shape == (2, 3, max(64, side), max(64, side))
    z = torch.zeros(2, *autoencoder.latent_shape(model, images.shape[1:]))
    assert z.shape == autoencoder.to_latents(model, images).shape
    model.decode = lambda z: x
    back = autoencoder.to_images(model, z, (channels, side, side))
    assert back.shape == images.shape and (back.float() - images.float()).abs().mean() < 2


def test_a_file_gives_back_the_scale_exactly_and_the_weights_to_half_precision_frozen(model, tmp_path):
    autoencoder.measure_scale(model, IMAGES)
    torch.save(dict(autoencoder=autoencoder.state(model)), tmp_path / "autoencoder.pt")
    back = autoencoder.load(tmp_path / "autoencoder.pt")
    assert torch.equal(back.scale, model.scale)
    assert not any(p.requires_grad for p in back.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(back.get_parameter(name), p.detach().half().float())


def test_a_missing_or_foreign_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "foreign.pt").write_bytes(b"not a model")
    torch.save(dict(config={}, model={}), tmp_path / "pixels.pt")        # a base that works in pixels
    for name in ("missing.pt", "foreign.pt", "pixels.pt"):
        with pytest.raises(ValueError, match="autoencoder") as e:
            autoencoder.load(tmp_path / name)
        assert "\n" not in str(e.value)


def test_psnr_of_an_error_of_one_grey_level():
    images = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert autoencoder.psnr(images, images + 1) == pytest.approx(20 * math.log10(255), rel=1e-6)
