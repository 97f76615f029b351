"""Theorems about the mechanism's arithmetic: what float32 gave away, and float64, rounded once, does not."""
import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

import accountant
import audit
import dpsgd
import train
from conftest import ROOT

SHIPPED = [json.loads(path.read_text()) for path in sorted((ROOT / "assets").glob("*-eps*/privacy.json"))]


def coarse_noise(total, std, generator=None):
    """What it was: float32 normals, added to a float32 sum."""
    return {name: g.float() + std * torch.randn(g.shape, generator=generator) for name, g in total.items()}


def gradient_is_x(params, x):
    """A per_sample: the gradient of example x is x itself."""
    return {"w": x}


# --- exactness

def test_noise_is_std_times_the_generators_own_float64_normals_and_nothing_else():
    total = {"a": torch.zeros(3, 100_000), "b": torch.randn(7).double()}         # 300,000: two are beyond 4.5
    noisy = dpsgd.add_noise(total, 0.7, torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    for name, g in total.items():
        expected = g.double() + 0.7 * torch.randn(g.shape, dtype=torch.float64, generator=again)
        assert noisy[name].dtype == torch.float64 and torch.equal(noisy[name], expected)
    assert noisy["a"].abs().max() > 4.5 * 0.7


@pytest.mark.parametrize("m", [0, 5])
def test_a_step_is_the_clipped_sum_and_sigma_C_normals_over_B_rounded_once(m):
    x, C, sigma, B = 9 * torch.randn(m, 40), 0.03, 1.7, 12
    released = dpsgd.private_gradient(gradient_is_x, {"w": torch.zeros(40)}, (x,), C=C, sigma=sigma, B=B,
                                      chunk=2, generator=torch.Generator().manual_seed(2))["w"]
    wide = x.double()
    clipped = (wide * (C / wide.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    noise = sigma * C * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert released.dtype == torch.float32
    torch.testing.assert_close(released, ((clipped + noise) / B).float(), rtol=2e-7, atol=0)


# --- the tail

def needed(q: float, sigma: float, steps: int, delta: float) -> float:
    """How long a normal must be able to get, in sigma: a push of 1/sigma gets further with P = delta/100."""
    return 1 / sigma + scipy.stats.norm.isf(delta / 100 / (q * steps))


def default():
    s = train.check(train.Settings())
    sigma = accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    return dict(q=s.B / s.N, sigma=sigma, steps=s.steps, delta=s.delta)


def test_the_longest_normal_reaches_as_far_as_delta_sigma_and_T_need():
    """Also that float32's 5.77 does not: it is the fault that was."""
    runs = [default()] + [{name: run[name] for name in ("q", "sigma", "steps", "delta")} for run in SHIPPED]
    longest = audit.reach(torch.Generator().manual_seed(0))
    assert longest == pytest.approx(dpsgd.REACH) and len(runs) >= 6
    for run in runs:
        assert needed(**run) < longest, run
        assert dpsgd.tail(run["q"], run["sigma"], run["steps"], 10**6) < run["delta"] / 100, run
    assert needed(**runs[0]) > 5.77


def test_the_shipped_statements_say_their_tail():
    for path in (ROOT / "assets").glob("*-eps*/privacy.json"):
        said = json.loads(path.read_text())
        adapter = torch.load(path.parent / "adapter_model.bin", weights_only=True)
        weights = sum(p.numel() for p in adapter.values())
        assert said["tail"] == dpsgd.tail(said["q"], said["sigma"], said["steps"], weights), path


def test_the_radii_of_the_normals_lie_on_no_lattice_that_float32_has():
    """exp(-r^2 / 2) of Box-Muller's pairs is its uniform: modulo 2^-24 and 2^-36 it is uniform again."""
    noise = dpsgd.add_noise({"w": torch.zeros(16 * 2000)}, 1.0, torch.Generator().manual_seed(0))["w"]
    u = torch.exp(-noise.view(-1, 2, 8).square().sum(1) / 2).flatten()
    for bits in (24, 36):
        assert scipy.stats.kstest((u * 2.0**bits) % 1, "uniform").pvalue > 1e-3, bits


@pytest.mark.parametrize("images", [1, 2, 10])
@pytest.mark.parametrize("q, sigma, steps", [(1, 0.4526, 1), (0.01, 0.6, 200), (0.5, 0.2, 3), (1, 0.1, 1)])
def test_the_tail_is_an_upper_bound_of_the_chance_that_a_pair_had_to_be_longer(q, sigma, steps, images):
    """Exactly: the length of a pair of normals pushed by n/sigma is noncentral chi, 2 degrees of freedom."""
    n = np.arange(1, images + 1)
    beyond = scipy.stats.ncx2.sf(dpsgd.REACH**2, 2, (n / sigma)**2)
    exact = steps * scipy.stats.binom.pmf(n, images, q) @ beyond
    assert min(exact, 1) <= dpsgd.tail(q, sigma, steps, 2, images=images) <= max(30 * exact, 1e-12)


@pytest.mark.parametrize("sigma", [0.26, 0.5, 1.0, 6.0])
@pytest.mark.parametrize("pairs", [1, 100, 50_000])
def test_the_tail_is_an_upper_bound_however_a_gradient_is_spread(sigma, pairs):
    """A share of its squared length in one pair, the rest in the others alike: each one's chance, integrated.

    A pair shorter than reach is pushed beyond it if it points where it is pushed: arccos / pi of all ways.
    """
    reach = 4.0

    def chance(a):
        def at(r):
            cosine = np.clip((reach**2 - a**2 - r**2) / (2 * a * r), -1, 1)
            return r * math.exp(-r**2 / 2) * math.acos(cosine) / math.pi
        return scipy.integrate.quad(at, max(reach - a, 0), reach, limit=200)[0] if a > 0 else 0.0
    exact = [chance(share**0.5 / sigma) + pairs * chance(((1 - share) / pairs)**0.5 / sigma)
             for share in (0, 0.25, 0.5, 0.75, 1)]
    assert max(exact) <= dpsgd.tail(1.0, sigma, 1, 2 * pairs + 2, reach) <= 30 * max(exact)


def test_a_run_whose_noise_is_too_short_for_its_delta_is_refused():
    s = train.check(train.Settings(epsilon=1000.0))
    sigma = accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    with pytest.raises(ValueError, match="expected a smaller --epsilon"):
        train.privacy_report.plan(s, sigma, {}, torch.nn.Linear(1, 1), None, 0, "", {})


@pytest.mark.parametrize("noise, longest", [(dpsgd.add_noise, 8.57), (coarse_noise, 5.77)])
def test_the_audits_tail_event_finds_coarse_noise_and_not_ours(noise, longest, monkeypatch, capsys):
    """At q = 1, sigma = 0.4526: 1.9e-4 of the runs with the canary lie where float32 noise alone cannot."""
    monkeypatch.setattr(dpsgd, "add_noise", noise)
    fine = audit.show(dpsgd.private_gradient, 100_000, 1e-5, 0, q=1.0, sigma=0.4526, steps=1, K=1, others=1)
    tail = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tail"))
    assert f"beyond {longest} sigma" in " ".join(tail)
    assert fine and tail[1] == "0" if longest > 8 else not fine and 5 < int(tail[1]) < 35


# --- the lattice

def right_answers(noise) -> int:
    """Of 200 guesses "was this image in it?", from one released step and the others' sum, how many are right.

    The guesser subtracts what it believes the sum to be, and looks which rest has radii on the lattice of
    24-bit uniforms.
    """
    g, right, d, std, B = torch.Generator().manual_seed(3), 0, 4096, 0.5, 8
    for trial in range(200):
        others, image = torch.randn(d, generator=g), torch.randn(d, generator=g)
        image, inside = image / image.norm(), trial % 2
        released = (noise({"w": others.double() + inside * image.double()}, std, g)["w"] / B).float()
        off = []
        for believed in (others, others + image):
            z = (released.double() * B - believed.double()) / std
            u = torch.exp(-z.view(-1, 2, 8).square().sum(1) / 2).flatten()
            steps = u[u < 0.02] * 2**24
            off.append((steps - steps.round()).abs().mean())
        right += int(off[1] < off[0]) == inside
    return right


def test_the_lattice_of_the_noise_says_nothing_of_who_was_in_a_step():
    assert right_answers(coarse_noise) > 190, "the attack must work on float32 noise, or this could not fail"
    assert abs(right_answers(dpsgd.add_noise) - 100) < 36                # a coin: 5 standard deviations


# --- clipping, for every float32 and every C

@pytest.mark.parametrize("C", [1e-40, 1e-30, 1e-22, 1e-3, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-22, 1.0, 1e19, 3e38])
def test_an_image_counts_for_C_or_less_whatever_its_gradients_size(size, C):
    """No square underflows to a norm of 0, none overflows; a gradient shorter than C is left alone."""
    g = {"a": torch.full((1, 300), size), "b": torch.full((1, 10, 10), -size)}
    length = g["a"][0, 0].double().item() * 20                           # 400 equal numbers
    total = dpsgd.clip_and_sum(g, C)
    found = math.sqrt(sum((t / min(C, length)).square().sum().item() for t in total.values()))
    assert found == pytest.approx(1, rel=1e-12)


def test_one_image_moves_a_step_by_C_over_B_at_the_smallest_C():
    x = torch.randn(6, 50)
    params = {"w": torch.zeros(50).double()}

    def step(lot):
        return dpsgd.private_gradient(gradient_is_x, params, (lot,), C=1e-40, sigma=0, B=4)["w"]
    assert (step(x) - step(x[1:])).norm().item() * 4 == pytest.approx(1e-40, rel=1e-9)


@pytest.mark.parametrize("C", [0.0, -1.0, 1e-41, 1e-320, math.nan])
def test_a_C_below_the_smallest_is_refused(C):
    with pytest.raises(ValueError, match="at least 1e-40"):
        dpsgd.clip_and_sum({"a": torch.ones(1, 3)}, C)
