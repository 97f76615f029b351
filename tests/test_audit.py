"""Properties of the audit.

Its bound is a bound, its lanes are real runs, the right step passes, every fault is caught.
"""
import itertools
import sys

import numpy as np
import pytest
import torch
from scipy.stats import binom, ks_2samp, kstest

import accountant
import audit
import dpsgd
import train
import pld
from attacks import membership
from conftest import tiny_unet
from machinery.secret import Secret, new_key

SECRET = Secret(new_key(0))
WORLD = dict(q=1.0, sigma=1.0, steps=1, K=1, others=1)


@pytest.fixture(autouse=True)
def a_coarser_grid(monkeypatch):
    """The tight bound is still a bound, a little looser, in a ninth of the time."""
    monkeypatch.setattr(pld, "PLD_POINTS", 3**11)


# --- from counts to a bound

@pytest.mark.parametrize("k, n, alpha", [
    (0, 50, 0.02), (1, 50, 0.02), (17, 50, 0.1), (50, 50, 0.02), (3, 500_000, 0.02)])
def test_clopper_pearson_solves_its_two_binomial_equations(k, n, alpha):
    low, high = audit.clopper_pearson(k, n, alpha)
    assert low == 0 if k == 0 else binom.sf(k - 1, n, low) == pytest.approx(alpha, rel=1e-6)     # P(Bin >= k)
    assert high == 1 if k == n else binom.cdf(k, n, high) == pytest.approx(alpha, rel=1e-6)      # P(Bin <= k)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_proven_from_two_sets_of_the_same_distribution(seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 100_000))
    assert audit.lower_bound(a, b, 1e-5).epsilon < 0.02


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("flip", [1, -1])
def test_two_gaussians_are_bounded_below_their_exact_epsilon_and_above_60_percent_of_it(sigma, flip):
    rng = np.random.default_rng(1)
    without, present = sigma * rng.normal(size=10**6), 1 + sigma * rng.normal(size=10**6)
    found = audit.lower_bound(flip * without, flip * present, 1e-5)
    exact = pld.gaussian_epsilon(sigma, 1e-5)
    assert 0.6 * exact < found.epsilon < exact, f"{found} against {exact}"


def test_the_bound_is_wrong_no_more_often_than_it_says():
    """Coins with P = 0.4 and 0.1: the true epsilon is log((0.4 - delta) / 0.1), the other event's is less."""
    rng, delta = np.random.default_rng(0), 0.01
    bounds = [audit.lower_bound(rng.random(600) < 0.1, rng.random(600) < 0.4, delta, 0.8).epsilon
              for _ in range(300)]
    wrong = [bound > np.log(0.39 / 0.1) for bound in bounds]
    assert np.mean(wrong) < 0.2, f"{np.mean(wrong):.3f} of the bounds are too high at 80% confidence"


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="at least 20"):
        audit.lower_bound([0.0] * 19, [1.0] * 30, 1e-5)


# --- the game

def test_the_canary_is_clipped_to_exactly_C_and_is_alone_in_its_direction():
    grads = audit.per_sample(audit.START, *audit.images(1, 1, 3))
    other, canary = dpsgd.norms(grads)
    assert canary > 1000 * audit.C and other > 0
    moved = dpsgd.clip_and_sum({name: g[1:] for name, g in grads.items()}, audit.C)
    torch.testing.assert_close(moved["B"], audit.C * audit.DIRECTION.double())
    assert (grads["B"][0] * audit.DIRECTION).sum() == 0 and not grads["A"].any()


@pytest.mark.parametrize("canary", [0, 1])
@pytest.mark.parametrize("q, steps", [(1.0, 1), (1.0, 3), (0.3, 2)])
def test_a_lane_is_a_run_of_the_real_step(q, steps, canary):
    """The definition: a loop that samples a lot and calls dpsgd.private_gradient.

    The scores have the same distribution.
    """
    x, y = audit.images(1, canary, 1)
    loop, use, other = [], itertools.count(), Secret(new_key(1))
    for _ in range(200):
        score = 0.0
        for _ in range(steps):
            now = next(use)
            lot = dpsgd.poisson_sample(SECRET.coins(now, len(x)), q)
            released = dpsgd.private_gradient(audit.per_sample, audit.START, (x[lot], y[lot]), C=audit.C,
                                              sigma=1.3, B=audit.LOT, normals=SECRET.normals(now, 8))
            score += float((released["B"] * audit.DIRECTION).sum()) * audit.LOT / audit.C
        loop.append(score)
    lanes = audit.scores(dpsgd.private_gradient, 50_000, canary, q=q, sigma=1.3, steps=steps, K=1, others=1,
                         secret=other)
    assert ks_2samp(loop, lanes.numpy()).pvalue > 1e-3


def test_at_q_1_the_scores_are_the_gaussians_of_the_proof_and_lanes_are_independent():
    for canary in (0, 1):
        world = WORLD | dict(sigma=2.0, steps=4)
        s = audit.scores(dpsgd.private_gradient, 120_000, canary, **world, secret=SECRET).numpy()
        assert kstest(s, "norm", (4 * canary, 2.0 * 4**0.5)).pvalue > 1e-3
        assert abs(np.corrcoef(s[:-1], s[1:])[0, 1]) < 0.02 and len(np.unique(s)) > 0.99 * len(s)


# --- the verdicts

@pytest.mark.parametrize("change", [
    {}, dict(K=4), dict(steps=4, sigma=2.0), dict(q=0.2, sigma=0.7), dict(q=0.5, others=0)], ids=str)
def test_the_right_step_respects_its_tight_bound(change):
    world = WORLD | change
    found = audit.audit(dpsgd.private_gradient, 200_000, 1e-5, 0, **world)[2]
    proven, tight = audit.upper_bounds(world["q"], world["sigma"], world["steps"], 1e-5)
    assert 0.3 * tight < found.epsilon <= tight <= proven, f"{found}, tight {tight}, proven {proven}"


@pytest.mark.parametrize("name", audit.BROKEN)
def test_every_fault_is_caught(name):
    _, step, settings = audit.BROKEN[name]
    world = WORLD | settings
    found = audit.audit(step, 200_000, 1e-5, 0, **world)[2]
    proven, _ = audit.upper_bounds(world["q"], world["sigma"], world["steps"], 1e-5)
    assert found.epsilon > proven, f"{name}: {found} against {proven}"


@pytest.mark.parametrize("q", [1.0, 0.2])
def test_the_verdict_goes_by_the_tight_value(q, monkeypatch, capsys):
    """A lower bound between the tight value and the proven one is a contradiction: both are upper bounds."""
    world = WORLD | dict(q=q)
    proven, tight = audit.upper_bounds(q, world["sigma"], world["steps"], 1e-5)
    assert tight < proven
    for epsilon, fine in ((0.999 * tight, True), ((tight + proven) / 2, False)):
        monkeypatch.setattr(audit, "lower_bound", lambda *_: audit.Finding(epsilon, "", 0.5, 0.5))
        assert audit.show(dpsgd.private_gradient, 1000, 1e-5, 0, **world) == fine
        capsys.readouterr()
        monkeypatch.setattr(audit, "BROKEN", {})
        audit.show_all(1000, 1e-5, 0, **world)
        assert ("BROKEN" in capsys.readouterr().out) == (not fine)


# --- membership

def test_auc_is_the_share_of_pairs_in_the_right_order():
    a, b = np.random.default_rng(0).integers(0, 6, (2, 30))
    pairs = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    assert membership.auc(a, b) == pytest.approx(pairs.mean())


def test_an_adapter_that_was_not_trained_changes_no_loss(tmp_path):
    base = tiny_unet()
    torch.save(dict(config=base.config, model=base.state_dict()), tmp_path / "base.pt")
    pictures, labels = torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8), torch.arange(9)
    s = train.Settings(base=str(tmp_path / "base.pt"), N=9, B=4, steps=0, rank=2)
    untouched = membership.finetuned(s, 0.0, pictures, labels, seed=0)
    before = membership.losses(base, pictures, labels)
    torch.testing.assert_close(membership.losses(untouched, pictures, labels), before)
    long = train.Settings(base=s.base, N=9, B=9, steps=30, rank=2)
    trained = membership.finetuned(long, 0.0, pictures, labels, seed=0)
    assert membership.losses(trained, pictures, labels).mean() < before.mean()


# --- the command line

@pytest.mark.parametrize("bad", ["--epsilon inf", "--epsilon 0", "--seed -1"])
def test_a_membership_attack_without_meaning_is_refused_in_one_line(bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["membership.py", *bad.split()])
    with pytest.raises(SystemExit) as stopped:
        membership.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and len(said.err.splitlines()) == 1 and not said.out, said


def test_the_program_prints_a_lower_bound_below_the_proven_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["audit.py", "--runs", "30000"])
    audit.main()
    said = capsys.readouterr().out
    figures = {line.split()[0]: float(line.split()[3]) for line in said.splitlines()
               if line[:6] in ("lower ", "tight ", "proven")}
    assert 2 < figures["lower"] <= figures["tight"] <= figures["proven"], said


@pytest.mark.parametrize("bad", [
    "--q 0", "--q nan", "--sigma -1", "--steps 0", "--K 0", "--delta 1", "--runs 10",
    "--seed -1", "--break nothing", "--unknown"])
def test_bad_flags_are_refused_in_one_line_with_exit_code_2(bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["audit.py", *bad.split()])
    with pytest.raises(SystemExit) as stopped:
        audit.main()
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and not shown.out and len(shown.err.splitlines()) == 1, shown
