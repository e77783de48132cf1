"""Random permutations, whole or index by index, are uniform and the same on every machine."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.randomness import _splitmix, permutation, permuted, purpose_id


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.tuples(*[st.integers(0, 2**40)] * 3),
    length=st.integers(0, 300),
)
def test_a_permutation_holds_every_number_once(seed, stream, length):
    order = permutation(seed, "order/blocks", stream, length)
    assert sorted(order.tolist()) == list(range(length))


def test_permutations_are_the_same_as_ever():
    """If NumPy changed them, it would change the data order of every resumed run."""
    assert permutation(7, "order/blocks", (3, 2, 1), 10).tolist() == [1, 8, 0, 6, 9, 5, 4, 3, 2, 7]
    assert permutation(0, "shuffle", (0, 0, 0), 6).tolist() == [5, 0, 2, 3, 1, 4]


def test_every_word_of_seed_purpose_and_stream_changes_the_permutation():
    cases = list(itertools.product((0, 1, 2**32), "ab", (0, 1), (0, 1), (0, 1)))
    orders = {
        tuple(permutation(seed, purpose, (epoch, lane, window), 40))
        for seed, purpose, epoch, lane, window in cases
    }
    assert len(orders) == len(cases)


def test_all_orders_of_four_are_equally_frequent():
    counts: dict[tuple[int, ...], int] = {}
    for stream in range(4800):
        order = tuple(permutation(0, "order/window", (0, 0, stream), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom: above that once in a thousand


def chi_square_once_in_a_thousand(degrees: int) -> float:
    """By the approximation of Wilson and Hilferty, which is exact to a percent."""
    return degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


def reference_permuted(seed: int, purpose: str, stream, index: int, length: int) -> int:
    """Black and Rogaway's cipher over Z_a x Z_b as in the docstring, in Python's integers."""
    root = math.isqrt(length)
    b = root if root % 2 == 0 else root + 1
    a = math.ceil(length / b)
    key = np.array([seed, purpose_id(purpose)], dtype=np.uint64)
    round_keys = np.random.Philox(key=key, counter=[0, *stream]).random_raw(24).tolist()

    def splitmix_word(state: int, number: int) -> int:
        for _ in range(number + 1):  # the generator itself, word by word
            state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = state
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    while True:
        left, right = index // b, index % b
        for number, round_key in enumerate(round_keys):
            if number % 2 == 0:
                left = (left + splitmix_word(round_key, right)) % a
            else:
                right = (right + splitmix_word(round_key, left)) % b
        index = left * b + right
        if index < length:
            return index


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.tuples(*[st.integers(0, 2**40)] * 3),
    length=st.integers(1, 200),
)
def test_indices_are_permuted_by_the_published_cipher(seed, stream, length):
    actual = permuted(seed, "order/blocks", stream, np.arange(min(length, 12)), length)
    expected = [
        reference_permuted(seed, "order/blocks", stream, index, length)
        for index in range(min(length, 12))
    ]
    assert actual.tolist() == expected


def test_splitmix_words_are_the_published_ones():
    """For seed 1234567, as in the test vectors of the generator's C version."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _splitmix(np.uint64(1234567), np.arange(3, dtype=np.uint64)).tolist() == words


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 99, 1000, 65_537])
def test_every_index_is_permuted_to_a_different_one_and_back(length):
    indices = np.arange(length)
    for epoch in range(5):
        actual = permuted(3, "order/blocks", (epoch, 0, 0), indices, length)
        assert np.array_equal(np.sort(actual), indices)
        back = permuted(3, "order/blocks", (epoch, 0, 0), actual, length, inverse=True)
        assert np.array_equal(back, indices)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    length=st.integers(1, 2**62),
    data=st.data(),
)
def test_an_index_among_billions_is_permuted_by_itself_and_back(seed, length, data):
    indices = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=30)))
    actual = permuted(seed, "a", (1, 2, 3), indices, length)
    assert actual.min() >= 0
    assert actual.max() < length
    alone = [permuted(seed, "a", (1, 2, 3), indices[i : i + 1], length) for i in range(len(actual))]
    assert np.array_equal(np.concatenate(alone), actual)
    assert np.array_equal(permuted(seed, "a", (1, 2, 3), actual, length, inverse=True), indices)


@pytest.mark.parametrize(("index", "length"), [(-1, 5), (5, 5), (0, 0)])
def test_an_index_out_of_range_is_refused(index, length):
    with pytest.raises(ValueError, match="length"):
        permuted(0, "a", (0, 0, 0), np.array([index]), length)


def test_every_word_of_seed_purpose_and_stream_changes_where_indices_go():
    cases = list(itertools.product((0, 1, 2**32), "ab", (0, 1), (0, 1), (0, 1)))
    orders = {
        tuple(permuted(seed, purpose, (epoch, lane, window), np.arange(40), 10**9))
        for seed, purpose, epoch, lane, window in cases
    }
    assert len(orders) == len(cases)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_all_orders_of_indices_are_equally_frequent(length):
    orders, streams = math.factorial(length), 2400
    counts: dict[tuple[int, ...], int] = {}
    for stream in range(streams):
        order = tuple(permuted(0, "a", (stream, 0, 0), np.arange(length), length).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == orders
    expected = streams / orders
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < chi_square_once_in_a_thousand(orders - 1)


@pytest.mark.parametrize("length", [6, 7, 13, 64])
def test_an_index_goes_everywhere_equally_often_with_any_other_and_in_any_next_epoch(length):
    streams = 1500
    orders = np.stack(
        [permuted(0, "a", (stream, 0, 0), np.arange(length), length) for stream in range(streams)]
    )
    first, second = orders[:, 0], orders[:, 1]
    steps = (np.diff(orders, axis=1) == 1).sum()  # neighbours that stay neighbours
    mean = streams * (length - 1) / length
    assert abs(steps - mean) < 4 * math.sqrt(mean)

    def chi_square(cells: np.ndarray, count: int) -> float:
        expected = len(cells) / count
        return float(((np.bincount(cells, minlength=count) - expected) ** 2 / expected).sum())

    for index in range(length):
        limit = chi_square_once_in_a_thousand(length - 1) * 1.3  # the worst of many indices
        assert chi_square(orders[:, index], length) < limit, index
    gap = (second - first) % length  # 1 to length - 1
    assert chi_square(gap - 1, length - 1) < chi_square_once_in_a_thousand(length - 2)
    next_epoch = (first[1:] - first[:-1]) % length
    assert chi_square(next_epoch, length) < chi_square_once_in_a_thousand(length - 1)


def test_permuted_indices_are_the_same_as_ever():
    """Otherwise every resumed run would get another data order."""
    indices = np.arange(10)
    assert permuted(7, "order/blocks", (3, 2, 1), indices, 10).tolist() == [
        4,
        7,
        8,
        0,
        9,
        3,
        5,
        2,
        1,
        6,
    ]
    assert permuted(0, "a", (0, 0, 0), indices[:3], 39_062_500).tolist() == [
        27016981,
        6598844,
        36273527,
    ]
