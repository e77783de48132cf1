"""The cache of remote shards: what a node keeps and fetches, and which settings are better."""

import math

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.order import working_set_bytes
from ganscale.errors import UserError
from ganscale.plan.sections import Cache, readable_bytes
from ganscale.plan.shard_reads import expected_fetches
from ganscale.plan.suggestions import either, largest
from ganscale.schema import DataConfig

_FEW_FETCHES = 2.0  # of a shard per epoch; no advice up to here


class CachePlan:
    """The caches of all nodes, which have the same size."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, lanes: int, lanes_per_node: np.ndarray
    ) -> None:
        """lanes_per_node: (nodes,), how many of all `lanes` each node reads"""
        self._config = config
        self._shard_samples = np.diff(manifest.first_sample)
        self._shard_bytes = np.array([shard.bytes for shard in manifest.shards])
        self._mean_bytes = float(self._shard_bytes.mean())
        self._lanes = lanes
        self._lanes_per_node = lanes_per_node
        self._cache_bytes = round(config.cache_gib * 2**30)

    def section(self) -> Cache:
        needed, fetches = self._working_set(), self._fetches(self._config.block_samples)
        return Cache(
            cache_bytes=self._cache_bytes,
            working_set_shards=round(needed / self._mean_bytes),
            working_set_bytes=needed,
            fetches_per_shard=self._fetches_per_shard(self._config.block_samples),
            fetched_bytes_per_node=round(float(fetches.max()) * self._mean_bytes),
        )

    def refuse_small_cache(self, ranks: int) -> None:
        """Raises UserError when a node's working set does not fit into its cache."""
        config, needed = self._config, self._working_set()
        if needed <= self._cache_bytes:
            return
        choices = [f"data.cache_gib={math.ceil(needed / 2**30 * 10) / 10:g}"]
        if window := self._largest_window(config.block_samples):
            choices.append(f"data.window_blocks={window}")
        if lanes := ranks * largest(self._lanes // ranks, lambda n: self._fits(lanes=n * ranks)):
            choices.append(f"data.lanes={lanes}")
        raise UserError(
            f"`data.cache_gib` of {config.cache_gib:g} is smaller than the shards that a node "
            f"reads from at the same time ({round(needed / self._mean_bytes)} of "
            f"{readable_bytes(self._mean_bytes)}): choose {either(choices)}"
        )

    def remarks(self) -> list[str]:
        """What to change if shards are fetched many times."""
        block_samples = self._config.block_samples
        fetches = self._fetches_per_shard(block_samples)
        if fetches == 0:
            return ["the cache holds all shards: a node fetches each at most once in a run"]
        if fetches <= _FEW_FETCHES:
            return []
        best = (fetches, block_samples, self._config.window_blocks)
        for block in {int(self._shard_samples.min()), int(np.median(self._shard_samples))} - {0}:
            if window := self._largest_window(block):
                best = min(best, (self._fetches_per_shard(block), block, window))
        all_shards = readable_bytes(float(self._shard_bytes.sum()))
        larger_cache = f"a data.cache_gib that holds all {all_shards} would avoid this"
        if best[0] > 0.8 * fetches:
            return [f"each shard is fetched {fetches:.1f} times per epoch; {larger_cache}"]
        return [
            f"each shard is fetched {fetches:.1f} times per epoch, because blocks of "
            f"{block_samples} samples are much smaller than shards; with data.block_samples="
            f"{best[1]} and data.window_blocks={best[2]} it would be {best[0]:.1f} times (which "
            f"changes the curve); {larger_cache}"
        ]

    def _working_set(
        self,
        block_samples: int | None = None,
        window_blocks: int | None = None,
        lanes: int | None = None,
    ) -> int:
        """Bytes of the largest working set of a node, by default with the run's settings. A
        different number of lanes is dealt evenly to the nodes."""
        nodes = len(self._lanes_per_node)
        return working_set_bytes(
            self._shard_bytes,
            self._shard_samples,
            node_lanes=-(-lanes // nodes) if lanes else int(self._lanes_per_node.max()),
            lanes=lanes or self._lanes,
            block_samples=block_samples or self._config.block_samples,
            window_blocks=window_blocks or self._config.window_blocks,
        )

    def _fits(self, **settings: int) -> bool:
        return self._working_set(**settings) <= self._cache_bytes

    def _largest_window(self, block_samples: int) -> int:
        """The largest `window_blocks` up to the run's that fits, or 0."""
        return largest(
            self._config.window_blocks,
            lambda n: self._fits(block_samples=block_samples, window_blocks=n),
        )

    def _fetches_per_shard(self, block_samples: int) -> float:
        return float(self._fetches(block_samples).sum()) / len(self._shard_samples)

    def _fetches(self, block_samples: int) -> np.ndarray:
        """Shards that each node fetches per epoch, (nodes,)."""
        return expected_fetches(
            self._shard_samples,
            block_samples,
            self._lanes_per_node,
            self._lanes,
            cached_shards=self._cache_bytes / self._mean_bytes,
        )
