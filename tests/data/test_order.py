"""The data order is a function of seed, fingerprint and position, whatever reads it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.data.order import Order, batch_positions
from ganscale.errors import UserError
from ganscale.randomness import derived_seed, permutation, permuted


def make_order(shards, seed=0, fingerprint="digits", lanes=4, block_samples=4, window_blocks=2):
    return Order(
        shards,
        seed=seed,
        fingerprint=fingerprint,
        lanes=lanes,
        block_samples=block_samples,
        window_blocks=window_blocks,
    )


layouts = st.fixed_dictionaries(
    {
        "shards": st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
        "seed": st.integers(0, 2**64 - 1),
        "lanes": st.integers(1, 70),
        "block_samples": st.integers(1, 50),
        "window_blocks": st.integers(1, 9),
    }
)
# (world size, global batch)
clusters = st.tuples(st.integers(1, 8), st.integers(1, 12)).map(lambda c: (c[0], c[0] * c[1]))


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    return order.samples(epoch * order.epoch_length + np.arange(order.epoch_length))


def naive_epoch(shards, seed, fingerprint, lanes, block_samples, window_blocks, epoch) -> list[int]:
    """The four steps of the module's docstring, on lists of all samples."""
    blocks, rest, first = [], [], 0
    for size in shards:
        samples = list(range(first, first + size))
        while len(samples) >= block_samples:
            blocks.append(samples[:block_samples])
            del samples[:block_samples]
        rest += samples
        first += size
    while rest:
        blocks.append(rest[:block_samples])
        del rest[:block_samples]
    seed = derived_seed(seed, f"order/{fingerprint}")
    order = permuted(seed, "order/blocks", (epoch, 0, 0), np.arange(len(blocks)), len(blocks))
    laid_out = [sample for block in order for sample in blocks[block]]
    lanes = min(lanes, len(laid_out))
    length = len(laid_out) // lanes
    sequences = []
    for lane in range(lanes):
        sequence = laid_out[lane * length : (lane + 1) * length]
        shuffled = []
        for window, start in enumerate(range(0, length, block_samples * window_blocks)):
            part = sequence[start : start + block_samples * window_blocks]
            where = permutation(seed, "order/window", (epoch, lane, window), len(part))
            shuffled += [part[place] for place in where]
        sequences.append(shuffled)
    return [sample for column in zip(*sequences, strict=True) for sample in column]


@settings(deadline=None, max_examples=100)
@given(layout=layouts, epoch=st.integers(0, 5))
def test_the_order_is_the_described_one(layout, epoch):
    expected = naive_epoch(**layout, fingerprint="digits", epoch=epoch)
    assert epoch_of(make_order(**layout), epoch).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(layout=layouts, epoch=st.integers(0, 5), data=st.data())
def test_a_window_holds_its_lanes_samples_in_the_order_in_which_they_come(layout, epoch, data):
    order = make_order(**layout)
    lane = data.draw(st.integers(0, order.lanes - 1))
    start = epoch * order.epoch_length + lane
    positions = start + order.lanes * np.arange(order.lane_length)
    samples = order.samples(positions)
    for first in range(0, order.lane_length, order.window_length):
        inside = samples[first : first + order.window_length]
        anywhere = data.draw(st.integers(first, first + len(inside) - 1))
        assert np.array_equal(order.window(int(positions[anywhere])), inside)


@pytest.mark.parametrize("shards", [[], [0], [0, 0, 0]])
def test_a_data_set_without_samples_is_refused(shards):
    with pytest.raises(UserError, match="no samples"):
        make_order(shards)


@settings(deadline=None, max_examples=60)
@given(layout=layouts, epoch=st.integers(0, 5))
def test_an_epoch_repeats_no_sample_and_misses_fewer_than_one_per_lane(layout, epoch):
    order, total = make_order(**layout), sum(layout["shards"])
    samples = epoch_of(order, epoch)
    assert len(np.unique(samples)) == len(samples) == order.epoch_length
    assert samples.min() >= 0
    assert samples.max() < total
    assert 0 <= total - order.epoch_length < order.lanes


@settings(deadline=None, max_examples=60)
@given(
    layout=layouts,
    cluster=clusters,
    seen=st.integers(0, 10**6),
)
def test_a_global_batch_is_the_same_slot_by_slot_for_every_world_size(layout, cluster, seen):
    order, (world_size, batch) = make_order(**layout), cluster
    whole, whole_slots = batch_positions(seen, batch, order.lanes, 0, 1)
    assert sorted(whole) == list(range(seen, seen + batch))  # each position once
    assert whole_slots.tolist() == list(range(seen, seen + batch))
    parts = [batch_positions(seen, batch, order.lanes, r, world_size) for r in range(world_size)]
    positions, slots = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    assert np.array_equal(positions, whole)
    assert np.array_equal(slots, whole_slots)
    samples = [order.samples(positions) for positions, _ in parts]
    assert np.array_equal(np.concatenate(samples), order.samples(whole))


@settings(deadline=None, max_examples=50)
@given(layout=layouts, start=st.integers(0, 10**7), count=st.integers(1, 200), data=st.data())
def test_starting_anywhere_continues_as_if_never_stopped(layout, start, count, data):
    stop_at = data.draw(st.integers(0, count))
    order = make_order(**layout)
    positions = start + np.arange(count)
    whole = order.samples(positions)
    assert np.array_equal(order.samples(positions[:stop_at]), whole[:stop_at])
    order = make_order(**layout)
    assert np.array_equal(order.samples(positions[stop_at:]), whole[stop_at:])
    assert np.array_equal(order.samples(positions[::-1]), whole[::-1])


def test_any_batch_size_and_world_size_walk_the_same_stream():
    """Three epochs in batches whose size changes all the time: every sample comes as in one go."""
    order = make_order([10, 7, 3, 30])
    stream = order.samples(np.arange(3 * order.epoch_length))
    seen, found = 0, {}
    draws = np.random.default_rng(0)
    while seen < len(stream):
        world_size = int(draws.integers(1, 5))
        batch = world_size * int(draws.integers(1, 6))
        for rank in range(world_size):
            positions, _ = batch_positions(seen, batch, order.lanes, rank, world_size)
            found.update(zip(positions.tolist(), order.samples(positions).tolist(), strict=True))
        seen += batch
    assert [found[position] for position in range(len(stream))] == stream.tolist()


@pytest.mark.parametrize("shards", [[1], [3], [1] * 5, [2, 1]])
def test_fewer_samples_than_lanes_are_all_seen_once_per_epoch(shards):
    order = make_order(shards, lanes=64)
    assert order.epoch_length == sum(shards)
    for epoch in range(3):
        assert sorted(epoch_of(order, epoch)) == list(range(sum(shards)))


def test_shards_of_one_sample_are_shuffled_like_any_other():
    order = make_order([1] * 64, lanes=8)
    first, second = epoch_of(order, 0).tolist(), epoch_of(order, 1).tolist()
    assert sorted(first) == sorted(second) == list(range(64))
    assert first not in (second, list(range(64)))


def test_seed_fingerprint_and_epoch_each_give_another_order():
    orders = [
        make_order([40, 40]),
        make_order([40, 40], seed=1),
        make_order([40, 40], seed=2**32),
        make_order([40, 40], fingerprint="faces"),
    ]
    found = [epoch_of(order, epoch).tolist() for order in orders for epoch in range(3)]
    assert len({tuple(samples) for samples in found}) == len(found)


def test_what_one_epoch_leaves_out_another_brings():
    order = make_order([31], lanes=8, block_samples=2)
    left_out = [set(range(31)) - {*epoch_of(order, epoch).tolist()} for epoch in range(20)]
    assert {len(samples) for samples in left_out} == {7}
    assert set.intersection(*left_out) == set()
    assert len({frozenset(samples) for samples in left_out}) > 10


def test_every_sample_is_seen_about_equally_often():
    order = make_order([13, 8, 2], lanes=5, block_samples=3)
    seen = Counter(order.samples(np.arange(200 * order.epoch_length)).tolist())
    assert len(seen) == 23
    # 20 of 23 samples an epoch: 174 of 200, give or take 5. A block as short as the last one is
    # left out more often, whole, than a part of another.
    assert min(seen.values()) > 150
    assert max(seen.values()) < 195


@pytest.mark.parametrize("position", [10**12, 2**53 + 1, 2**62])
def test_a_huge_position_is_as_good_as_any(position):
    order = make_order([10, 7, 3, 30])
    samples = order.samples(position + np.arange(2 * order.epoch_length))
    start = -position % order.epoch_length
    epoch = samples[start : start + order.epoch_length]
    assert len(np.unique(epoch)) == order.epoch_length


def test_the_order_stays_what_it_has_always_been():
    """Another order would be another run for everybody who resumes."""
    order = make_order([10, 7, 3], seed=5, fingerprint="abc")
    first = [4, 11, 19, 8, 10, 16, 1, 15, 5, 12, 0, 3, 6, 17, 18, 14, 7, 13, 2, 9]
    second = [4, 5, 10, 13, 18, 1, 12, 14, 17, 7, 2, 9, 19, 0, 11, 8, 16, 6, 3, 15]
    assert order.samples(np.arange(40)).tolist() == first + second
    positions, slots = batch_positions(6, 8, 4, 1, 2)
    assert (positions.tolist(), slots.tolist()) == ([6, 10, 7, 11], [10, 11, 12, 13])


@pytest.mark.parametrize(
    ("lanes", "batch"), [(64, 16), (64, 64), (16, 64), (8, 24), (24, 8), (1, 4), (12, 4)]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_owns_its_lanes_when_lanes_and_batch_divide_each_other(lanes, batch, world_size):
    owners: dict[int, set[tuple[int, ...]]] = {}
    for seen in range(0, 50 * batch, batch):
        ranks: dict[int, list[int]] = {}
        for rank in range(world_size):
            positions, _ = batch_positions(seen, batch, lanes, rank, world_size)
            for lane in np.unique(positions % lanes).tolist():
                ranks.setdefault(lane, []).append(rank)
        for lane, sharing in ranks.items():
            owners.setdefault(lane, set()).add(tuple(sharing))
    assert sorted(owners) == list(range(lanes))
    assert all(len(each_time) == 1 for each_time in owners.values())
    if lanes % world_size == 0:
        assert all(len(sharing) == 1 for (sharing,) in owners.values())
