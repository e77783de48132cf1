"""Which shards a rank is going to read, in order of need: remote ones are fetched ahead."""

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.order import Order


class WindowTracker:
    """Notices when a lane enters a window of the order: only then are new shards to be named."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._windows_per_epoch = -(-order.lane_length // order.window_length)
        self._newest = np.full(order.lanes, -1, dtype=np.int64)

    def entered(self, positions: np.ndarray) -> np.ndarray:
        """The first position, of those given, in each window that had none before; (n,) int64."""
        order = self._order
        epochs, within = np.divmod(positions, order.epoch_length)
        indices, lanes = np.divmod(within, order.lanes)
        windows = epochs * self._windows_per_epoch + indices // order.window_length
        new = windows > self._newest[lanes]
        if not new.any():
            return positions[:0]
        np.maximum.at(self._newest, lanes, windows)
        _, first = np.unique(np.stack([windows[new], lanes[new]]), axis=1, return_index=True)
        return positions[new][first]


def shards_ahead(manifest: Manifest, order: Order, positions: np.ndarray) -> np.ndarray:
    """The shards that the lanes of `positions` read from there to the end of their next window.

    (n,) int64, each once, the one that is needed first in front. As `positions`, (m,) int64, go on
    side by side, need is counted in samples of a lane.
    """
    shards, needs = [], []
    for position in positions.tolist():
        index = position % order.epoch_length // order.lanes
        within = index % order.window_length
        rest = order.window(position)[within:]
        samples = np.concatenate([rest, order.window(position + len(rest) * order.lanes)])
        shards.append(np.searchsorted(manifest.first_sample, samples, side="right") - 1)
        needs.append(np.arange(len(samples)))
    if not shards:
        return np.empty(0, dtype=np.int64)
    ordered = np.concatenate(shards)[np.argsort(np.concatenate(needs), kind="stable")]
    unique, first = np.unique(ordered, return_index=True)
    return unique[np.argsort(first)]
