"""Which shards a rank will read, in order of need: remote ones are fetched ahead."""

import math

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, blocks_per_shard


class WindowTracker:
    """Notices when a lane enters a window of the order: only then are there new shards to fetch."""

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
    """The shards that the lanes of `positions` read from there to the end of their next window.

    (n,) int64, each once, in order of need. `positions`, (m,) int64, advance side by side, so need
    is counted in samples of a lane.
    """
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
    """The bytes of the shards that the ranks of a node read, or have fetched ahead, at one time.

    Those of two windows of each of its `node_lanes` of all `lanes`, in shards of mean size. Windows
    begin and end inside blocks, so they touch one block more than they are long.
    """
    shards, samples = len(shard_samples), int(shard_samples.sum())
    blocks = -(-samples // block_samples)
    pieces = int(blocks_per_shard(shard_samples, block_samples).sum())
    lane_blocks = 2 * (min(window_blocks, blocks / lanes) + 1)  # windows of two epochs are apart
    per_lane = min(shards, math.ceil(lane_blocks * pieces / blocks))
    return round(min(shards, node_lanes * per_lane) * float(shard_bytes.mean()))
