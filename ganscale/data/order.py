"""The order of the data: which sample comes at which position of the run, and which shards are
needed next.

A pure function of (seed, fingerprint, position): ranks, workers and restarts do not change it. An
epoch is made in four steps:

1. every shard is cut into blocks of consecutive samples; what is left at the shards' ends, laid end
   to end, is cut into further blocks; all blocks are permuted;
2. the permuted blocks, laid end to end, are cut into `lanes` sequences of equal length;
3. each lane is shuffled within windows of a few blocks;
4. the lanes are interleaved: position p of the epoch belongs to lane p modulo lanes.

So a lane reads few blocks at a time, nearly in sequence, and a rank that owns lanes reads its own
part of the data. Because lanes have equal length, each epoch leaves out fewer samples than there
are lanes (others every time); epochs follow each other as one endless stream.

The permutation is computed block by block, without a list of blocks: memory and start-up grow with
the number of shards only, and every position is found equally fast.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from threading import Lock

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.randomness import derived_seed, permutation, permuted


def batch_positions(
    position: int, global_batch_size: int, lanes: int, rank: int, world_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A rank's share of the global batch that starts at `position`: (positions, slots).

    Both (global_batch_size / world_size,) int64. Slots count from `position` and are sorted by
    lane, so, if the batch is a multiple of `lanes`, a rank has the same lanes in every batch.
    """
    positions = position + np.arange(global_batch_size)
    positions = positions[np.argsort(positions % lanes, kind="stable")]
    share = global_batch_size // world_size
    first, stop = rank * share, (rank + 1) * share
    return positions[first:stop], position + np.arange(first, stop)


class Order:
    """The order of one data set under one seed; may be used by many threads.

    Attributes: `lanes`, at most the number of samples; in samples, `lane_length` and `epoch_length`
    (of all lanes), and `window_length`, shuffled together (fewer in a lane's last window of an
    epoch). Raises UserError without samples.
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
        if total == 0:
            raise UserError(f"the data set has no samples: all its {len(sizes)} shards are empty")
        self._seed = derived_seed(seed, f"order/{fingerprint}")
        self._blocks = _Blocks(sizes, block_samples)
        self.lanes = min(lanes, total)
        self.lane_length = total // self.lanes
        self.epoch_length = self.lanes * self.lane_length
        self.window_length = min(block_samples * window_blocks, self.lane_length)
        self._last_block_position = lru_cache(maxsize=4)(self._find_last_block)
        # For each lane, the two windows used last: batches decoded at the same time straddle two.
        self._recent: defaultdict[int, OrderedDict[tuple[int, int], np.ndarray]]
        self._recent = defaultdict(OrderedDict)
        self._recent_lock = Lock()

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples (indices into the manifest) at `positions`, both (n,) int64; fastest if those
        of a lane are next to each other, as from `batch_positions`."""
        epochs, lanes, windows, offsets = self.locate(positions)
        samples = np.empty(len(positions), dtype=np.int64)
        is_cut = (np.diff(epochs) != 0) | (np.diff(lanes) != 0) | (np.diff(windows) != 0)
        cuts = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(positions)]
        for first, stop in pairwise(cuts) if len(positions) else ():
            window = int(epochs[first]), int(lanes[first]), int(windows[first])
            samples[first:stop] = self._recent_window(*window)[offsets[first:stop]]
        return samples

    def window(self, position: int) -> np.ndarray:
        """All samples of the window that `position` is in, in the order of its lane, (n,) int64. It
        is not cached: looking ahead must not evict what `samples` caches."""
        epoch, lane, window, _ = (int(column[0]) for column in self.locate(np.array([position])))
        return self._shuffled_window(epoch, lane, window)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """(epoch, lane, window of the lane, offset in the window) of each position, (n,) int64."""
        epochs, within = np.divmod(positions, self.epoch_length)
        indices, lanes = np.divmod(within, self.lanes)
        return epochs, lanes, *np.divmod(indices, self.window_length)

    def _recent_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        with self._recent_lock:
            recent = self._recent[lane]
            if (epoch, window) in recent:
                recent.move_to_end((epoch, window))
                return recent[epoch, window]
        # Outside the lock: two threads that compute the same window get the same result.
        samples = self._shuffled_window(epoch, lane, window)
        with self._recent_lock:
            recent[epoch, window] = samples
            while len(recent) > 2:
                recent.popitem(last=False)
        return samples

    def _shuffled_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """The window's samples, in the order in which they are read, (n,) int64."""
        first = window * self.window_length
        width = min(self.window_length, self.lane_length - first)
        shuffled = permutation(self._seed, "order/window", (epoch, lane, window), width)
        return self._permuted_samples(epoch, lane * self.lane_length + first, width)[shuffled]

    def _permuted_samples(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Samples `first` to `first + count` of the permuted blocks laid end to end, (count,)."""
        indices = first + np.arange(count)
        size, short = self._blocks.size, self._blocks.last_size
        # As if the shorter block were filled up: then a division gives the block.
        indices[indices >= self._last_block_position(epoch) * size + short] += size - short
        positions, offsets = np.divmod(indices, size)
        blocks = self._permuted_blocks(epoch, np.arange(positions[0], positions[-1] + 1))
        return self._blocks.samples(blocks[positions - positions[0]], offsets)

    def _find_last_block(self, epoch: int) -> int:
        """The position, among the epoch's permuted blocks, of the last one, which may be short."""
        last = np.array([self._blocks.count - 1])
        return int(self._permuted_blocks(epoch, last, inverse=True)[0])

    def _permuted_blocks(
        self, epoch: int, indices: np.ndarray, inverse: bool = False
    ) -> np.ndarray:
        stream, count = (epoch, 0, 0), self._blocks.count
        return permuted(self._seed, "order/blocks", stream, indices, count, inverse=inverse)


def blocks_per_shard(shard_samples: np.ndarray, block_samples: int) -> np.ndarray:
    """In how many blocks of the order each shard has samples, (shards,) int64: its full ones, and
    those mixed ones that have samples of its end."""
    full, rest = np.divmod(shard_samples, block_samples)
    stop = np.cumsum(rest)
    pieces = (stop - 1) // block_samples - (stop - rest) // block_samples + 1
    return full + np.where(rest > 0, pieces, 0)


class _Blocks:
    """The samples of a data set, cut into `count` blocks of `size` (the last one: of `last_size`).

    First come the full blocks of each shard, from its start. Then the mixed ones: what is left at
    the shards' ends, shard after shard, cut without regard to the shards.
    """

    def __init__(self, shard_sizes: np.ndarray, size: int) -> None:
        total = int(shard_sizes.sum())
        self.size = size
        self.count = -(-total // size)
        self.last_size = total - (self.count - 1) * size
        full = shard_sizes // size
        self._shard_start = np.cumsum(shard_sizes) - shard_sizes
        self._full_end = np.cumsum(full)
        self._rest_end = np.cumsum(shard_sizes - full * size)
        # What to add to a sample's index among those of full blocks, or among the rest.
        self._from_full = self._shard_start - (self._full_end - full) * size
        self._from_rest = self._shard_start + shard_sizes - self._rest_end

    def samples(self, blocks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The sample at each `offset` of each block, all (n,) int64."""
        indices = blocks * self.size + offsets
        mixed = blocks >= self._full_end[-1]
        indices[mixed] -= self._full_end[-1] * self.size
        shards = np.where(
            mixed,
            np.searchsorted(self._rest_end, indices, side="right"),
            np.searchsorted(self._full_end, blocks, side="right"),
        )
        shards = np.minimum(shards, len(self._full_end) - 1)
        return indices + np.where(mixed, self._from_rest[shards], self._from_full[shards])


class WindowTracker:
    """Notices when a lane enters a window: only then are there new shards to fetch."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._windows_per_epoch = -(-order.lane_length // order.window_length)
        self._newest = np.full(order.lanes, -1, dtype=np.int64)

    def entered(self, positions: np.ndarray) -> np.ndarray:
        """The first of `positions` in each window that had none before, (n,) int64."""
        epochs, lanes, windows, _ = self._order.locate(positions)
        windows += epochs * self._windows_per_epoch
        new = windows > self._newest[lanes]
        if not new.any():
            return positions[:0]
        np.maximum.at(self._newest, lanes, windows)
        _, first = np.unique(np.stack([windows[new], lanes[new]]), axis=1, return_index=True)
        return positions[new][first]


def shards_ahead(manifest: Manifest, order: Order, positions: np.ndarray) -> np.ndarray:
    """The shards that the lanes of `positions`, (m,) int64, read from there to the end of their
    next window: (n,) int64, each once, in order of need, counted in samples of a lane."""
    shards, needs = [], []
    for position, offset in zip(positions.tolist(), order.locate(positions)[3], strict=True):
        rest = order.window(position)[offset:]
        samples = np.concatenate([rest, order.window(position + len(rest) * order.lanes)])
        shards.append(manifest.shards_of(samples))
        needs.append(np.arange(len(samples)))
    ordered = np.concatenate(shards)[np.argsort(np.concatenate(needs), kind="stable")]
    unique, first = np.unique(ordered, return_index=True)
    return unique[np.argsort(first)]


def working_set_bytes(
    shard_bytes: np.ndarray,
    shard_samples: np.ndarray,
    *,
    node_lanes: int,
    lanes: int,
    block_samples: int,
    window_blocks: int,
) -> int:
    """The bytes of the shards that the ranks of a node read, or have fetched ahead, at one time:
    two windows of each of its `node_lanes` of all `lanes`, in shards of mean size. Windows begin
    and end inside blocks, so they touch one block more than they are long."""
    shards, samples = len(shard_samples), int(shard_samples.sum())
    blocks = -(-samples // block_samples)
    pieces = int(blocks_per_shard(shard_samples, block_samples).sum())
    lane_blocks = 2 * (min(window_blocks, blocks / lanes) + 1)  # windows of two epochs are apart
    per_lane = min(shards, math.ceil(lane_blocks * pieces / blocks))
    return round(min(shards, node_lanes * per_lane) * float(shard_bytes.mean()))
