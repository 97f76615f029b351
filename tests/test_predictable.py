"""Who can predict a generator from its outputs: torch's generator anybody can, after 624 words of it.

The Mersenne Twister is a recurrence over words of 32 bits, and an output is an invertible function of one of
them, so 624 consecutive outputs are its whole state.                 [Matsumoto & Nishimura 1998, MT19937]
"""
import hashlib

import numpy as np
import pytest
import torch

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


def predicts(words: np.ndarray) -> bool:
    """Whether the first 624 words of a stream, taken as a Mersenne Twister's, give all that follow them."""
    return expected_after(words[:STATE], len(words) - STATE) == words[STATE:].tolist()


def words_of_torch(generator: torch.Generator, count: int) -> np.ndarray:
    """The next `count` outputs, an even number. torch makes 64 bits of two, the first on top."""
    wide = torch.empty(count // 2, dtype=torch.int64).random_(-2**63, None, generator=generator)
    wide = wide.numpy().view(np.uint64)
    return np.stack([wide >> 32, wide & 0xFFFFFFFF], axis=1).ravel().astype(np.uint32)


def words_of_shake(count: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(b"a secret of the run").digest(4 * count), "<u4")


@pytest.mark.parametrize("used", [0, 2, 1000])
def test_624_words_of_torchs_generator_give_all_that_follow(used):
    generator = torch.Generator().manual_seed(1)
    words_of_torch(generator, used)
    assert predicts(words_of_torch(generator, STATE + 2000))


@pytest.mark.parametrize("shape", [(7,), (100,), (16, 64)])
def test_624_words_of_torchs_generator_give_its_next_normals_bit_for_bit(shape):
    """It would be the privacy noise: whoever has these words subtracts it."""
    generator = torch.Generator().manual_seed(2)
    words = words_of_torch(generator, STATE)
    copy = torch.Generator().manual_seed(0)
    state = copy.get_state()
    state[24:24 + 8 * STATE].view(torch.int64).copy_(torch.from_numpy(untempered(words).astype(np.int64)))
    copy.set_state(state)                                # as os_generator does it, with known words
    expected = torch.randn(shape, dtype=torch.float64, generator=copy)
    assert torch.equal(torch.randn(shape, dtype=torch.float64, generator=generator), expected)


def test_the_same_attack_predicts_nothing_of_shake_256():
    words = words_of_shake(STATE + 2000)
    expected = expected_after(words[:STATE], 2000)
    assert not predicts(words)
    bits = np.unpackbits((np.array(expected, np.uint32) ^ words[STATE:]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01                 # of 64,000 bits: 5 standard deviations
