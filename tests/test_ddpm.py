"""Property tests of the diffusion: the forward process, the samplers, the network, the average."""
import math

import numpy as np
import pytest
import scipy.stats
import torch

import base
import ddpm
import unet
from conftest import examples, tiny_unet


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_q_sample_equals_t_one_step_kernels(kind):
    """q(x_t | x_0) composes q(x_s | x_{s-1}) = N(sqrt(1 - beta_s) x_{s-1}, beta_s).   [DDPM Eq. 2 and 4]"""
    schedule = ddpm.Schedule(T=50, kind=kind)
    a = schedule.alpha_bar.double()
    beta = 1 - a / torch.cat([torch.ones(1, dtype=torch.double), a[:-1]])
    mean, variance = 1.0, 0.0                                            # of x_t given x_0 = 1
    for t in range(50):
        mean, variance = mean * math.sqrt(1 - beta[t]), variance * (1 - beta[t]) + beta[t]
        x0, noise = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        at_zero_noise = ddpm.q_sample(x0, torch.tensor([t]), 0 * noise, schedule).item()
        per_noise = ddpm.q_sample(0 * x0, torch.tensor([t]), noise, schedule).item()
        assert at_zero_noise == pytest.approx(float(mean), rel=1e-4, abs=1e-6)
        assert per_noise == pytest.approx(math.sqrt(variance), rel=1e-4)


def test_linear_schedule_is_the_papers():
    beta = 1 - ddpm.LINEAR.alpha_bar.double()[1:] / ddpm.LINEAR.alpha_bar.double()[:-1]
    assert 1 - ddpm.LINEAR.alpha_bar[0].item() == pytest.approx(0.0015, rel=1e-3)
    assert beta[-1].item() == pytest.approx(0.0195, rel=1e-3)
    left = ddpm.LINEAR.alpha_bar[-1]
    assert left < 1e-4, "the last step must leave almost no signal: sampling starts from pure noise"


def test_draws_cover_every_t_uniformly():
    t, noise = ddpm.draw_t_and_noise(torch.zeros(5000, 1, 1, 1), 4, torch.Generator().manual_seed(0))
    assert t.shape == (5000, 4) and noise.shape == (5000, 4, 1, 1, 1)
    assert t.min() == 0 and t.max() == ddpm.LINEAR.T - 1
    counts = torch.bincount(t.flatten() // 100, minlength=10).float()
    assert ((counts - 2000).abs() < 5 * math.sqrt(2000)).all(), counts
    assert abs(noise.std().item() - 1) < 0.02


def test_middle_draws_follow_beta_2_3():
    g = torch.Generator().manual_seed(0)
    t, _ = ddpm.draw_t_and_noise(torch.zeros(5000, 1, 1, 1), 4, g, law=ddpm.middle)
    assert t.shape == (5000, 4) and t.min() >= 0 and t.max() < ddpm.LINEAR.T
    expected = 20_000 * np.diff(scipy.stats.beta(2, 3).cdf(np.linspace(0, 1, 11)))
    counts = torch.bincount(t.flatten() // 100, minlength=10).numpy()
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all(), counts


@pytest.mark.parametrize("law, exact", [
    (ddpm.uniform, scipy.stats.uniform()), (ddpm.middle, scipy.stats.beta(2, 3))])
def test_the_K_draws_of_an_image_fall_one_into_each_of_K_equal_slices_of_the_law_of_t(law, exact):
    g = torch.Generator().manual_seed(0)
    t, _ = ddpm.draw_t_and_noise(torch.zeros(500, 1, 1, 1), 5, g, law=law)
    t, edges = t.numpy() / ddpm.LINEAR.T, np.linspace(0, 1, 6)
    assert (exact.cdf(t) < edges[1:]).all() and (exact.cdf(t + 1 / ddpm.LINEAR.T) > edges[:-1] - 1e-6).all()


def test_the_rows_of_draws_pair_each_law_with_each_weight():
    rows = {(row.law, row.weight) for row in ddpm.DRAWS.values()}
    assert rows == {(law, weight) for law in (ddpm.uniform, ddpm.middle) for weight in (ddpm.flat, ddpm.even)}
    assert ddpm.DRAWS["paper"] == (ddpm.uniform, ddpm.flat)


@pytest.mark.parametrize("weight, w", [
    (ddpm.flat, lambda a: 1), (ddpm.even, lambda a: min(((1 - a) / a) ** 0.5, 10))], ids=["flat", "even"])
def test_loss_is_the_weighted_mean_over_the_K_draws_of_each_image(weight, w):
    model, (x0, labels, t, noise) = tiny_unet(), examples(3, K=4)

    def one(i, k):
        """The loss of image i's draw k."""
        x_t = ddpm.q_sample(x0[i:i + 1], t[i, k:k + 1], noise[i, k][None])
        error = model(x_t, t[i, k:k + 1], labels[i:i + 1]) - noise[i, k]
        return error.square().mean() * w(ddpm.LINEAR.alpha_bar[t[i, k]].item())
    loop = [torch.stack([one(i, k) for k in range(4)]).mean() for i in range(3)]
    torch.testing.assert_close(ddpm.loss(model, x0, labels, t, noise, weight=weight), torch.stack(loop))


class Recorder(torch.nn.Module):
    """A model that predicts a fixed share of its input as noise and writes down the t it was asked about."""

    def __init__(self):
        super().__init__()
        self.classes, self.seen, self.inputs = None, [], []
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, labels=None):
        self.seen.append(int(t[0]))
        self.inputs.append(x.double())
        return self.weight * x


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_sampling_starts_at_the_noisiest_t_of_training_and_ends_at_the_least(steps):
    model = Recorder()
    ddpm.ddim_sample(model, None, (1, 1, 2, 2), steps=steps)
    assert model.seen[0] == ddpm.LINEAR.T - 1, "training visits T - 1 and nothing above"
    assert steps == 1 or model.seen[-1] == 0
    assert len(model.seen) == steps and model.seen == sorted(set(model.seen), reverse=True)


def test_last_reverse_step_adds_no_noise(monkeypatch):
    model, drawn = Recorder(), []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(len(model.seen)) or randn(*a, **k))
    ddpm.ddim_sample(model, None, (1, 1, 2, 2), steps=5, eta=1.0)
    assert drawn == [0, 1, 2, 3, 4], "one draw to start, one after each of the first four of five model calls"


def test_ddim_with_eta_0_is_deterministic_given_the_start_and_with_eta_1_is_not():
    start = torch.randn(2, 1, 8, 8)

    def sample(eta, seed):
        generator, first = torch.Generator().manual_seed(seed), [start]
        with pytest.MonkeyPatch.context() as m:
            randn = torch.randn
            m.setattr(torch, "randn", lambda *a, **k: first.pop() if first else randn(*a, **k))
            labels = torch.tensor([1, 2])
            return ddpm.ddim_sample(tiny_unet(), labels, (2, 1, 8, 8), 10, eta, generator=generator)
    torch.testing.assert_close(sample(0.0, 1), sample(0.0, 2), atol=1e-4, rtol=0)
    assert (sample(1.0, 1) - sample(1.0, 2)).abs().max() > 0.1


def jumps_of(sampler, monkeypatch, **how):
    """(x, t, x after the jump, its t, the x_0 that x implies, the noise that was added), jump by jump."""
    model, drawn, randn = Recorder(), [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1])
    sampler(model, None, (1, 1, 2, 2), limit=1e9, **how)
    a = ddpm.LINEAR.alpha_bar.double()
    for x, t, after, s, z in zip(model.inputs, model.seen, model.inputs[1:], model.seen[1:], drawn[1:]):
        yield x, t, after, s, (x - (1 - a[t]).sqrt() * 0.5 * x) / a[t].sqrt(), z.double()


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_jump_of_ddim_has_the_mean_and_the_variance_of_eq_12_and_16(eta, monkeypatch):
    a = ddpm.LINEAR.alpha_bar.double()
    for x, t, after, s, x0, z in jumps_of(ddpm.ddim_sample, monkeypatch, steps=7, eta=eta):
        variance = eta**2 * (1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])
        mean = a[s].sqrt() * x0 + (1 - a[s] - variance).sqrt() * 0.5 * x
        torch.testing.assert_close(after, mean + variance.sqrt() * z, rtol=1e-3, atol=1e-4)


def test_ddpm_is_ddim_with_all_steps_and_eta_1(monkeypatch):
    """Each of its steps has mean and variance of the posterior q(x_{t-1} | x_t, x_0).    [DDPM Eq. 7]"""
    a, steps = ddpm.LINEAR.alpha_bar.double(), 0
    for x, t, after, s, x0, z in jumps_of(ddpm.ddpm_sample, monkeypatch):
        beta, steps = 1 - a[t] / a[s], steps + 1
        mean = (a[s].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - a[s]) * x) / (1 - a[t])
        variance = (1 - a[s]) / (1 - a[t]) * beta
        torch.testing.assert_close(after, mean + variance.sqrt() * z, rtol=1e-3, atol=1e-4)
    assert steps == 999


@pytest.mark.parametrize("name", ddpm.SAMPLERS)
def test_every_sampler_takes_the_same_arguments_and_stays_within_the_limit(name):
    """So that its name is all that the command line needs; latents go further than pixels."""
    model, labels, shape, seed = Recorder(), torch.tensor([1, 2]), (2, 1, 2, 2), torch.Generator().manual_seed
    model.classes = 10
    x = ddpm.Sampling(name, steps=3, eta=0.5, guidance=0.5).draw(model, labels, shape, seed(0), limit=5.0)
    again = ddpm.SAMPLERS[name](model, labels, shape, 3, 0.5, 0.5, seed(0), ddpm.LINEAR, 5.0)
    assert torch.equal(x, again) and x.shape == shape and 1 < x.abs().max() <= 5


def test_the_true_noise_samples_the_true_image():
    """A model that knows x_0 and reports the noise in x_t is led back to x_0 exactly."""
    x0 = torch.rand(2, 1, 4, 4) * 2 - 1

    class Oracle(Recorder):
        def forward(self, x, t, labels=None):
            a = ddpm.LINEAR.alpha_bar[t][:, None, None, None]
            return (x - a.sqrt() * x0) / (1 - a).sqrt()
    for eta in (0.0, 1.0):
        found = ddpm.ddim_sample(Oracle(), None, (2, 1, 4, 4), 20, eta)
        torch.testing.assert_close(found, x0, atol=1e-3, rtol=0)


def test_every_jump_of_ddim_lands_where_q_sample_noises_to():
    """With the true noise predicted, the sampler's x at each t is q_sample(x0, t, noise): one schedule."""
    x0, noise, seen = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4), []

    class Oracle(Recorder):
        def forward(self, x, t, labels=None):
            seen.append((x, t))
            return noise
    start = ddpm.q_sample(x0, torch.tensor([ddpm.LINEAR.T - 1] * 2), noise)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "randn", lambda *_, **__: start)
        end = ddpm.ddim_sample(Oracle(), None, x0.shape, 7, eta=0.0)
    for x, t in seen:
        torch.testing.assert_close(x, ddpm.q_sample(x0, t, noise), atol=1e-3, rtol=0)
    torch.testing.assert_close(end, x0, atol=1e-3, rtol=0)


def test_guidance_0_ignores_the_null_class_and_1_extrapolates():
    model, (x, labels, t, _) = tiny_unet(), examples(3, K=1)
    t, null = t[:, 0], torch.full_like(labels, model.classes)
    with_label, without = model(x, t, labels), model(x, t, null)
    torch.testing.assert_close(ddpm.predict_noise(model, x, t, labels, 0.0), with_label)
    guided = ddpm.predict_noise(model, x, t, labels, 1.0)
    torch.testing.assert_close(guided, 2 * with_label - without, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arguments, side", [
    (dict(), 28), (dict(classes=None, image_channels=3, blocks=2), 32),
    (dict(patch=1, attention_levels=()), 16),
    (dict(multipliers=(1, 2, 2), attention_levels=(0, 2), patch=1), 16),
    (dict(multipliers=(1,), attention_levels=(0,)), 8)])
def test_unet_keeps_the_shape_and_starts_at_zero(arguments, side):
    model = unet.UNet(**arguments)
    c = model.config["image_channels"]
    labels = torch.tensor([1, 2]) if model.classes else None
    out = model(torch.randn(2, c, side, side), torch.tensor([0, 999]), labels)
    assert out.shape == (2, c, side, side) and (out == 0).all()


def test_one_image_never_reaches_another_through_the_network():
    model, (x, labels, t, _) = tiny_unet(), examples(4, K=1)
    before = model(x, t[:, 0], labels)
    x[1] += 1
    after = model(x, t[:, 0], labels)
    changed = ((before - after).abs() > 1e-5).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]


def test_saved_unet_loads_to_the_same_function(tmp_path):
    model, (x, labels, t, _) = tiny_unet(), examples(2, K=1)
    base.save(tmp_path / "base.pt", model)
    loaded = base.load(tmp_path / "base.pt").model
    torch.testing.assert_close(loaded(x, t[:, 0], labels), model(x, t[:, 0], labels), atol=1e-5, rtol=1e-5)


def test_ema_forgets_its_start_and_then_averages():
    value = {"w": torch.zeros(1)}
    ema = ddpm.EMA(value, decay=0.5)
    value["w"] += 1
    expected = 0.0
    for n in range(20):
        ema.update(value)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d)
        assert ema.shadow["w"].item() == pytest.approx(expected, abs=1e-6)
    assert ema.shadow["w"].item() > 0.999


def test_second_order_steps_end_far_nearer_to_the_exact_flow():
    """Data N(0, s^2): the best noise prediction and the end of the deterministic flow have a closed form."""
    s, alpha_bar = 0.2, ddpm.LINEAR.alpha_bar.double()

    class Best(Recorder):
        def forward(self, x, t, labels=None):
            a = alpha_bar[t].view(-1, 1, 1, 1)
            return (1 - a).sqrt() * x / (a * s**2 + 1 - a)

    def error(steps, order):
        shape, generator = (500, 1, 1, 1), torch.Generator().manual_seed(0)
        if order == 2:
            end = ddpm.dpm_sample(Best(), None, shape, steps, generator=generator)
        else:
            end = ddpm.ddim_sample(Best(), None, shape, steps, 0.0, generator=generator)
        start = torch.randn(shape, generator=generator.manual_seed(0))
        return (end - start * s / (alpha_bar[-1] * s**2 + 1 - alpha_bar[-1]) ** 0.5).abs().mean().item()
    for steps in (10, 20, 50, 200):
        assert error(steps, 2) < error(steps, 1) / 2
    assert error(200, 2) < 0.01 * s


@pytest.mark.parametrize("call", [lambda: ddpm.ddim_sample(Recorder(), None, (1, 1, 2, 2), steps=0),
                                  lambda: ddpm.ddim_sample(Recorder(), None, (1, 1, 2, 2), steps=1001),
                                  lambda: ddpm.ddim_sample(Recorder(), None, (1, 1, 2, 2), eta=-1),
                                  lambda: ddpm.dpm_sample(Recorder(), None, (1, 1, 2, 2), steps=0),
                                  lambda: ddpm.dpm_sample(Recorder(), None, (1, 1, 2, 2), guidance=math.nan),
                                  lambda: ddpm.draw_t_and_noise(torch.zeros(1, 1, 2, 2), 0),
                                  lambda: ddpm.Sampling(sampler="euler").check(),
                                  lambda: ddpm.Sampling(steps=0).check(),
                                  lambda: ddpm.Sampling(eta=math.inf).check(),
                                  lambda: ddpm.Sampling(guidance=-1).check(),
                                  lambda: ddpm.Schedule(kind="square").alpha_bar,
                                  lambda: unet.UNet(channels=8, heads=3)])
def test_what_has_no_meaning_is_a_value_error(call):
    with pytest.raises(ValueError, match="expected|cannot"):
        call()
