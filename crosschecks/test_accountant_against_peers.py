"""Our accountant compared with dp_accounting (Google) and Opacus (Meta), in 18 settings.

  $ pip install opacus dp-accounting && python -m pytest crosschecks/test_accountant_against_peers.py

Where a peer is wrong or loose, a test states the error as a number. If the peer is repaired, that test fails.
"""
import functools
import math
import warnings

import numpy as np
import pytest

import accountant
import pld

google_rdp = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant")
google_pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
opacus_rdp = pytest.importorskip("opacus.accountants.analysis.rdp")

# a Latin square of three rates, three noises and three lengths: each meets each of the others' once
GRID = [((0.001, 0.017, 0.2)[i], (0.6, 1.2, 5.0)[j], (1, 50, 2000)[(i + j) % 3], 1e-5)
        for i in range(3) for j in range(3)]
OURS = [(0.034, 1.7, 93, 1e-5), (0.04, 1.5, 2250, 1e-5), (0.05, 20.0, 1000, 1e-6), (0.004, 0.8, 5000, 1e-7),
        (1.0, 1.0, 1, 1e-5), (1.0, 5.0, 50, 1e-6), (0.1, 0.4, 10, 1e-5), (0.5, 100.0, 10_000, 1e-6),
        (0.0005, 0.7, 100_000, 1e-6)]
SETTINGS = GRID + OURS


@functools.cache
def ours(q, sigma, steps, delta):
    return accountant.epsilon(q, sigma, steps, delta)[0]


@functools.cache
def ours_tight(*setting):
    return pld.pld_epsilon(*setting)


@functools.cache
def google_tight(q, sigma, steps, delta):
    """dp_accounting's pessimistic PLD. A cell is 1/30 of the standard deviation of a step's loss, or 2e-4."""
    cell = min(2e-4, q * math.sqrt(math.expm1(1 / sigma**2)) / 30)
    one = google_pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=cell)
    return one.self_compose(steps).get_epsilon_for_delta(delta)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_our_epsilon_lies_between_googles_pld_and_googles_rdp(setting):
    q, sigma, steps, delta = setting
    peer = google_rdp.RdpAccountant()
    noise = google_rdp.dp_event.GaussianDpEvent(sigma)
    peer.compose(google_rdp.dp_event.PoissonSampledDpEvent(q, noise), steps)
    assert google_tight(*setting) <= ours(*setting) <= peer.get_epsilon(delta) * (1 + 1e-9)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_our_epsilon_is_opacus_but_for_the_grid_of_orders(setting):
    q, sigma, steps, delta = setting
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    opacus = opacus_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # Opacus: "edge of the grid"
        theirs, order = opacus_rdp.get_privacy_spent(orders=orders, rdp=opacus, delta=delta)
    mine, my_order = accountant.to_epsilon(steps * accountant.rdp(q, sigma, orders), orders, delta)
    # on the same grid both find the same epsilon
    assert (mine, my_order) == (pytest.approx(max(theirs, 0), rel=1e-7, abs=1e-9), order)
    assert ours(*setting) <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_our_tight_epsilon_is_googles(setting):
    """Both round to the safe side, so the one with coarser cells may be higher.

    Ours is 0.1% higher for a tiny q over many steps, because its window must hold the long thin tail of the
    loss.
    """
    mine = ours_tight(*setting)
    assert mine == pytest.approx(google_tight(*setting), rel=2e-3, abs=1e-7)
    assert mine < ours(*setting)


@pytest.mark.parametrize("setting", SETTINGS[::4], ids=str)
def test_our_tight_epsilon_is_above_googles_lower_bound(setting):
    """dp_accounting's optimistic estimate rounds every loss down, so it is below the truth and ours."""
    q, sigma, steps, delta = setting
    one = google_pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=2e-4,
                                             pessimistic_estimate=False, use_connect_dots=False)
    assert one.self_compose(steps).get_epsilon_for_delta(delta) <= ours_tight(*setting)


@pytest.mark.parametrize("target, delta, q, steps", [(10, 1e-5, 0.017, 200), (1, 1e-5, 0.034, 93),
                                                     (3, 1e-6, 0.1, 1000), (0.5, 1e-5, 0.004, 5000)])
def test_the_calibrated_noise_keeps_the_budget_by_the_peers_books(target, delta, q, steps):
    """On Opacus' grid epsilon may be slightly above the target, because its coarser orders prove less."""
    sigma = accountant.calibrate(target, delta, q, steps)
    assert google_tight(q, sigma, steps, delta) < target
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    totals = opacus_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    theirs, _ = opacus_rdp.get_privacy_spent(orders=orders, rdp=totals, delta=delta)
    assert theirs == pytest.approx(target, rel=2e-3)


# -----------------------------------------------------------------------------
# where a peer is wrong or loose


def test_opacus_series_goes_negative_and_ours_does_not():
    """At q=.4, sigma=12, order 59.1 Opacus' alternating series gives an impossible, negative divergence.

    RDP rises with the order, so the value at 59.1 lies between those at 59 and 60. At whole orders both are
    right.
    """
    theirs = opacus_rdp.compute_rdp(q=0.4, noise_multiplier=12, steps=1, orders=[59, 59.1, 60])
    low, mine, high = accountant.rdp(0.4, 12, [59, 59.1, 60])
    assert theirs[1] < 0 < low < mine < high
    assert (low, high) == (pytest.approx(theirs[0], rel=1e-9), pytest.approx(theirs[2], rel=1e-9))


def test_google_bounds_fractional_orders_and_ours_integrates_them():
    """dp_accounting interpolates between whole orders, so it is above ours in between (+10% at order 1.5)."""
    orders = [1.5, 2, 2.5, 7, 7.3, 63]
    theirs = google_rdp._compute_rdp_poisson_subsampled_gaussian(0.04, 1.5, orders)
    ratio = np.array(theirs) / accountant.rdp(0.04, 1.5, orders)
    assert ratio[[1, 3, 5]] == pytest.approx(1, rel=1e-9)
    assert ratio[0] > 1.05 and np.all(ratio[[2, 4]] > 1), ratio


def test_opacus_grid_has_a_floor_and_ours_has_none():
    """Opacus' orders end at 63, so its epsilon stays above 0.08 however large the noise is.

    Ours follows the exact epsilon of the Gaussian mechanism downwards.
    """
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    totals = opacus_rdp.compute_rdp(q=1.0, noise_multiplier=1000.0, steps=1, orders=orders)
    with pytest.warns(UserWarning, match="Optimal order is the largest"):
        theirs, order = opacus_rdp.get_privacy_spent(orders=orders, rdp=totals, delta=1e-5)
    exact = pld.gaussian_epsilon(1000.0, 1e-5)
    assert order == 63 and theirs > 0.08
    assert exact < ours(1.0, 1000.0, 1, 1e-5) < 1.5 * exact < 0.005
