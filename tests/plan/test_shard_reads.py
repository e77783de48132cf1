"""What is expected of reading is what the order, run through, reads."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, batch_positions, blocks_per_shard, working_set_bytes
from ganscale.plan.planning import make_plan
from ganscale.plan.shard_reads import (
    expected_fetches,
    expected_shards,
    ranks_of_lanes,
)
from tests.plan.conftest import config_of_mlps


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    block=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_blocks_of_shards_are_those_that_the_order_cuts(sizes, block, seed):
    sizes[-1] += -sum(sizes) % block  # no shorter last block: every window is one block
    order = Order(sizes, seed=seed, fingerprint="", lanes=1, block_samples=block, window_blocks=1)
    ends = np.cumsum(sizes)
    counted = np.zeros(len(sizes), dtype=int)
    for first in range(0, sum(sizes), block):
        samples = order.samples(first + np.arange(block))
        counted[np.unique(np.searchsorted(ends, samples, side="right"))] += 1
    assert blocks_per_shard(np.array(sizes), block).tolist() == counted.tolist()


@pytest.mark.parametrize(
    ("batch", "lanes", "ranks"),
    [(16, 64, 4), (64, 16, 4), (24, 64, 4), (24, 10, 3), (8, 3, 8), (30, 7, 6)],
)
def test_lanes_of_ranks_are_those_that_their_batches_come_from(batch, lanes, ranks):
    counted = np.zeros((ranks, lanes), dtype=bool)
    for step in range(2 * lanes):
        for rank in range(ranks):
            positions, _ = batch_positions(step * batch, batch, lanes, rank, ranks)
            counted[rank, positions % lanes] = True
    by_rank, is_complete = ranks_of_lanes(batch, lanes, ranks)
    assert is_complete
    assert np.array_equal(by_rank, counted)


SHARDS = [300, 280, 300, 100, 290, 300, 250, 300] * 5


def shards_read(order: Order, positions: np.ndarray) -> np.ndarray:
    ends = np.cumsum(SHARDS)
    return np.searchsorted(ends, order.samples(positions), side="right")


@pytest.mark.parametrize("block", [10, 37, 100])
def test_expected_shards_are_the_mean_of_what_ranks_touch(block):
    lanes, ranks, epochs = 40, 20, 4
    order = Order(SHARDS, seed=0, fingerprint="", lanes=lanes, block_samples=block, window_blocks=2)
    touched = []
    for rank in range(ranks):
        mine = np.arange(rank * lanes // ranks, (rank + 1) * lanes // ranks)
        for epoch in range(epochs):
            indices = np.arange(order.lane_length)[:, None] * lanes
            positions = (epoch * order.epoch_length + indices + mine).T.ravel()
            touched.append(len(np.unique(shards_read(order, positions))))
    blocks = -(-sum(SHARDS) // block)
    expected = expected_shards(
        blocks_per_shard(np.array(SHARDS), block), blocks, blocks / ranks + 1
    )
    assert expected == pytest.approx(np.mean(touched), rel=0.05)


@pytest.mark.parametrize("cached", [16, 35])
@pytest.mark.parametrize(("block", "tolerance"), [(10, 0.1), (50, 0.3)])
def test_expected_fetches_are_those_of_a_cache_that_drops_the_least_recently_used(
    block, cached, tolerance
):
    """Nodes of 4 lanes read epoch after epoch with `cached` of 40 shards at hand."""
    lanes, nodes, epochs = 8, 2, 4
    order = Order(SHARDS, seed=1, fingerprint="", lanes=lanes, block_samples=block, window_blocks=1)
    counted = []
    for node in range(nodes):
        cache: OrderedDict[int, None] = OrderedDict()
        mine = np.arange(node * 4, node * 4 + 4)
        for epoch in range(epochs + 1):
            start = epoch * order.epoch_length
            positions = start + (np.arange(order.lane_length)[:, None] * lanes + mine).ravel()
            fetched = 0
            for shard in shards_read(order, positions).tolist():
                fetched += shard not in cache
                cache[shard] = None
                cache.move_to_end(shard)
                if len(cache) > cached:
                    cache.popitem(last=False)
            if epoch:  # the first fills the cache
                counted.append(fetched)
    expected = expected_fetches(np.array(SHARDS), block, np.array([4, 4]), lanes, cached)
    assert expected[0] == pytest.approx(np.mean(counted), rel=tolerance)


@pytest.mark.parametrize(("block", "window"), [(10, 2), (50, 1), (300, 1)])
def test_the_working_set_holds_the_window_that_is_read_and_the_next_one(block, window):
    lanes, mine = 8, range(4)
    order = Order(
        SHARDS, seed=1, fingerprint="", lanes=lanes, block_samples=block, window_blocks=window
    )
    found = working_set_bytes(
        np.ones(len(SHARDS)),
        np.array(SHARDS),
        node_lanes=len(mine),
        lanes=lanes,
        block_samples=block,
        window_blocks=window,
    )
    held = []
    length = order.window_length
    for first in range(0, 3 * order.lane_length - 2 * length, length):
        indices = first + np.arange(2 * length)
        positions = np.concatenate([indices * lanes + lane for lane in mine])
        held.append(len(np.unique(shards_read(order, positions))))
    assert found / 2 < max(held) <= found


def test_bytes_and_images_are_those_that_the_ranks_read(digits):
    config = config_of_mlps(digits, "data.lanes=8", "training.global_batch_size=24")
    plan = make_plan(config, nodes=2, gpus_per_node=2)
    manifest = Manifest.load(digits)
    order = Order(
        np.diff(manifest.first_sample),
        seed=config.seed,
        fingerprint=manifest.fingerprint,
        lanes=8,
        block_samples=config.data.block_samples,
        window_blocks=config.data.window_blocks,
    )
    assert plan.epochs is not None
    assert plan.epochs.epoch_images == order.epoch_length
    steps = 2 * order.epoch_length // 24
    assert plan.epochs.critic_steps_per_epoch == pytest.approx(steps / 2, abs=1)
    sizes = manifest.samples["size"]
    for rank in range(4):
        read = 0
        for step in range(steps):
            positions, _ = batch_positions(step * 24, 24, 8, rank, 4)
            read += int(sizes[order.samples(positions)].sum())
        assert plan.reading is not None
        assert plan.reading.bytes_per_rank == pytest.approx(read / 2, rel=0.02)
    assert plan.reading is not None
    assert plan.reading.bytes_per_node == pytest.approx(2 * plan.reading.bytes_per_rank, abs=1)
