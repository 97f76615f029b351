"""Properties of pld.py: several runs on the same images, and several images of one person."""
import functools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats

import accountant
from conftest import ROOT
import pld


@pytest.fixture(autouse=True)
def a_coarser_grid(monkeypatch):
    """Still an upper bound, a little looser, in a ninth of the time."""
    monkeypatch.setattr(pld, "PLD_POINTS", 3**11)


def shipped(name):
    return accountant.read_run(str(ROOT / "assets" / name / "privacy.json"))


@pytest.mark.parametrize("numbers", ["uniform", "of many sizes"])
def test_an_fft_of_the_full_length_is_as_exact_as_its_bound(numbers):
    """There and back, beside the same in long double, whose own error is some 2,000 times smaller."""
    if np.finfo(np.longdouble).eps > 2e-19:
        pytest.skip("this machine has no long double that is finer than float64")
    x = np.random.default_rng(0).random(3**13)
    if numbers == "of many sizes":
        x = x**40
    spectrum, exact = np.fft.rfft(x), scipy.fft.rfft(x.astype(np.longdouble))
    assert np.linalg.norm(spectrum - exact) <= pld.FFT_ERROR * np.linalg.norm(exact)
    back = np.fft.irfft(spectrum, len(x))
    exact = scipy.fft.irfft(spectrum.astype(np.clongdouble), len(x))
    assert np.linalg.norm(back - exact) <= pld.FFT_ERROR * np.linalg.norm(exact)


def test_equal_runs_together_are_one_run_of_all_their_steps():
    run = (0.05, 1.2, 40)
    together = pld.joint_epsilon([run, run, run], 1e-5)
    assert together == pytest.approx(pld.pld_epsilon(0.05, 1.2, 120, 1e-5), rel=1e-5)


@pytest.mark.parametrize("width", [1e-5, 1e-2, 1.0])
def test_the_mass_of_a_cell_is_off_by_no_more_than_its_bound(width):
    """Phi(b/sigma) - Phi(a/sigma) with 60 digits, in both tails and in the middle."""
    mpmath = pytest.importorskip("mpmath")                               # torch brings it
    for a in np.random.default_rng(0).uniform(-28, 28, 150):
        edges = np.array([a, a + width])
        mass, error = pld._normal_mass(edges / 0.9)
        with mpmath.workdps(60):
            low, high = sorted(-abs(mpmath.mpf(e) / mpmath.mpf(0.9)) for e in edges)
            exact = mpmath.ncdf(high) - mpmath.ncdf(low)
            if a < 0 < a + width:
                exact = 1 - mpmath.ncdf(high) - mpmath.ncdf(low)
            assert abs(mass[0] - exact) <= error[0], a


@pytest.mark.parametrize("q, sigma, images", [
    (0.004, 0.42, 1), (0.02, 0.9, 1), (0.14, 5.5, 1), (1.0, 2.0, 1), (0.02, 0.9, 3), (0.5, 0.05, 20)])
def test_an_edge_of_the_grid_has_its_loss_up_to_the_bound(q, sigma, images):
    """log E[e^((2jz - j^2)/(2 sigma^2))], j ~ Binomial(images, q), with 60 digits, at float64's z."""
    mpmath = pytest.importorskip("mpmath")
    loss = np.linspace(-20, 20, 60)
    found, off = pld._z_of(loss, q, sigma, images)
    for l, z in zip(loss, found):
        with mpmath.workdps(60):
            if abs(z) < 40 * sigma:                                      # beyond lies no mass that counts
                exact = mpmath.log(sum(
                    mpmath.binomial(images, j) * mpmath.mpf(q)**j * (1 - mpmath.mpf(q))**(images - j)
                    * mpmath.exp((2 * j * mpmath.mpf(z) - j * j) / (2 * mpmath.mpf(sigma)**2))
                    for j in range(images + 1)))
                assert abs(exact - mpmath.mpf(l)) <= off, l


def test_different_runs_together_cost_more_than_each_and_less_than_their_sum():
    runs = [(0.02, 1.0, 60), (0.07, 0.8, 20)]
    each = [pld.pld_epsilon(*run, 1e-5) for run in runs]
    assert max(each) < pld.joint_epsilon(runs, 1e-5) < sum(each)


def test_runs_on_all_images_together_are_one_gaussian():
    """q = 1: sensitivities add in squares, sum_i steps_i / sigma_i^2 = 1 / sigma^2."""
    sigma = (3 / 2.0**2 + 5 / 4.0**2) ** -0.5
    exact = pld.gaussian_epsilon(sigma, 1e-6)
    assert exact <= pld.joint_epsilon([(1.0, 2.0, 3), (1.0, 4.0, 5)], 1e-6) <= exact * (1 + 1e-4)


@pytest.mark.parametrize("images", [2, 5])
def test_k_images_at_q_1_are_a_gaussian_of_sensitivity_k(images):
    exact = pld.gaussian_epsilon(6.0 / images / 2, 1e-5)                 # 4 steps: sigma / sqrt(4)
    assert exact <= pld.joint_epsilon([(1.0, 6.0, 4)], 1e-5, images) <= exact * (1 + 1e-4)


def test_what_the_edges_of_cells_may_be_off_is_added_for_each_step(monkeypatch):
    z_of, runs = pld._z_of, [(0.2, 1.0, 10)]
    before = max(pld._removed_and_added(runs, 1e-5, 1))
    monkeypatch.setattr(pld, "_z_of", lambda *a: (z_of(*a)[0], 1e-3))    # the largest error of an edge's loss
    assert max(pld._removed_and_added(runs, 1e-5, 1)) >= before + 10 * 1e-3


@pytest.mark.parametrize("mass, proved", [(2e-5, False), (2e-6, True)])
def test_a_mass_above_delta_beyond_the_grid_leaves_no_epsilon(mass, proved):
    points, half = 3**9, 3**9 // 2
    loss, exact = np.arange(-half, half + 1) * (10 / half), np.zeros(points + 1)
    P, Q = exact.copy(), exact.copy()
    P[half], P[-1], Q[half] = 1 - mass, mass, 1.0                        # the last cell lies above the grid
    found = pld._composed_epsilon([(P, Q, exact, exact, 0.0, 1)], loss, 1e-5, 1.0, 2.0)
    assert (found < math.inf) == proved


@pytest.mark.parametrize("images", [0, 1.5, 1001])
def test_a_number_of_images_that_is_none_is_refused(images):
    with pytest.raises(ValueError, match=f"images = {images}, expected a whole number"):
        pld.joint_epsilon([(0.1, 1.0, 1)], 1e-5, images)


@pytest.mark.parametrize("flags, said", [
    ("--sigma 0.45 --images 2", "--images 2: expected a run's privacy.json"),
    ("--sigma 0.45 run/privacy.json", "--sigma 0.45: expected it alone"),
    ("--q 0.02", "--q 0.02: expected --sigma"),
    ("--delta 1e-9", "--delta 1e-09: expected --sigma"),
    ("--steps 9 run/privacy.json", "--steps 9: expected --sigma")])
def test_a_flag_that_would_be_ignored_is_refused(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pld", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        pld.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("images", [2, 4])
def test_one_step_on_k_images_has_the_delta_of_its_definition(images):
    """delta(epsilon) = integral of (P - e^epsilon Q)_+, P the mixture over how many are in the lot."""
    q, sigma, delta = 0.2, 1.1, 1e-3
    epsilon = pld.joint_epsilon([(q, sigma, 1)], delta, images)
    z = np.linspace(-20, 30, 400_001)
    out = scipy.stats.norm.pdf(z, 0, sigma)
    shares = scipy.stats.binom.pmf(range(images + 1), images, q)
    into = sum(share * scipy.stats.norm.pdf(z, j, sigma) for j, share in enumerate(shares))
    for P, Q in ((into, out), (out, into)):
        assert np.maximum(P - math.exp(epsilon) * Q, 0).sum() * (z[1] - z[0]) <= delta * (1 + 1e-5)
    tight = np.maximum(into - math.exp(epsilon) * out, 0).sum() * (z[1] - z[0])
    assert tight == pytest.approx(delta, rel=1e-3)


@pytest.mark.parametrize("epsilon", [0.3, 8.0])
@pytest.mark.parametrize("q, sigma", [(1.0, 1.0), (0.3, 0.7)])
def test_normals_that_are_cut_add_to_delta_what_k_images_are_charged_for(q, sigma, epsilon, monkeypatch):
    """The definition, integrated over the plane of one pair: k = 2 images move it by j / sigma, together."""
    reach = 3.5                                                          # 11.8: nothing could be seen
    for name, value in dict(FINE=reach, UNSEEN=0.1, MOST_PAIRS=1).items():
        monkeypatch.setattr(pld, name, value)
    x, y = np.meshgrid(np.linspace(-9, 12, 1401), np.linspace(-9, 9, 1201))

    def delta(epsilon, longest, way):
        at = []
        for move in (0, 1 / sigma, 2 / sigma):
            squared = (x - move)**2 + y**2
            density = np.exp(-squared / 2) * (squared <= longest**2)
            at.append(density / density.sum())
        P, Q = (at[0], sum(share * a for share, a in zip(scipy.stats.binom.pmf(range(3), 2, q), at)))[::way]
        return np.maximum(P - math.exp(epsilon) * Q, 0).sum()
    added = pld._too_far([(q, sigma, 1)], 2)
    for way in (1, -1):
        assert delta(epsilon + 2 * 0.1, reach, way) <= delta(epsilon, math.inf, way) + added < 1
    assert epsilon < 8 or delta(epsilon, reach, -1) > delta(epsilon, math.inf, -1) + added / 10


def test_a_person_who_is_added_is_charged_for_runs_with_q_1_and_with_q_below_1_together():
    """As `_too_far` says: by Markov's bound for q < 1, by the sums that are too far away for q = 1."""
    all_images, few = (1.0, 1.9, 1), (0.8, 1e3, 3)
    tau = math.exp(-pld.FINE**2 / 2)
    markov = 3 * pld.MOST_PAIRS * tau * 4 / (pld.UNSEEN * 0.2**15)
    far = scipy.stats.ncx2.sf(pld.FINE**2, 2, (15 / 1.9)**2)
    assert 1 / 10 < markov / far < 10
    assert pld._too_far([all_images, few], 15) >= (markov + far) * (1 - 1e-9)


def test_a_move_takes_a_pair_too_far_most_often_if_it_is_all_in_one_pair():
    far = functools.partial(scipy.stats.ncx2.sf, pld.FINE**2, 2)
    rng = np.random.default_rng(0)
    for move in (3.0, 8.0, pld.FINE - 0.2):
        for pairs in (2, 5, 50):
            parts = rng.dirichlet(np.full(pairs, 0.3)) * move**2
            assert far(parts).sum() <= far(move**2) + (pairs - 1) * math.exp(-pld.FINE**2 / 2)


def test_so_many_images_that_the_normals_do_not_hide_them_have_no_epsilon():
    """P(30 images move a pair too far in one of the steps) > delta, whatever epsilon is."""
    q, sigma, steps = 512 / 23_233, 0.55, 200
    shares = scipy.stats.binom.pmf(range(31), 30, q)
    seen = shares[1:] @ scipy.stats.ncx2.sf(pld.FINE**2, 2, (np.arange(1, 31) / sigma)**2)
    assert 1 - (1 - seen)**steps > 1e-5
    assert pld.joint_epsilon([(q, sigma, steps)], 1e-5, images=30) == math.inf


def test_what_the_documents_say_of_two_runs_and_of_two_images_is_rounded_up():
    def said(page, runs, digits, images=1):
        up = 10**digits
        figure = f"{math.ceil(pld.joint_epsilon(runs, 1e-5, images) * up) / up:.{digits}f}"
        assert figure in (ROOT / page).read_text(), f"{page} does not say {figure}"
    eps1, eps10 = (shipped(f"mnist-eps{e}") for e in (1, 10))
    said("docs/privacy.md", [eps1, eps10], 2)
    said("docs/privacy.md", [eps10], 1, images=2)
    said("docs/privacy.md", [shipped("cells-eps10")], 1, images=2)
    said("docs/privacy.md", [shipped("faces-eps10")], 0, images=10)
    default = (512 / 60_000, accountant.calibrate(10, 1e-5, 512 / 60_000, 110), 110)
    said("README.md", [default], 1, images=2)
