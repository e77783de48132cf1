"""Random numbers are Philox as published, and depend only on seed, purpose and position."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.randomness import (
    _philox_on_device,
    derived_seed,
    normal,
    philox,
    purpose_id,
    random_words,
    squares_key,
    uniform,
    uniform_noise,
)

MANY = torch.arange(50_000)


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as in section 3.3 of the paper, in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for round_ in range(10):
        if round_:
            k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
        high_a, low_a = divmod(a * 0xD2511F53, 2**32)
        high_c, low_c = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high_c ^ b ^ k, low_c, high_a ^ d ^ m, low_a
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = (
        [int(word, 16) for word in text.split()] for text in (counter, key, words)
    )
    for implementation in (philox, _philox_on_device):
        actual = implementation(torch.tensor(counter), (key[0], key[1]))
        assert actual.tolist() == words
    assert reference_philox(counter, key) == words


def test_host_and_device_draw_the_same_bits():
    counter = torch.randint(2**32, (4, 300, 5), generator=torch.Generator().manual_seed(0))
    for key in ((0, 0), (0xFFFFFFFF, 0x9E3779B9)):
        assert torch.equal(philox(counter, key), _philox_on_device(counter, key))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**64 - 1),
    purpose=st.text(max_size=20),
    position=st.integers(0, 2**63 - 1),
    columns=st.integers(1, 9),
)
def test_the_words_of_a_position_are_those_of_its_counter_and_the_seed(
    seed, purpose, position, columns
):
    purpose_word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    expected = []
    for block in range(3):
        counter = [position % 2**32, position // 2**32, block, purpose_word]
        expected += reference_philox(counter, [seed % 2**32, seed // 2**32])
    actual = random_words(seed, purpose, torch.tensor([position]), columns)
    assert actual.tolist() == [expected[:columns]]


def reference_squares(counter: int, key: int) -> int:
    """The function `squares32` of the paper's section 3, in Python's unbounded integers."""
    y = counter * key
    z = y + key
    x = y
    for term in (y, z, y):
        x = (x * x + term) % 2**64
        x = (x >> 32) | (x % 2**32 << 32)
    return (x * x + z) % 2**64 >> 32


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**64 - 1),
    purpose=st.text(max_size=20),
    position=st.integers(0, 2**50),
    columns=st.integers(1, 9),
)
def test_noise_is_squares_as_published(seed, purpose, position, columns):
    """A word's upper 24 bits, its first one inverted."""
    key = squares_key(f"{seed}:{purpose}") % 2**64
    expected = [
        (reference_squares(position * columns + column, key) ^ 2**31) // 2**8 / 2**24
        for column in range(columns)
    ]
    drawn = uniform_noise(seed, purpose, torch.tensor([position]), columns)
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == [expected]


def test_keys_of_noise_are_irregular_and_all_different():
    """The paper's section 4: digits that differ, and an odd number."""
    names = [f"{seed}:{purpose}" for seed in (*range(100), 2**63) for purpose in ("", "a", "b")]
    keys = [f"{squares_key(name) % 2**64:016x}" for name in names]
    assert len({*keys}) == len(names)
    for key in keys:
        assert int(key, 16) % 2 == 1
        assert "0" not in key
        for digits in (key[:8], key[8:15]):
            assert len({*digits}) == len(digits)


@pytest.mark.parametrize("draw", [uniform, uniform_noise, normal])
@settings(deadline=None, max_examples=30)
@given(
    first=st.integers(0, 2**40),
    count=st.integers(1, 40),
    columns=st.integers(1, 7),
    data=st.data(),
)
def test_a_slice_of_positions_draws_the_same_slice_of_numbers(draw, first, count, columns, data):
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    positions = first + torch.arange(count)
    whole = draw(3, "latents", positions, columns)
    assert torch.equal(draw(3, "latents", positions[start:stop], columns), whole[start:stop])
    backwards = draw(3, "latents", positions.flip(0), columns)
    assert torch.equal(backwards.flip(0), whole)


def test_more_columns_do_not_change_the_first_ones():
    few, many = (random_words(1, "a", torch.arange(5), columns) for columns in (3, 10))
    assert torch.equal(many[:, :3], few)


@pytest.mark.parametrize(
    ("seed", "purpose", "first"),
    [
        (1, "a", 0),
        (2**32, "a", 0),  # differs from seed 0 in the high word only
        (0, "b", 0),
        (0, "a", 100),
        (0, "a", 2**32),  # differs from position 0 in the high word only
        (0, "a", 2**62),
    ],
)
def test_no_number_repeats_for_another_seed_purpose_or_far_position(seed, purpose, first):
    base = random_words(0, "a", torch.arange(100), 8)
    other = random_words(seed, purpose, first + torch.arange(100), 8)
    # Among 640,000 pairs of 32-bit words, an equal pair may occur, but an equal row cannot.
    assert len({*base.flatten().tolist()} & {*other.flatten().tolist()}) <= 2


def test_the_projects_purposes_have_different_numbers():
    purposes = ["latents/critic", "latents/generator", "interpolation", "flip", "samples", ""]
    purposes += ["truncation"]
    assert len({purpose_id(purpose) for purpose in purposes}) == len(purposes)
    assert len({derived_seed(seed, p) for seed in range(50) for p in purposes}) == 50 * len(
        purposes
    )
    assert all(0 <= derived_seed(seed, "weights") < 2**63 for seed in range(50))


def distance_to_distribution(values: torch.Tensor, cumulative: np.ndarray) -> float:
    """The Kolmogorov-Smirnov statistic times the root of n; above 1.95 once in a thousand."""
    n = values.numel()
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max(
        float(np.abs(cumulative - steps[1:]).max()), float(np.abs(cumulative - steps[:-1]).max())
    )


def test_uniform_numbers_are_uniform_in_zero_to_one_without_one():
    drawn = uniform(0, "interpolation", MANY, 3)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # The largest word must not be rounded up to 1.
    assert (torch.tensor((2**32 - 1) >> 8).float() * 2**-24).item() < 1
    for column in drawn.double().T:
        assert distance_to_distribution(column, np.sort(column.numpy())) < 1.95


NOISE = {
    "one draw": lambda: uniform_noise(0, "dragan noise", torch.arange(64), 3 * 64 * 64),
    "many steps of few pixels": lambda: uniform_noise(0, "dragan noise", torch.arange(65_536), 12),
    "pixels far into a run": lambda: uniform_noise(7, "b", 2**36 + torch.arange(256), 3072),
    "the first number of many seeds": lambda: torch.cat(
        [uniform_noise(seed, "a", torch.arange(4), 4) for seed in range(4096)]
    ),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_has_the_distribution_of_independent_bits(name):
    """Bytes and pairs of neighbours by chi-square; bits, moments and correlations at distances
    that are steps within a row, between rows and between batches."""
    values = NOISE[name]().double()
    columns = values.shape[1]
    words = (values * 2**24).long().flatten()
    assert 0 <= words.min() <= words.max() < 2**24
    n = len(words)
    tables = [torch.bincount(words >> shift & 255, minlength=256) for shift in (0, 8, 16)]
    tables += [
        torch.bincount((words[:-lag] >> shift & 15) * 16 + (words[lag:] >> shift & 15))
        for lag in (1, columns)
        for shift in (0, 10, 20)
    ]
    for counts in tables:
        expected = counts.sum() / 256
        deviation = ((counts - expected).square().sum() / expected - 255) / math.sqrt(2 * 255)
        assert abs(deviation.item()) < 5
    for bit in range(24):
        assert abs((words >> bit & 1).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)
    centred = values.flatten() - 0.5
    for power, variance in ((1, 1 / 12), (2, 1 / 180), (3, 1 / 448)):
        moment = 1 / 12 if power == 2 else 0.0
        assert abs(centred.pow(power).mean().item() - moment) < 5 * math.sqrt(variance / n)
    for lag in {1, 2, 3, 32, columns - 1, columns, columns + 1, 2 * columns, 16 * columns}:
        product = (centred[lag:] * centred[:-lag]).mean() * 12
        assert abs(product.item()) < 5 / math.sqrt(n - lag), f"{lag} apart"


@pytest.mark.parametrize(
    ("seed", "purpose"), [(1, "a"), (2**32, "a"), (2**63, "a"), (0, "b"), (0, "a ")]
)
def test_noise_of_another_seed_or_purpose_is_other_noise(seed, purpose):
    base, other = (
        uniform_noise(*name, torch.arange(64), 3072).double() - 0.5
        for name in ((0, "a"), (seed, purpose))
    )
    for shift in (0, 1, 3072):
        product = (base.flatten() * other.flatten().roll(shift)).mean() * 12
        assert abs(product.item()) < 5 / math.sqrt(base.numel())
    assert (base == other).sum() < 5


def test_normal_numbers_are_normal():
    drawn = normal(0, "latents/critic", MANY, 4).double()
    for column in drawn.T:
        ordered = np.sort(column.numpy())
        cumulative = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in ordered])
        assert distance_to_distribution(column, cumulative) < 1.95
    n = drawn.numel()
    # Within four standard errors of the moments 0, 1, 0, 3 of a standard normal.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(drawn.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / n)


@pytest.mark.parametrize("columns", [1, 2, 3, 128])
def test_normal_numbers_are_finite_and_reach_into_the_tails(columns):
    drawn = normal(5, "latents/generator", torch.arange(200_000 // columns), columns)
    assert drawn.shape[1] == columns
    assert drawn.isfinite().all()
    assert 4 < drawn.abs().max() < 6


def test_neighbours_columns_purposes_and_seeds_are_uncorrelated():
    base = normal(0, "a", MANY, 2).double()
    n = len(MANY)
    pairs = {
        "neighbouring positions": (base[1:, 0], base[:-1, 0]),
        "the two halves of a Box-Muller pair": (base[:, 0], base[:, 1]),
        "their squares": (base[:, 0].square() - 1, base[:, 1].square() - 1),
        "purposes": (base[:, 0], normal(0, "b", MANY, 2)[:, 0].double()),
        "seeds": (base[:, 0], normal(1, "a", MANY, 2)[:, 0].double()),
        "positions 2**32 apart": (base[:, 0], normal(0, "a", MANY + 2**32, 2)[:, 0].double()),
    }
    for name, (first, second) in pairs.items():
        correlation = (first * second).mean() / (first.std() * second.std())
        assert abs(correlation.item()) < 4 / math.sqrt(n), name
