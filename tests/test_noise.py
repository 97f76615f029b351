"""Properties of the arithmetic: sums are whole numbers, and the last bits of a release tell nothing."""
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

import dpsgd
from machinery.secret import REACH, Secret, new_key

SECRET = Secret(new_key(1))
SIZES = [1e-40, 1e-25, 3e-3, 1.0, 1e30]                  # of C, gradient units


def gradient_is_x(params, *x):
    """A per_sample: the gradient of example x is x itself, tensor by tensor."""
    return dict(zip(params, x))


def without(grads, i):
    return {name: torch.cat([g[:i], g[i + 1:]]) for name, g in grads.items()}


def some_gradients(n: int, C: float = 1.0) -> dict[str, torch.Tensor]:
    """Float32 gradients of n images, in three tensors; the lengths go from C / 300 to 300 C."""
    lengths = torch.logspace(-2.5, 2.5, n).view(n, 1) / 53**0.5 * C
    return {"a": lengths * torch.randn(n, 20), "b": lengths[:, None] * torch.randn(n, 3, 1),
            "c": lengths * torch.randn(n, 30)}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- whole numbers: each clipped gradient is rounded towards zero to multiples of the unit

@pytest.mark.parametrize("C", [*SIZES, 0.75, 2.0, math.nextafter(2.0, 0), math.nextafter(2.0, 3)])
def test_the_unit_is_a_power_of_2_below_a_part_in_2_to_the_40_of_C(C):
    unit = Fraction(dpsgd.unit(C))
    assert math.frexp(dpsgd.unit(C))[0] == 0.5
    assert 2**40 <= Fraction(C) / unit < 2**41
    assert dpsgd.MOST_EXAMPLES * math.floor(Fraction(C) / unit) < 2**63, "the sum would not fit into int64"


@pytest.mark.parametrize("C", SIZES)
def test_a_clipped_gradient_is_its_definition_in_exact_fractions(C):
    """trunc(g min(1, C / |g|) / unit), image by image, with a C smaller by SLACK for float64's errors."""
    unit, clipped = Fraction(dpsgd.unit(C)), 0
    grads = {name: 1.1 * g.double() for name, g in some_gradients(9, C).items()}  # float32 has few fractions
    for i in range(9):
        row = [Fraction(x) for g in grads.values() for x in g[i].flatten().tolist()]
        squared, bound = sum(x * x for x in row), Fraction(C) * (1 - Fraction(dpsgd.SLACK))
        long = squared > bound**2
        norm = Fraction(math.isqrt(math.floor(squared / unit**2 * 2**100)), 2**50) * unit
        expected = [math.trunc((x * bound / norm if long else x) / unit) for x in row]
        alone = dpsgd.clip_and_count({name: g[i:i + 1] for name, g in grads.items()}, C)
        found = [k for count in alone.values() for k in count.flatten().tolist()]
        apart = [abs(a - b) for a, b in zip(found, expected)]
        assert max(apart) <= long and sum(apart) <= 1, f"image {i}: {apart} units from the definition"
        clipped += long
    assert 0 < clipped < 9


def test_rounding_is_towards_zero_and_costs_less_than_a_part_in_2_to_the_40_of_C():
    C, grads = 0.5, some_gradients(1, 0.5)
    short = {name: g.double() * (0.9 * C / dpsgd.norms(grads).item()) for name, g in grads.items()}
    for name, kept in dpsgd.clip_and_sum(short, C).items():
        g = short[name][0]
        assert (kept * g >= 0).all() and (kept.abs() <= g.abs()).all(), "a sign changed, or a number grew"
        assert ((g - kept).abs() < C * 2.0**-40).all()


def adversarial(C: float) -> dict[str, torch.Tensor]:
    """Gradients of one image, float64, made to come out a hair too long."""
    unit, g = dpsgd.unit(C), torch.Generator().manual_seed(0)
    whole = torch.randint(-2**41, 2**41, (1000,), generator=g).double() * unit
    direction = torch.randn(1000, generator=g).double()
    direction, many = direction / direction.norm(), torch.full((100_000,), C, dtype=torch.float64)
    rows = {"whole units": whole, "3-4-5": torch.tensor([3, 4]).double() / 5 * C,
            "3-4-5, long": torch.tensor([3, 4]).double() * 7 * C,
            "one coordinate": torch.tensor([C], dtype=torch.float64),
            "one, long": torch.tensor([-1e5 * C], dtype=torch.float64),
            "equal": many / 100_000**0.5, "equal, long": many, "half units": (whole / 2**11 + unit / 2) / 2}
    for hair in (2.0**-23, 2.0**-31, 2.0**-52):
        rows |= {f"above by {hair:.0e}": direction * C * (1 + hair), f"below by {hair:.0e}":
                 direction * C * (1 - hair)}
    return rows


@pytest.mark.parametrize("C", SIZES)
def test_an_image_is_a_vector_of_whole_numbers_no_longer_than_C_over_the_unit(C):
    """In whole numbers of any size: sum of k^2 <= (C / unit)^2, with nothing to spare for rounding."""
    for name, row in adversarial(C).items():
        ks = dpsgd.clip_and_count({"w": row[None]}, C)["w"].tolist()
        squared, most = sum(k * k for k in ks), (Fraction(C) / Fraction(dpsgd.unit(C)))**2
        assert squared <= most, f"{name}: longer than C by {float(squared / most - 1):.1g}"
        kept = min(1, math.fsum((row / C).square().tolist()))
        assert squared / most > kept * (1 - 4 * dpsgd.SLACK), f"{name}: cut by too much"


@pytest.mark.parametrize("C", SIZES)
def test_removing_an_image_removes_exactly_its_own_whole_numbers(C):
    grads = some_gradients(12, C)
    together = dpsgd.clip_and_count(grads, C)
    for i in range(12):
        own = dpsgd.clip_and_count({name: g[i:i + 1] for name, g in grads.items()}, C)
        rest = dpsgd.clip_and_count(without(grads, i), C)
        assert equal(own, {name: together[name] - rest[name] for name in grads}), i


@pytest.mark.parametrize("parts", [
    [slice(None, None, -1)], [slice(i, i + 1) for i in range(37)], [slice(0, 36), slice(36, 37)],
    [slice(rank, None, 3) for rank in range(3)], [slice(rank, None, 2) for rank in (1, 0)]],
    ids=["backwards", "one by one", "36 and 1", "3 ranks", "2 ranks"])
def test_the_sum_is_the_same_to_the_last_bit_in_any_order_any_chunks_and_any_split_over_ranks(parts):
    grads = some_gradients(37)
    places = torch.arange(37)
    total = {name: torch.zeros(g.shape[1:], dtype=torch.int64) for name, g in grads.items()}
    for part in parts:
        rows = places.flip(0) if part.step == -1 else places[part]
        for name, count in dpsgd.clip_and_count({k: g[rows] for k, g in grads.items()}, 1.0).items():
            total[name] += count
    assert equal(total, dpsgd.clip_and_count(grads, 1.0))


def test_sums_of_more_images_than_float64_can_count_are_still_exact():
    """5,000 images that all pull the same way: more than 2^53 units. Then the value is rounded, once."""
    C, n = math.nextafter(2.0, 0), 5001
    grads = {"w": torch.full((n, 1), 3.0), "v": torch.zeros(n, 1)}
    one = dpsgd.clip_and_count({name: g[:1] for name, g in grads.items()}, C)["w"].item()
    count = dpsgd.clip_and_count(grads, C)["w"]
    assert count.dtype == torch.int64 and count.item() == n * one > 2**53
    assert dpsgd.value(count, C).item() == float(n * one * Fraction(dpsgd.unit(C)))


def test_no_clipping_is_a_plain_sum():
    grads = some_gradients(5)
    for name, total in dpsgd.clip_and_sum(grads, math.inf).items():
        torch.testing.assert_close(total, grads[name].double().sum(0))


# --- clipping, for every float32 and every C

@pytest.mark.parametrize("C", [1e-40, 1e-30, 1e-22, 1e-3, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-22, 1.0, 1e19, 3e38])
def test_an_image_counts_for_C_or_less_whatever_its_gradients_size(size, C):
    """No square underflows to a norm of 0, none overflows; a gradient shorter than C is left alone."""
    g = {"a": torch.full((1, 300), size), "b": torch.full((1, 10, 10), -size)}
    length = g["a"][0, 0].double().item() * 20                           # 400 equal numbers
    total = dpsgd.clip_and_sum(g, C)
    found = math.sqrt(math.fsum((t / C).square().sum().item() for t in total.values()))
    assert found <= 1
    assert found == pytest.approx(min(length / C, 1), rel=2 * dpsgd.SLACK, abs=20 * 2.0**-40)


def test_one_image_moves_a_step_by_C_over_B_at_the_smallest_C():
    x = torch.randn(6, 50)
    params = {"w": torch.zeros(50).double()}

    def step(lot):
        return dpsgd.private_gradient(gradient_is_x, params, (lot,), C=1e-40, sigma=0, B=4)["w"]
    assert (step(x) - step(x[1:])).norm().item() * 4 == pytest.approx(1e-40, rel=2 * dpsgd.SLACK, abs=0)


@pytest.mark.parametrize("C", [0.0, -1.0, 1e-41, 1e-320, math.nan])
def test_a_C_below_the_smallest_is_refused(C):
    with pytest.raises(ValueError, match="at least 1e-40"):
        dpsgd.clip_and_sum({"a": torch.ones(1, 3)}, C)


# --- the noise is added once, in float64, and the release is rounded whatever the sum was

def test_noise_is_std_times_the_normals_it_is_given_and_nothing_else():
    total = {"a": torch.zeros(3, 100_000), "b": torch.randn(7).double()}         # 300,000: two are beyond 4.5
    normals = SECRET.normals(1, 300_007)
    noisy = dpsgd.add_noise(total, 0.7, normals)
    own = {"a": normals[:300_000].view(3, 100_000), "b": normals[300_000:]}
    for name, g in total.items():
        assert noisy[name].dtype == torch.float64 and torch.equal(noisy[name], g.double() + 0.7 * own[name])
    assert noisy["a"].abs().max() > 4.5 * 0.7


@pytest.mark.parametrize("m", [0, 5])
def test_a_step_is_the_clipped_sum_and_sigma_C_normals_over_B_rounded_once(m):
    x, C, sigma, B, normals = 9 * torch.randn(m, 40), 0.03, 1.7, 12, SECRET.normals(2, 40)
    released = dpsgd.private_gradient(gradient_is_x, {"w": torch.zeros(40)}, (x,), C=C, sigma=sigma, B=B,
                                      chunk=2, normals=normals)["w"]
    wide = x.double()
    clipped = (wide * (C / wide.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    assert released.dtype == torch.float32
    torch.testing.assert_close(released, ((clipped + sigma * C * normals) / B).float(), rtol=2e-7, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 7, 36, 37, 100])
def test_a_release_is_the_same_to_the_last_bit_for_any_chunk_and_order(chunk):
    grads, C = some_gradients(37), 0.3
    params = {name: torch.zeros(g.shape[1:]) for name, g in grads.items()}

    def release(rows, chunk):
        return dpsgd.private_gradient(gradient_is_x, params, tuple(g[rows] for g in grads.values()), C=C,
                                      sigma=1e-4, B=10, chunk=chunk, normals=SECRET.normals(3, 53))
    whole = release(torch.arange(37), 37)
    for seed in range(3):
        order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
        assert equal(release(order, chunk), whole)


@pytest.mark.parametrize("sigma", [0.7, 3000.0])
@pytest.mark.parametrize("C", [1e-40, 3e-3, 1e30])
@pytest.mark.parametrize("lot", [0, 3])
def test_a_release_is_a_whole_number_of_units_whatever_the_sum_and_the_noise_are(lot, C, sigma):
    x, params = torch.randn(lot, 2000), {"w": torch.zeros(2000).double()}
    normals = SECRET.normals(4, 2000) * torch.logspace(-30, 0, 2000, dtype=torch.float64)    # tiny ones, too
    released = dpsgd.private_gradient(gradient_is_x, params, (x,), C=C, sigma=sigma, B=1, normals=normals)
    units = released["w"] / dpsgd.grid(sigma, C)
    assert torch.equal(units, units.round()) and len(units.unique()) > 100


@pytest.mark.parametrize("sigma", [0.1, 1.0, 30.0, 3000.0, 3e6])
def test_a_release_is_coarser_than_the_gaps_between_the_numbers_that_the_noise_can_take(sigma):
    """Else a number near 0 may be possible for one sum and impossible, or less likely, for another.

    Such noise is sigma C r cos(angle) with a float64 angle near 3/2 pi and r up to REACH.
    """
    C, angle = 0.3, torch.tensor(1.5 * math.pi, dtype=torch.float64)
    above = torch.nextafter(angle, torch.tensor(7.0, dtype=torch.float64))
    normals = REACH * torch.stack([angle.cos(), above.cos()])            # two neighbours near 0
    gap = (sigma * C * (normals[1] - normals[0])).item()
    steps = torch.arange(200, dtype=torch.float64) * 2**12 * gap / (sigma * C)
    released = dpsgd.private_gradient(gradient_is_x, {"w": torch.zeros(200).double()}, (torch.zeros(0, 200),),
                                      C=C, sigma=sigma, B=1, normals=steps)["w"]
    different = released.unique().diff()
    assert gap > 0 and (different.numel() == 0 or different.min() > 2**16 * gap)


def test_with_the_noise_known_an_image_moves_a_release_by_its_own_whole_numbers():
    """So the noise is added to the exact sum: one rounded before, as to float32, would move by others."""
    x, C, normals = 9 * torch.randn(12, 500), 0.3, SECRET.normals(5, 500)

    def units(lot):
        released = dpsgd.private_gradient(gradient_is_x, {"w": torch.zeros(500).double()}, (lot,), C=C,
                                          sigma=0.7, B=1, normals=normals)["w"]
        return (released / dpsgd.unit(C)).long()
    for i in range(12):
        own = dpsgd.clip_and_count({"w": x[i:i + 1]}, C)
        moved = units(x) - units(torch.cat([x[:i], x[i + 1:]]))
        step = dpsgd.grid(0.7, C) / dpsgd.unit(C)                        # sum and noise are rounded together
        assert (moved - own["w"]).abs().max() <= step, i


def float32_release(total: float, normals: torch.Tensor) -> torch.Tensor:
    """What Mironov attacked, for Gaussian noise: float32 normals on a float32 sum."""
    return (total + normals.float()).double()


def float64_release(total: float, normals: torch.Tensor) -> torch.Tensor:
    """The same in float64."""
    return total + normals


def our_release(total: float, normals: torch.Tensor) -> torch.Tensor:
    """Of an image whose gradient is `total` in every coordinate, at C = 1 in each."""
    C, n = len(normals)**0.5, len(normals)
    x = torch.full((1, n), total)
    released = dpsgd.private_gradient(gradient_is_x, {"w": torch.zeros(n).double()}, (x,), C=C, sigma=1 / C,
                                      B=1, normals=normals)
    return released["w"]


@pytest.mark.parametrize("release, bits, tells", [
    (float32_release, 24, True), (float64_release, 53, True),
    (our_release, 24, False), (our_release, 53, False)])
def test_the_last_bits_of_a_release_near_0_do_not_tell_whether_the_sum_was_0_or_1(release, bits, tells):
    """1 + z has no bits finer than 2^-bits where z is about -1, but 0 + z has.      [after Mironov 2012]"""
    said = []
    for step, total in ((5, 0.0), (6, 1.0)):
        released = release(total, SECRET.normals(step, 10_000))
        near = released[released.abs() < 1 / 4] * 2.0**bits
        said.append(torch.equal(near, near.round()))
    assert (said[0] != said[1]) == tells, said


# --- the lattice of the uniform numbers that normals are made of

def coarse_normals(step: int, n: int) -> torch.Tensor:
    """Float32 normals as they are usually made, of uniform numbers with 24 bits."""
    high, v = SECRET.words("noise", step, n).reshape(2, -1)
    u = ((high >> np.uint64(40)).astype(np.float32) + 1) * np.float32(2.0**-24)
    radius, angle = np.sqrt(-2 * np.log(u)), (2 * np.pi * 2.0**-64 * v.astype(np.float64)).astype(np.float32)
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])).double()


def uniforms_of(normals: torch.Tensor) -> torch.Tensor:
    """Box-Muller undone: exp(-r^2 / 2) of each pair."""
    return torch.exp(-normals.view(2, -1).square().sum(0) / 2)


def right_answers(normals_of) -> int:
    """Of 200 guesses "was this image in it?", from one released step and the others' sum, how many are right.

    The guesser subtracts what he believes the sum to be, and looks which rest has radii on the lattice of
    24-bit uniforms.
    """
    g, right, d, std, B = torch.Generator().manual_seed(3), 0, 4096, 0.5, 8
    for trial in range(200):
        others, image = torch.randn(2, d, generator=g, dtype=torch.float64)
        image, inside = image / image.norm(), trial % 2
        noisy = dpsgd.add_noise({"w": others + inside * image}, std, normals_of(100 + trial, d))
        released = (noisy["w"] / B).float().double()
        off = []
        for believed in (others, others + image):
            u = uniforms_of((released * B - believed) / std)
            steps = u[u < 0.02] * 2**24
            off.append((steps - steps.round()).abs().mean())
        right += int(off[1] < off[0]) == inside
    return right


def test_the_lattice_of_the_noise_says_nothing_of_who_was_in_a_step():
    assert right_answers(coarse_normals) > 190, "the attack must work on coarse noise, or this could not fail"
    assert abs(right_answers(SECRET.normals) - 100) < 36                 # a coin: 5 standard deviations


def test_the_radii_of_the_normals_lie_on_no_lattice_that_float32_has():
    """The uniform number of a pair, modulo 2^-24 and 2^-36, is uniform again."""
    def p_value(normals, bits):
        u = uniforms_of(normals)
        return scipy.stats.kstest((u[u < 1 / 32] * 2.0**bits) % 1, "uniform").pvalue
    for bits in (24, 36):
        assert p_value(SECRET.normals(7, 64_000), bits) > 1e-6, bits
    assert p_value(coarse_normals(7, 64_000), 24) < 1e-6, "the lattice must be seen where there is one"
