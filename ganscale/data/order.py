"""The order of the data: which sample stands at which position of the run.

A pure function of (seed, fingerprint, position): the ranks, the loader's workers and restarts do
not enter it. An epoch is made in four steps:

1. every shard is cut into blocks of consecutive samples, and the blocks are permuted;
2. the permuted blocks, laid end to end, are cut into `lanes` sequences of equal length;
3. each lane is shuffled within windows of a few blocks;
4. the lanes are interleaved: position p of the epoch belongs to lane p modulo lanes.

So a lane reads few blocks at a time, nearly in sequence, and a rank that owns lanes reads its own
part of the data. Lanes of equal length leave less than one sample a lane out of each epoch (other
ones every time); epochs follow each other as one endless stream.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ganscale.randomness import derived_seed, permutation


def batch_positions(
    images_seen: int, global_batch_size: int, lanes: int, rank: int, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A rank's part of the global batch that starts at `images_seen`: (positions, slots).

    Both (global_batch_size / world_size,) int64. The slots of the batch are sorted by lane, and a
    rank takes a contiguous run of them: the same lanes batch after batch. `slots` counts from
    `images_seen` and is what noise and other draws go with.
    """
    positions = images_seen + np.arange(global_batch_size)
    positions = positions[np.argsort(positions % lanes, kind="stable")]
    share = global_batch_size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    return positions[mine], images_seen + np.arange(mine.start, mine.stop)


class Order:
    """The order of one data set under one seed.

    Attributes: `lanes`, at most the number of samples; `epoch_length`, in samples, a multiple of
    `lanes`.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | np.ndarray,
        *,
        seed: int,
        fingerprint: str,
        lanes: int,
        block_samples: int,
        window_blocks: int,
    ) -> None:
        sizes = np.asarray(samples_per_shard, dtype=np.int64)
        total = int(sizes.sum())
        self._seed = derived_seed(seed, f"order/{fingerprint}")
        self._window = block_samples * window_blocks
        self._block_start, self._block_size = _blocks(sizes, block_samples)
        self.lanes = min(lanes, total)
        self.lane_length = total // self.lanes
        self.epoch_length = self.lanes * self.lane_length
        self._epoch = lru_cache(maxsize=3)(self._permuted_blocks)
        self._window_order = lru_cache(maxsize=4 * self.lanes)(self._shuffled_window)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples (indices into the manifest) at `positions`, both (n,) int64."""
        epochs, within = np.divmod(positions, self.epoch_length)
        lane_index, lanes = np.divmod(within, self.lanes)
        found = [
            self._sample(int(epoch), int(lane), int(index))
            for epoch, lane, index in zip(epochs, lanes, lane_index, strict=True)
        ]
        return np.array(found, dtype=np.int64)

    def _sample(self, epoch: int, lane: int, index: int) -> int:
        window, offset = divmod(index, self._window)
        index = window * self._window + int(self._window_order(epoch, lane, window)[offset])
        start, ends = self._epoch(epoch)
        place = lane * self.lane_length + index
        block = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[block - 1]) if block else 0
        return int(start[block]) + place - before

    def _permuted_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(first sample of each block, end of each block in the epoch), in the epoch's order."""
        order = permutation(self._seed, "order/blocks", (epoch, 0, 0), len(self._block_start))
        return self._block_start[order], np.cumsum(self._block_size[order])

    def _shuffled_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        width = min(self._window, self.lane_length - window * self._window)
        return permutation(self._seed, "order/window", (epoch, lane, window), width)


def _blocks(shard_sizes: np.ndarray, block_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(first sample, size) of each block; a shard's last block may be shorter."""
    blocks_per_shard = -(-shard_sizes // block_samples)
    first_block = np.cumsum(blocks_per_shard) - blocks_per_shard
    within = np.arange(blocks_per_shard.sum()) - np.repeat(first_block, blocks_per_shard)
    shard_start = np.repeat(np.cumsum(shard_sizes) - shard_sizes, blocks_per_shard)
    start = shard_start + within * block_samples
    left = np.repeat(shard_sizes, blocks_per_shard) - within * block_samples
    return start, np.minimum(left, block_samples)
