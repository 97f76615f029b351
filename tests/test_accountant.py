"""Properties of the accountant. The oracle is the definition: an integral, a binomial sum, a closed form."""
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp

import accountant
from accountant import calibrate, epsilon, rdp, to_epsilon
import pld
from machinery import screen
from pld import gaussian_epsilon, gdp_epsilon, pld_epsilon

pytestmark = pytest.mark.filterwarnings("error")         # numpy must not overflow, divide by 0 or meet NaN
GOLDEN = dict(q=0.04, sigma=1.5, steps=2250, delta=1e-5)


def integrated_rdp(q, sigma, a):
    """log E_{z ~ N(0, sigma^2)}[(1 - q + q e^u)^a] / (a - 1), integrated adaptively, peak scaled to 1."""
    def log_term(z):
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
        return a * ratio - z**2 / (2 * sigma**2)
    ends = np.linspace(-12 * sigma, a + 12 * sigma, 60)
    top = max(log_term(z) for z in np.linspace(ends[0], ends[-1], 2000))
    integrand = lambda z: math.exp(log_term(z) - top)
    area = math.fsum(quad(integrand, l, r, epsrel=1e-12)[0] for l, r in zip(ends, ends[1:]))
    return (top + math.log(area / (sigma * math.sqrt(2 * math.pi)))) / (a - 1)


def binomial_rdp(q, sigma, a):
    """A_a - 1 = sum_k C(a, k) (1 - q)^(a - k) q^k (exp(k (k - 1) / (2 sigma^2)) - 1), whole a.

    Source: Mironov et al. 2019, Eq. 7
    """
    k = np.arange(2, a + 1)
    t = k * (k - 1) / (2 * sigma**2)
    choose = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
    terms = choose + (a - k) * math.log1p(-q) + k * math.log(q) + t + np.log(-np.expm1(-t))
    return np.logaddexp(0, logsumexp(terms)) / (a - 1)


def hockey_stick(q, sigma, e, removed):
    """delta(e) = integral of max(P - exp(e) Q, 0) for one step.

    P and Q: with and without the example, or reversed
    """
    def gap(z):
        without = math.exp(-z**2 / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        with_it = without * (1 - q + q * math.exp((2 * z - 1) / (2 * sigma**2)))
        return max(with_it - math.exp(e) * without if removed else without - math.exp(e) * with_it, 0.0)
    ends = np.linspace(-12 * sigma, 1 + 12 * sigma, 100)
    return math.fsum(quad(gap, l, r, epsabs=1e-14, limit=200)[0] for l, r in zip(ends, ends[1:]))


# -----------------------------------------------------------------------------
# one step


@pytest.mark.parametrize("q, sigma, a", [
    (0.04, 1.5, 2), (0.04, 1.5, 3.9), (0.3, 0.5, 1.1), (0.3, 0.5, 7.7), (0.9, 3, 20.5),
    (0.01, 0.2, 4.3), (0.4, 12, 59.1), (0.5, 1, 1.01), (0.02, 0.7, 32)])
def test_rdp_is_the_integral_that_defines_it(q, sigma, a):
    assert rdp(q, sigma, a) == pytest.approx(integrated_rdp(q, sigma, a), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.2, 0.6, 2.0, 30.0, 200.0])
@pytest.mark.parametrize("q", [1e-6, 0.004, 0.3, 0.99])
def test_rdp_at_whole_orders_is_the_binomial_sum(q, sigma):
    orders = np.array([2, 3, 5, 16, 64, 500])
    want = np.array([binomial_rdp(q, sigma, a) for a in orders])
    above = rdp(q, sigma, orders) / want - 1                           # relative: 10^7 steps keep the digits
    assert above.min() >= 0 and above.max() < 2e-11


def test_rdp_of_a_tiny_rate_is_its_second_order_term():
    """q -> 0: RDP(a) -> a q^2 (e^(1/sigma^2) - 1) / 2, also where 1 + RDP rounds to 1."""
    for q, sigma, a in [(1e-9, 1.0, 2.5), (1e-10, 200.0, 1.5), (1e-8, 2.0, 4.25)]:
        assert rdp(q, sigma, a) == pytest.approx(a * q**2 * math.expm1(1 / sigma**2) / 2, rel=1e-5, abs=0)


def test_rdp_without_sampling_is_the_gaussians():
    orders = np.array([1.001, 1.5, 2, 33.3, 4000])
    assert np.array_equal(rdp(1, 2.0, orders), orders / 8)
    almost = rdp(1 - 1e-12, 2.0, orders)
    assert almost == pytest.approx(orders / 8, rel=1e-9)                  # the integral meets the closed form


@pytest.mark.parametrize("q, sigma, a", [(0.5, 0.2, 5_000), (0.01, 0.05, 3_000), (1e-3, 1.0, 50_000)])
def test_rdp_with_hardly_any_noise_is_a_bound_though_the_integral_is_not_taken(q, sigma, a):
    """All terms of the binomial sum are positive; the last is the largest here, and less than the whole."""
    assert (a + 28 * sigma) * 6 / min(sigma, 2 * sigma**2) > accountant.MAX_NODES
    last = a * math.log(q) + a * (a - 1) / (2 * sigma**2)
    assert last / (a - 1) <= accountant.rdp(q, sigma, [a])[0] <= a / (2 * sigma**2)


def test_rdp_at_the_ends():
    assert np.array_equal(rdp(0, 1.0, [2, 3.5]), [0, 0])                  # nobody is ever sampled
    assert np.array_equal(rdp(0.1, 0, [2, 3.5]), [math.inf, math.inf])    # no noise
    bound = np.array([2.5, 900.0]) / 0.0002                               # too costly to integrate: bounded
    assert np.all(rdp(0.01, 0.01, [2.5, 900.0]) <= bound)


# -----------------------------------------------------------------------------
# many steps


def test_epsilon_is_the_composed_and_converted_rdp_of_its_order():
    spent, a = epsilon(**GOLDEN)
    total = sum(rdp(0.04, 1.5, a) for _ in range(2250))
    converted = total + math.log((a - 1) / a) - (math.log(1e-5) + math.log(a)) / (a - 1)
    assert spent == pytest.approx(converted, rel=1e-9)
    mixed = to_epsilon(rdp(0.04, 1.5, [a]) * 1000 + rdp(0.04, 1.5, [a]) * 1250, [a], 1e-5)
    assert mixed == pytest.approx((spent, a), rel=1e-12)


def test_the_golden_value():
    """Opacus' default orders give 7.3291111714 (its best is 3.9); the line search finds a little less."""
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    on_grid, order = to_epsilon(2250 * rdp(0.04, 1.5, orders), orders, 1e-5)
    assert (on_grid, order) == (pytest.approx(7.3291111714, abs=2e-10), 3.9)
    assert 0.999 * on_grid < epsilon(**GOLDEN)[0] <= on_grid


@pytest.mark.parametrize("q, sigma, steps", [
    (0.04, 1.5, 2250), (0.001, 0.6, 10_000), (0.5, 40, 100), (1, 3, 7)])
def test_no_order_proves_less_than_the_one_found(q, sigma, steps):
    orders = 1 + np.geomspace(2e-3, 3000, 400)
    on_grid, _ = to_epsilon(steps * rdp(q, sigma, orders), orders, 1e-6)
    assert epsilon(q, sigma, steps, 1e-6)[0] <= on_grid * (1 + 1e-5)


@pytest.mark.parametrize("sigma", [0.3, 1, 5, 50])
@pytest.mark.parametrize("steps", [1, 100])
def test_epsilon_is_never_below_the_exact_gaussian(sigma, steps):
    """q = 1: `steps` Gaussians of noise sigma are one of noise sigma / sqrt(steps)."""
    exact = gaussian_epsilon(sigma / steps**0.5, 1e-5)
    assert exact < epsilon(1, sigma, steps, 1e-5)[0] < 1.2 * exact + 0.02


@pytest.mark.parametrize("q, sigma", [(0.01, 0.4), (0.1, 0.8), (0.9, 1.0)])
def test_one_step_spends_no_more_than_delta(q, sigma, monkeypatch):
    """(epsilon, delta)-DP as defined, integrated, in both directions; each tight bound meets its own."""
    removed, added = (hockey_stick(q, sigma, epsilon(q, sigma, 1, 1e-4)[0], way) for way in (True, False))
    assert max(removed, added) <= 1e-4
    monkeypatch.setattr(pld, "PLD_POINTS", 3**11)                       # a coarser grid: a bound all the same
    tight = pld._removed_and_added([(q, sigma, 1)], 1e-4, 1)
    for bound, way in zip(tight, (True, False)):
        assert 1e-4 * (1 - 2e-3) < hockey_stick(q, sigma, bound, way) <= 1e-4 * (1 + 1e-9)
    assert pld_epsilon(q, sigma, 1, 1e-4) == max(tight)


def test_epsilon_is_monotone():
    def rises(values):
        return all(np.diff([epsilon(**(GOLDEN | v))[0] for v in values]) > 0)
    assert rises([dict(q=q) for q in (0.001, 0.01, 0.04, 0.2, 0.7, 1)])
    assert rises([dict(sigma=s) for s in (200, 20, 5, 1.5, 1, 0.6, 0.2)])
    assert rises([dict(steps=n) for n in (0, 1, 2, 50, 1000, 10**5, 10**7)])
    assert rises([dict(delta=d) for d in (0.1, 1e-3, 1e-5, 1e-9, 1e-30)])


@pytest.mark.parametrize("q", [1e-6, 0.01, 1])
@pytest.mark.parametrize("sigma", [0.2, 200])
@pytest.mark.parametrize("steps", [1, 10**7])
def test_extreme_settings_are_finite(q, sigma, steps):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the best order")
        spent, order = epsilon(q, sigma, steps, 1e-5)
    assert 0 <= spent < math.inf and order > 1


def test_runs_on_the_same_images_add_up():
    """The definition: at each order the RDP of all steps together; and a run in two halves is the run."""
    one, two = (0.02, 0.7, 100), (0.1, 1.6, 30)
    whole = accountant.epsilon(0.02, 0.7, 200, 1e-5)[0]
    assert accountant.composed_epsilon([one, one], 1e-5) == pytest.approx(whole)
    orders = 1 + np.geomspace(0.1, 100, 400)
    together = sum(steps * accountant.rdp(q, sigma, orders) for q, sigma, steps in (one, two))
    best = accountant.to_epsilon(together, orders, 1e-5)[0]
    assert accountant.composed_epsilon([one, two], 1e-5) == pytest.approx(best, rel=1e-3)
    assert accountant.composed_epsilon([one, (0.02, 0.0, 1)], 1e-5) == math.inf


def test_small_epsilons_have_no_floor():
    """A grid that stops at order 63 cannot show less than about 0.1."""
    exact = gaussian_epsilon(1000.0, 1e-5)
    assert exact < epsilon(1, 1000.0, 1, 1e-5)[0] < 1.5 * exact < 0.01
    assert epsilon(0.01, 100, 10, 1e-5)[0] < 0.001


def test_an_order_at_the_edge_of_the_range_warns():
    with pytest.warns(UserWarning, match="edge of the range"):
        spent, _ = epsilon(1, 0.2, 10**7, 1e-5)
    assert spent > gaussian_epsilon(0.2 / 10**3.5, 1e-5)                    # loose, but still a bound


def test_nothing_spent_and_no_noise():
    for spent in (epsilon, pld_epsilon, gdp_epsilon):
        assert np.atleast_1d(spent(0.1, 1.0, 0, 1e-5))[0] == 0
        assert np.atleast_1d(spent(0.1, 0.0, 5, 1e-5))[0] == math.inf
    assert calibrate(1.0, 1e-5, 0.1, 0) == 0


# -----------------------------------------------------------------------------
# calibration

BUDGETS = [(10, 1e-5, 0.017, 200), (1, 1e-5, 0.034, 93), (0.01, 1e-6, 0.01, 1000), (0.1, 1e-9, 1, 1),
           (100, 1e-5, 0.01, 10), (8, 1e-5, 0.001, 10**7), (3, 1e-5, 1, 50)]


@pytest.mark.parametrize("target, delta, q, steps", BUDGETS)
def test_calibrate_never_overshoots_and_wastes_no_budget(target, delta, q, steps):
    sigma = calibrate(target, delta, q, steps)
    assert 0.999 * target < epsilon(q, sigma, steps, delta)[0] <= target
    assert epsilon(q, sigma * 0.9999, steps, delta)[0] > target             # no smaller sigma would have done


# -----------------------------------------------------------------------------
# the second opinions


@pytest.mark.parametrize("sigma", [0.2, 1.0, 30.0])
def test_gaussian_epsilon_is_where_the_hockey_stick_meets_delta(sigma):
    delta = hockey_stick(1, sigma, gaussian_epsilon(sigma, 1e-4), removed=True)
    assert delta == pytest.approx(1e-4, rel=1e-6)
    assert gaussian_epsilon(1e6, 1e-5) == 0


@pytest.mark.parametrize("sigma, steps", [(0.5, 1), (100, 3000)])
def test_pld_without_sampling_lies_a_hair_above_the_exact_gaussian(sigma, steps):
    exact = gaussian_epsilon(sigma / steps**0.5, 1e-5)
    assert exact < pld_epsilon(1, sigma, steps, 1e-5) < exact * 1.0001


def unsampled(count: int):
    """`count` settings (sigma, steps) without sampling, where the exact epsilon is known."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        steps = int(10 ** rng.uniform(0, 4))
        yield 10 ** rng.uniform(-0.7, 1.2) * steps**0.5, steps


@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-10, 1e-14, 1e-30, 1e-100])
def test_pld_is_never_below_the_exact_gaussian_however_small_delta(delta, monkeypatch):
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)                        # a coarse grid: a bound all the same
    for sigma, steps in unsampled(20):
        exact = gaussian_epsilon(sigma / steps**0.5, delta)
        assert exact <= pld_epsilon(1, sigma, steps, delta) <= exact * 1.01 + 1e-9, (sigma, steps)


def test_the_fft_error_is_counted_in_pld(monkeypatch):
    """Without the tilt that makes it small, the float64 error of the FFT is larger than delta."""
    monkeypatch.setattr(pld, "PLD_POINTS", 3**9)
    monkeypatch.setattr(pld, "_tilt", lambda *_: 1e-9)
    for delta in (3e-15, 1e-15):
        for sigma, steps in unsampled(40):
            exact = gaussian_epsilon(sigma / steps**0.5, delta)
            assert pld_epsilon(1, sigma, steps, delta) >= exact, (delta, sigma, steps)


def test_pld_is_tighter_than_rdp_and_clt_is_not_a_bound(monkeypatch):
    monkeypatch.setattr(pld, "PLD_POINTS", 3**11)                       # a coarser grid: a bound all the same
    for q, sigma, steps, delta in [(0.017, 0.64, 200, 1e-5), (0.05, 20, 1000, 1e-6)]:
        tight = pld_epsilon(q, sigma, steps, delta)
        assert gdp_epsilon(q, sigma, steps, delta) < tight < epsilon(q, sigma, steps, delta)[0] < 1.25 * tight


# -----------------------------------------------------------------------------
# what has no meaning is refused


@pytest.mark.parametrize("wrong", [
    dict(q=0), dict(q=-0.1), dict(q=1.1), dict(q=math.nan),
    dict(sigma=-1), dict(sigma=math.nan), dict(sigma=math.inf),
    dict(steps=-1), dict(steps=2.5), dict(steps=math.nan),
    dict(delta=0), dict(delta=1), dict(delta=-1e-5), dict(delta=math.nan)])
@pytest.mark.parametrize("function", [epsilon, pld_epsilon, gdp_epsilon])
def test_settings_without_meaning_raise(function, wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[0]} = .*expected"):
        function(**(GOLDEN | wrong))


@pytest.mark.parametrize("wrong", [
    dict(epsilon=0), dict(epsilon=-1), dict(epsilon=math.nan), dict(epsilon=math.inf),
    dict(q=0), dict(steps=-1), dict(delta=1)])
def test_budgets_without_meaning_raise(wrong):
    with pytest.raises(ValueError, match=f"{list(wrong)[0]} = .*expected"):
        calibrate(**(dict(epsilon=1.0, delta=1e-5, q=0.1, steps=10) | wrong))


def test_orders_and_rdps_without_meaning_raise():
    for orders in ([1.0], [2, 0.5], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="orders"):
            rdp(0.1, 1.0, orders)
    for total, orders in (([1.0], [1.0]), ([-1.0], [2.0]), ([math.nan], [2.0]), ([1.0, 2.0], [2.0])):
        with pytest.raises(ValueError, match="orders"):
            to_epsilon(total, orders, 1e-5)
    with pytest.raises(ValueError, match="cannot be shown"):
        calibrate(1e-9, 1e-30, 1, 1)


# -----------------------------------------------------------------------------
# as a program


def run(*flags):
    return subprocess.run([sys.executable, accountant.__file__, *flags], capture_output=True, text=True,
                          cwd=Path(accountant.__file__).parent)


@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_the_program_prints_what_the_functions_return(delta, monkeypatch, capsys):
    flags = ["--delta", str(delta), "--q", "0.017", "--steps", "200"]

    def said(*goal):
        monkeypatch.setattr(sys, "argv", ["accountant.py", *goal, *flags])
        accountant.main()
        return capsys.readouterr().out
    sigma = calibrate(10, delta, 0.017, 200)
    spent, order = epsilon(0.017, sigma, 200, delta)
    alone = run("--epsilon", "10", *flags).stdout                        # as a process of its own
    for number in (f"sigma = {screen.up(sigma, 7)} ", f"epsilon = {screen.up(spent, 6)},",
                   f"order {order:.4g}"):
        assert number in alone, alone
    of_064 = screen.up(epsilon(0.017, 0.64, 200, delta)[0], 6)
    assert f"epsilon = {of_064}," in said("--sigma", "0.64")
    rows = dict(line.split()[:2] for line in said().splitlines() if line.split()[1:])    # no goal: the table
    assert rows["200"] == screen.up(spent, 6)
    assert rows["1000"] == screen.up(epsilon(0.017, sigma, 1000, delta)[0], 6)


@pytest.mark.parametrize("q, steps", [(0.04, 150), (0.01, 1000), (0.0085, 110), (0.1, 50), (1.0, 7)])
def test_the_sigma_that_is_printed_keeps_the_budget(q, steps, monkeypatch, capsys):
    """And the epsilon that is printed is a bound on what it costs: neither is rounded to the wrong side."""
    monkeypatch.setattr(sys, "argv", ["accountant.py", "--epsilon=10", f"--q={q}", f"--steps={steps}"])
    accountant.main()
    sigma, spent = map(float, re.findall(r"(?:sigma|epsilon) = ([0-9.]+)", capsys.readouterr().out))
    assert epsilon(q, sigma, steps, 1e-5)[0] <= spent <= 10.0


def test_the_second_opinions_stand_beside_the_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "pld.py --q 0.04 --sigma 1.5 --steps 100".split())
    monkeypatch.setattr(pld, "PLD_POINTS", 3**11)                       # for both alike
    pld.main()
    said = capsys.readouterr().out
    for bound in (epsilon(0.04, 1.5, 100, 1e-5)[0], pld_epsilon(0.04, 1.5, 100, 1e-5)):
        assert screen.up(bound, 6) in said
    assert "not a bound" in said


@pytest.mark.parametrize("q, sigma, steps", [(0.04, 1.5, 2250), (0.017, 0.6, 200), (0.2, 3.0, 50)])
def test_the_short_form_is_the_careful_one_at_whole_orders(q, sigma, steps):
    """The sum and the integral are one A_a; real orders in between prove at most a tenth less."""
    orders = np.arange(2, 257)
    whole = to_epsilon(steps * rdp(q, sigma, orders), orders, 1e-5)[0]
    assert accountant.epsilon_in_short(q, sigma, steps, 1e-5) == pytest.approx(whole, rel=1e-9)
    assert 0.9 * whole < epsilon(q, sigma, steps, 1e-5)[0] <= whole


@pytest.mark.parametrize("flags", [
    ["--q", "2"], ["--epsilon", "-1"], ["--sigma", "nan"], ["--steps", "1.5"], ["--delta", "0"],
    ["--sigma", "1", "--epsilon", "1"]])
def test_the_program_refuses_bad_flags(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accountant.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        accountant.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.err.count("\n") == 1 and not said.out, said


@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_compose_prints_what_several_runs_cost_together(delta, tmp_path, monkeypatch, capsys):
    runs = [dict(q=0.02, sigma=0.7, steps=100), dict(q=0.1, sigma=1.6, steps=30)]
    for i, run in enumerate(runs):
        (tmp_path / f"{i}.json").write_text(json.dumps(dict(run, private=True)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["accountant.py", "compose", "0.json", "1.json", f"--delta={delta}"])
    accountant.main()
    together = accountant.composed_epsilon([tuple(run.values()) for run in runs], delta)
    assert capsys.readouterr().out.splitlines()[-2].split()[-1] == screen.up(together, 6)


@pytest.mark.parametrize("argv", [
    ["compose"], ["compose", "no.json"], ["compose", "bad.json"], ["compose", "seeded.json"],
    ["dispose", "bad.json"], ["compose", "good.json", "--sigma=1"], ["compose", "good.json", "--q=0.2"]])
def test_what_cannot_be_composed_is_refused_in_one_line(argv, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.json").write_text('{"q": 2, "sigma": 1, "steps": 1, "private": true}')
    (tmp_path / "good.json").write_text('{"q": 0.1, "sigma": 1, "steps": 1, "private": true}')
    (tmp_path / "seeded.json").write_text('{"q": 0.1, "sigma": 1, "steps": 1, "private": false}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["accountant.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        accountant.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and len(shown.splitlines()) == 1 and "expected" in shown, shown
