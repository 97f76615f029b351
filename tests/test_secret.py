"""Properties of the secret random numbers: their definition, their laws, and that none gives away the next.

The keys here are fixed, so a test that holds holds always; each threshold is one that a right generator would
miss with one key in a million.
"""
import hashlib
import json
import math
import os

import numpy as np
import pytest
import scipy.stats
import torch

from conftest import ROOT
import dpsgd
from machinery import secret
from machinery.secret import FINE, REACH, Secret, new_key, tail

KEY = bytes(range(32))
RARE = 1e-6                                              # a p-value below it is no accident
FAR = scipy.stats.norm.isf(RARE / 2)                     # 4.9 standard deviations
USES = [(purpose, step) for purpose in ("", "a", "aa", "coins", "noise", "noise1", "sixteen bytes ..")
        for step in (0, 1, 2, 255, 256, 2**32, 2**64 - 1)]


def whole_numbers(content: bytes) -> list[int]:
    return [int.from_bytes(content[i:i + 8], "little") for i in range(0, len(content), 8)]


# --- words: the definition

@pytest.mark.parametrize("purpose, step", USES)
def test_words_are_shake_256_of_key_purpose_and_step(purpose, step):
    """SHAKE-256( key | purpose, filled up with zeros to 16 bytes | step, 8 bytes, the lowest first )"""
    name = purpose.encode() + bytes(16 - len(purpose))
    number = bytes(step >> 8 * i & 255 for i in range(8))
    expected = whole_numbers(hashlib.shake_256(KEY + name + number).digest(8 * 5))
    assert Secret(KEY).words(purpose, step, 5).tolist() == expected


def test_hashlibs_shake_256_is_the_published_one():
    published = "46b9dd2b0ba88d13233b3feb743eeb243fcd52ea62b81b82b50c27646ed5762f"   # FIPS 202, of no bytes
    assert hashlib.shake_256().hexdigest(32) == published


def test_no_two_uses_have_a_word_in_common():
    """Keys that differ in one bit, purposes of which one begins with the other, steps far and near."""
    others = [KEY, bytes([1]) + KEY[1:], KEY[:-1] + bytes([KEY[-1] ^ 128])]
    words = [word for key in others for use in USES for word in Secret(key).words(*use, 10).tolist()]
    assert len(set(words)) == len(others) * len(USES) * 10


def test_words_do_not_depend_on_what_was_drawn_before_or_how_much_is_drawn():
    generator = Secret(KEY)
    before = generator.words("noise", 7, 100)
    generator.normals(7, 33), generator.coins(6, 12), generator.words("noise", 8, 5)
    assert np.array_equal(generator.words("noise", 7, 40), before[:40])
    assert np.array_equal(Secret(KEY).words("noise", 7, 1000)[:100], before)


@pytest.mark.parametrize("key, purpose, step", [
    (KEY, "noise", -1), (KEY, "noise", 2**64), (KEY, "seventeen bytes .", 1), (KEY[:31], "noise", 1),
    (b"", "noise", 1), (KEY + b"n", "noise", 1)])
def test_a_use_that_could_collide_with_another_is_refused_and_the_key_not_shown(key, purpose, step):
    with pytest.raises(ValueError, match="expected 32 bytes") as refused:
        Secret(key).words(purpose, step, 1)
    assert not key or repr(key)[2:-1] not in str(refused.value)


# --- keys

def test_a_key_is_the_operating_systems_and_every_one_of_its_256_bits_counts(monkeypatch):
    keys = []
    for flipped in range(-1, 256):
        given = int.from_bytes(KEY, "little") ^ (1 << flipped if flipped >= 0 else 0)
        monkeypatch.setattr(os, "urandom", lambda n: (given.to_bytes(32, "little") * 2)[:n])
        keys.append(new_key())
    assert len(set(keys)) == 257 and all(len(key) == 32 for key in keys)


def test_every_seed_has_a_key_of_its_own():
    seeds = {*range(300), *(2**k for k in range(33)), *(2**k - 1 for k in range(33))}
    assert len({new_key(seed) for seed in seeds}) == len(seeds)


def test_the_noise_cannot_be_found_by_trying_all_32_bit_seeds():
    """A key of the operating system is no seed's, 0 included; with a seed it is always the same."""
    assert len({new_key() for _ in range(1000)}) == 1000
    assert new_key(0) == new_key(0) != new_key(1)
    asked = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "urandom", lambda n: asked.append(n) or bytes(n))
        new_key(0)
        assert asked == [] and new_key(None) != new_key(0)
    assert sum(asked) >= 32, "the operating system was asked for fewer than 256 bits"


# --- coins

def test_coins_are_uniform_multiples_of_2_to_the_minus_53():
    coins = Secret(KEY).coins(1, 300_000)
    assert coins.dtype == torch.float64 and 0 <= coins.min() and coins.max() < 1
    parts = (coins * 2.0**53).long()
    assert torch.equal(parts.double() * 2.0**-53, coins), "not whole multiples"
    for bits in (0, 20, 40):                                             # its leading bits, and its last
        assert scipy.stats.kstest((coins.numpy() * 2.0**bits) % 1, "uniform").pvalue > RARE, bits
    assert abs((parts & 1).double().mean() - 0.5) < FAR / 2 / len(coins)**0.5


def test_the_smallest_coin_is_0_and_the_largest_is_below_1(monkeypatch):
    for word, coin in ((0, 0.0), (2**64 - 1, 1 - 2.0**-53)):
        monkeypatch.setattr(Secret, "words", lambda self, purpose, step, n: np.full(n, word, np.uint64))
        assert Secret(KEY).coins(1, 3).tolist() == [coin] * 3


def test_the_uniform_draws_of_a_lot_are_fine_enough_for_a_small_q():
    """Of 30,000 coins with 24 bits about 27 coincide, and no q below 6e-8 is possible; with 53, none do."""
    assert len(Secret(KEY).coins(1, 30_000).unique()) == 30_000


def test_the_coin_of_an_image_does_not_depend_on_how_many_images_there_are():
    assert torch.equal(Secret(KEY).coins(3, 1000)[:77], Secret(KEY).coins(3, 77))
    assert len(Secret(KEY).coins(3, 0)) == 0


# --- normals

@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_normals_are_box_and_mullers(n):
    """The definition, by a loop over whole numbers: all cosines, then all sines."""
    pairs = (n + 1) // 2
    w = whole_numbers(hashlib.shake_256(KEY + b"noise".ljust(16, b"\0") + (5).to_bytes(8, "little"))
                      .digest(24 * pairs))
    expected = [0.0] * (2 * pairs)
    for i in range(pairs):
        u = (w[i] * 2**64 + w[pairs + i] + 1) / 2**128
        radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * w[2 * pairs + i] / 2**64
        expected[i], expected[pairs + i] = radius * math.cos(angle), radius * math.sin(angle)
    found = Secret(KEY).normals(5, n)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.tolist(), expected[:n], rtol=0, atol=1e-12)


def test_short_normals_are_as_exact_as_long_ones(monkeypatch):
    """sqrt(-2 log u) to 14 digits, also where u differs from 1 by less than float64 can write."""
    rest = [3**k for k in range(80)] + [2**k + 1 for k in range(1, 128)]         # (1 - u) 2^128
    words = [[(2**128 - 1 - r) >> 64 for r in rest], [(2**128 - 1 - r) % 2**64 for r in rest],
             [i * 2**56 for i in range(len(rest))]]
    monkeypatch.setattr(Secret, "words", lambda *_: np.array(words, dtype=np.uint64).ravel())
    length = Secret(KEY).normals(5, 2 * len(rest)).view(2, -1).norm(dim=0)
    exact = [math.sqrt(-2 * (math.log1p(-r / 2**128) if r < 2**127 else math.log((2**128 - r) / 2**128)))
             for r in rest]
    torch.testing.assert_close(length.tolist(), exact, rtol=1e-14, atol=0)


def test_normals_have_the_law_of_n_0_1():
    x = Secret(KEY).normals(1, 1_000_000).numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > RARE
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = (x**power).mean()
        assert abs(moment - mean) < FAR * (variance / len(x))**0.5, f"E[x^{power}] = {moment:.4f}"
    for far in (3.0, 4.0, 4.5):                                          # both tails, beyond what KS can see
        beyond, share = (abs(x) > far).sum(), 2 * scipy.stats.norm.sf(far)
        assert scipy.stats.binomtest(int(beyond), len(x), share).pvalue > RARE, (far, beyond)


def test_normals_of_other_coordinates_and_other_steps_have_nothing_in_common():
    """Neither they nor their squares: the two of a pair share a radius, and are independent all the same."""
    table = np.stack([Secret(KEY).normals(step, 20).numpy() for step in range(4000)])     # (steps, 20)
    coins = np.stack([Secret(KEY).coins(step, 20).numpy() for step in range(4000)])
    for drawn in (table, table**2, np.concatenate([table, coins], axis=1)):
        between = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
        assert abs(between).max() < (FAR + 1) / 4000**0.5, "coordinates go together"
    for drawn in (table, table**2 - 1):
        next_one = (drawn[1:] * drawn[:-1]).mean() / drawn.var()
        assert abs(next_one) < FAR / drawn.size**0.5, "a step goes with the one before"


def test_no_normal_is_ever_drawn_twice():
    drawn = [Secret(key).normals(step, 20_001) for key in (KEY, new_key(0)) for step in range(1, 11)]
    assert len(torch.cat(drawn).unique()) == 2 * 10 * 20_001


@pytest.mark.parametrize("high, low, longest", [
    (0, 0, REACH), (0, 1, REACH - 0.05), (2**64 - 1, 2**64 - 1, 0.0), (2**63, 0, 1.18)])
def test_the_longest_normal_is_13_3_and_all_are_finite(high, low, longest, monkeypatch):
    monkeypatch.setattr(Secret, "words", lambda *_: np.array([high, low, 0], np.uint64))
    pair = Secret(KEY).normals(1, 2)
    assert pair.isfinite().all() and pair.abs().max() <= REACH
    assert pair[0].item() == pytest.approx(longest, abs=1e-15 if longest in (0, REACH) else 0.01)
    assert REACH == pytest.approx(13.32, abs=0.005)


@pytest.mark.parametrize("sigma", [0.3, 0.999, 1.0, 1.001, 30.0])
def test_up_to_fine_five_possible_lengths_lie_in_each_unit_of_a_release(sigma, monkeypatch):
    C, low = 0.7, 2**28 - 1                                              # u = (low + 1) / 2^128 = 2^-100
    monkeypatch.setattr(Secret, "words", lambda *_: np.array([0, 0, low, low + 1, 0, 0], np.uint64))
    above, below = Secret(KEY).normals(1, 4)[:2].tolist()                # neighbours, both at angle 0
    assert above == pytest.approx(FINE, rel=1e-8)
    assert 0 < 5 * sigma * C * (above - below) < dpsgd.grid(sigma, C)


# --- what the long normals, which are not Gaussian, add to delta

@pytest.mark.parametrize("reach", [2.5, 3.5])
@pytest.mark.parametrize("q, sigma", [(1.0, 1.0), (0.3, 0.7)])
def test_delta_with_normals_that_are_cut_grows_by_the_tail_at_most(q, sigma, reach, monkeypatch):
    """The definition, integrated over the plane of a pair of normals that is no longer than `reach`. An image
    moves it by 1/sigma with probability q; delta is the integral of (P - e^epsilon Q)_+, both ways round.
    """
    monkeypatch.setattr(secret, "FINE", reach)                           # 11.8: nothing could be seen
    epsilon = 2.0                                       # e^2: the world that counts more is seen
    x, y = np.meshgrid(np.linspace(-9, 9, 1201), np.linspace(-9, 9, 1201))

    def densities(longest):
        at = []
        for move in (0.0, 1 / sigma):
            squared = (x - move)**2 + y**2
            density = np.exp(-squared / 2) * (squared <= longest**2)
            at.append(density / density.sum())
        return at[0], (1 - q) * at[0] + q * at[1]

    def delta(P, Q):
        return np.maximum(P - math.exp(epsilon) * Q, 0).sum()
    for way in (1, -1):
        unbounded, bounded = (delta(*densities(longest)[::way]) for longest in (math.inf, reach))
        assert bounded <= unbounded + tail(epsilon, 1, 2), f"{bounded:.3g} of {unbounded:.3g}"
        assert way == 1 and q < 1 or bounded > unbounded + 1e-4 * tail(epsilon, 1, 2), "nothing was seen"


def test_the_tail_is_that_of_a_pair_times_the_number_of_pairs_and_a_probability():
    for epsilon in (0.1, 1, 10):
        one = (1 + math.exp(epsilon)) * 2.0**-100
        for steps, weights, pairs in ((1, 1, 1), (1, 3, 2), (10, 100, 500), (110, 25_281, 1_390_510)):
            assert tail(epsilon, steps, weights) == pytest.approx(pairs * one, rel=1e-9, abs=0)
    assert tail(math.inf, 1, 1) == 1.0


def test_a_secret_does_not_show_its_key():
    assert repr(Secret(KEY)) == str(Secret(KEY)) == f"{Secret(KEY)}" == "Secret(key=...)"


def test_the_tail_of_every_shipped_run_is_nothing_beside_its_delta():
    found = sorted((ROOT / "assets").glob("*-eps*/privacy.json"))
    for path in found:
        said = json.loads(path.read_text())
        adapter = torch.load(path.parent / "adapter_model.bin", weights_only=True)
        weights = sum(p.numel() for p in adapter.values())
        assert tail(said["epsilon"], said["steps"], weights) < 1e-16 < said["delta"], path
    assert len(found) >= 8


# --- who can predict a generator from its outputs: torch's generator anybody can, after 624 words of it
#
# The Mersenne Twister is a recurrence over words of 32 bits, and an output is an invertible function of one
# of them, so 624 consecutive outputs are its whole state.              [Matsumoto & Nishimura 1998, MT19937]

STATE = 624                                              # words of 32 bits
SHIFT = 397                                              # the recurrence's second word


def untempered(outputs: np.ndarray) -> np.ndarray:
    """The words of the state whose outputs these are: `tempered` undone, from its last step to its first."""
    y = outputs.astype(np.uint64)
    y ^= y >> 18
    y ^= y << 15 & 0xEFC60000
    low = y.copy()
    for _ in range(4):                                   # each pass corrects the next seven bits
        low = y ^ (low << 7 & 0x9D2C5680)
    return low ^ low >> 11 ^ low >> 22


def tempered(x: int) -> int:
    x ^= x >> 11
    x ^= x << 7 & 0x9D2C5680
    x ^= x << 15 & 0xEFC60000
    return x ^ x >> 18


def expected_after(outputs: np.ndarray, count: int) -> list[int]:
    """The `count` outputs after 624 `outputs` of a Mersenne Twister, wherever in its stream these were."""
    x = untempered(outputs).tolist()
    for k in range(count):
        mixed = (x[k] & 0x80000000) | (x[k + 1] & 0x7FFFFFFF)
        x.append(x[k + SHIFT] ^ mixed >> 1 ^ 0x9908B0DF * (mixed & 1))
    return [tempered(word) for word in x[STATE:]]


def words_of_torch(generator: torch.Generator, count: int) -> np.ndarray:
    """The next `count` outputs, an even number. torch makes 64 bits of two, the first on top."""
    wide = torch.empty(count // 2, dtype=torch.int64).random_(-2**63, None, generator=generator)
    wide = wide.numpy().view(np.uint64)
    return np.stack([wide >> 32, wide & 0xFFFFFFFF], axis=1).ravel().astype(np.uint32)


@pytest.mark.parametrize("used", [0, 2, 1000])
def test_624_words_of_torchs_generator_give_all_that_follow(used):
    generator = torch.Generator().manual_seed(1)
    words_of_torch(generator, used)
    words = words_of_torch(generator, STATE + 2000)
    assert expected_after(words[:STATE], 2000) == words[STATE:].tolist()


@pytest.mark.parametrize("shape", [(7,), (100,), (16, 64)])
def test_624_words_of_torchs_generator_give_its_next_normals_bit_for_bit(shape):
    """They would be the privacy noise: whoever has these words subtracts it."""
    generator = torch.Generator().manual_seed(2)
    words = words_of_torch(generator, STATE)
    copy = torch.Generator().manual_seed(0)
    state = copy.get_state()
    state[24:24 + 8 * STATE].view(torch.int64).copy_(torch.from_numpy(untempered(words).astype(np.int64)))
    copy.set_state(state)
    expected = torch.randn(shape, dtype=torch.float64, generator=copy)
    assert torch.equal(torch.randn(shape, dtype=torch.float64, generator=generator), expected)


def test_the_same_attack_predicts_nothing_of_the_secret_words():
    words = Secret(KEY).words("noise", 1, (STATE + 2000) // 2).astype("<u8").view("<u4")
    expected = expected_after(words[:STATE], 2000)
    assert expected != words[STATE:].tolist()
    bits = np.unpackbits((np.array(expected, np.uint32) ^ words[STATE:]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < FAR / 2 / len(bits)**0.5, f"{bits.mean():.1%} of the bits are wrong"
