"""What the data order costs: few blocks and shards a rank, little memory, whatever the size."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ganscale.data.order import Order, batch_positions
from tests.data.test_order import make_order


def test_ranks_that_own_lanes_read_few_blocks_that_others_do_not_read():
    shards, block, lanes, batch = [100, 300, 250, 150], 10, 8, 16
    order = make_order(shards, lanes=lanes, block_samples=block, window_blocks=3)
    blocks = sum(-(-shard // block) for shard in shards)
    ends = np.cumsum(shards)

    def block_of(sample: int) -> tuple[int, int]:
        shard = int(np.searchsorted(ends, sample, side="right"))
        return shard, (sample - int(ends[shard]) + shards[shard]) // block

    for world_size in (1, 2, 4, 8):
        touched: list[set[tuple[int, int]]] = []
        for rank in range(world_size):
            mine = set()
            for seen in range(0, order.epoch_length, batch):
                positions, _ = batch_positions(seen, batch, lanes, rank, world_size)
                mine |= {block_of(int(sample)) for sample in order.samples(positions)}
            touched.append(mine)
        # Neighbouring lanes share at most the block that the cut between them goes through.
        assert sum(map(len, touched)) <= blocks + world_size - 1
        assert max(map(len, touched)) <= blocks / world_size + 2


def test_a_lane_reads_within_a_window_of_few_blocks_at_a_time():
    block, window_blocks, lanes = 10, 3, 4
    order = make_order([1000], lanes=lanes, block_samples=block, window_blocks=window_blocks)
    window = block * window_blocks
    for lane in range(lanes):
        samples = order.samples(lane + lanes * np.arange(order.lane_length))
        for start in range(0, len(samples), window):
            # A window's samples stand anywhere in it, and it may begin and end inside a block.
            assert (
                len(set((samples[start : start + window] // block).tolist())) <= window_blocks + 1
            )
        inside = np.diff(samples[:window])
        assert (inside != 1).mean() > 0.5  # shuffled, not in the order of the shard


def chunks_touched(samples: np.ndarray, shards: list[int], block: int) -> tuple[int, int]:
    """(samples in all blocks of a shard that `samples` touch, shards that they touch)."""
    ends = np.cumsum(shards)
    touched = np.searchsorted(ends, samples, side="right")
    within = samples - (ends - shards)[touched]
    chunks = np.unique(np.stack([touched, within // block]), axis=1)
    sizes = np.minimum(block, np.array(shards)[chunks[0]] - chunks[1] * block)
    return int(sizes.sum()), len(np.unique(touched))


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_read_hardly_more_than_their_share_of_unequal_shards(world_size):
    block, lanes, batch = 64, 16, 64
    shards = np.random.default_rng(0).integers(500, 3000, 60).tolist()
    order = make_order(shards, lanes=lanes, block_samples=block, window_blocks=8)
    read = 0
    for rank in range(world_size):
        starts = range(0, order.epoch_length, batch)
        mine = [batch_positions(seen, batch, lanes, rank, world_size)[0] for seen in starts]
        positions = np.concatenate(mine)
        samples = order.samples(positions[positions < order.epoch_length])
        touched, _ = chunks_touched(samples, shards, block)
        assert touched <= 1.1 * len(samples)
        read += touched
    assert read <= 1.02 * order.epoch_length + order.lanes


def test_a_window_of_full_blocks_touches_a_shard_a_block():
    block, window_blocks = 64, 8
    shards = [64 * 20 + 1] * 200  # the rest: four mixed blocks among 4,004
    order = make_order(shards, lanes=16, block_samples=block, window_blocks=window_blocks)
    lane = np.arange(0, order.epoch_length, order.lanes)
    touched = [
        chunks_touched(order.samples(lane[start : start + order.window_length]), shards, block)[1]
        for start in range(0, len(lane), order.window_length)
    ]
    assert np.median(touched) <= window_blocks + 1


def test_ten_billion_samples_cost_no_more_than_their_shards():
    position = 7 * 10**9 + 12345
    tracemalloc.start()
    try:
        order = make_order(np.full(100_000, 100_003), lanes=64, block_samples=256, window_blocks=8)
        positions, _ = batch_positions(position, 256, order.lanes, 0, 1)
        samples = order.samples(positions)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # bytes: a few numbers a shard, and two windows a lane
    assert len(np.unique(samples)) == 256
    assert samples.max() > 2**32  # else 32 bits have been lost on the way
    one = make_order(np.full(100_000, 100_003), lanes=64, block_samples=256, window_blocks=8)
    assert one.samples(positions[100:101])[0] == samples[100]


def test_samples_of_ten_billion_come_from_everywhere_about_equally():
    order = make_order(np.full(100_000, 100_003), lanes=64, block_samples=256, window_blocks=8)
    starts = []
    for position in range(0, 2 * order.epoch_length, 10**8 + 1):
        samples = np.sort(order.window(position))
        starts += samples[np.diff(samples, prepend=-2) > 1].tolist()  # of its blocks
    counts = np.bincount(np.array(starts) * 10 // (100_000 * 100_003), minlength=10)
    assert len(starts) > 1700
    # 27.9 once in a thousand, for ten cells.
    assert (((counts - counts.mean()) ** 2) / counts.mean()).sum() < 27.9


def test_many_threads_find_what_one_finds():
    layout = {"shards": [500, 300, 7, 1, 900], "lanes": 8, "block_samples": 16}
    positions = np.random.default_rng(0).integers(0, 6000, (16, 40))
    alone = [make_order(**layout).samples(each) for each in positions]
    order = make_order(**layout)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, expected in zip(pool.map(order.samples, positions), alone, strict=True):
                assert np.array_equal(found, expected)


def test_what_is_kept_for_later_batches_is_two_windows_of_each_lane_read():
    order = make_order([400_000], lanes=16, block_samples=128, window_blocks=8)
    window_bytes = 8 * order.window_length
    lane = 3 + order.lanes * np.arange(3 * order.lane_length)
    order.samples(lane[:1])
    tracemalloc.start()
    try:
        for first in range(0, len(lane), 500):
            order.samples(lane[first : first + 500])
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3 * window_bytes
    assert len(lane) > 70 * order.window_length
