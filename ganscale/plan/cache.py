"""Remote shards: what a node keeps and fetches of them, under a run's settings and under others."""

import math

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.shard_lookahead import working_set_bytes
from ganscale.errors import UserError
from ganscale.plan.sections import Cache, readable_bytes
from ganscale.plan.shard_reads import expected_fetches
from ganscale.plan.suggestions import either, largest
from ganscale.schema import DataConfig

_FEW_FETCHES = 2.0  # of a shard in an epoch: nothing to advise


class Stage:
    """The caches of all nodes, of one size each."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, lanes: int, lanes_of_nodes: np.ndarray
    ) -> None:
        """lanes_of_nodes: (nodes,), how many of all `lanes` each node reads"""
        self._config = config
        self._shard_samples = np.diff(manifest.first_sample)
        self._shard_bytes = np.array([shard.bytes for shard in manifest.shards])
        self._lanes = lanes
        self._lanes_of_nodes = lanes_of_nodes
        self._cache_bytes = round(config.cache_gib * 2**30)

    def section(self) -> Cache:
        need, fetched = self._need(), self._fetches(self._config.block_samples)
        mean_bytes = float(self._shard_bytes.mean())
        return Cache(
            cache_bytes=self._cache_bytes,
            working_set_shards=round(need / mean_bytes),
            working_set_bytes=need,
            fetches_per_shard=float(fetched.sum()) / len(self._shard_samples),
            fetched_bytes_per_node=round(float(fetched.max()) * mean_bytes),
        )

    def refuse_small_cache(self, ranks: int) -> None:
        """Raises UserError when a node's working set does not fit into its cache."""
        config, need = self._config, self._need()
        if need <= self._cache_bytes:
            return
        choices = [f"data.cache_gib={math.ceil(need / 2**30 * 10) / 10:g}"]
        if window := self._largest_window(config.block_samples):
            choices.append(f"data.window_blocks={window}")
        if lanes := ranks * largest(self._lanes // ranks, lambda n: self._fits(lanes=n * ranks)):
            choices.append(f"data.lanes={lanes}")
        mean_bytes = float(self._shard_bytes.mean())
        raise UserError(
            f"`data.cache_gib` of {config.cache_gib:g} is smaller than the shards that a node "
            f"reads from at one time, {round(need / mean_bytes)} of {readable_bytes(mean_bytes)}: "
            f"choose {either(choices)}"
        )

    def remarks(self) -> list[str]:
        """What to change where shards are fetched again and again."""
        shards, block_samples = len(self._shard_samples), self._config.block_samples
        usual = float(self._fetches(block_samples).sum()) / shards
        if usual == 0:
            return ["the cache holds all shards: a node fetches each at most once in a run"]
        if usual <= _FEW_FETCHES:
            return []
        best = (usual, block_samples, self._config.window_blocks)
        for block in {int(self._shard_samples.min()), int(np.median(self._shard_samples))} - {0}:
            if window := self._largest_window(block):
                best = min(best, (float(self._fetches(block).sum()) / shards, block, window))
        of_all = readable_bytes(float(self._shard_bytes.sum()))
        bigger = f"a data.cache_gib that holds all {of_all} would end that"
        if best[0] > 0.8 * usual:
            return [f"each shard is fetched {usual:.1f} times an epoch; {bigger}"]
        return [
            f"each shard is fetched {usual:.1f} times an epoch, because blocks of {block_samples} "
            f"samples are much smaller than shards: with data.block_samples={best[1]} and "
            f"data.window_blocks={best[2]} it would be {best[0]:.1f} times (another curve); "
            f"{bigger}"
        ]

    def _need(
        self,
        block_samples: int | None = None,
        window_blocks: int | None = None,
        lanes: int | None = None,
    ) -> int:
        """Bytes of the largest working set; other lanes than the run's are dealt evenly."""
        nodes = len(self._lanes_of_nodes)
        return working_set_bytes(
            self._shard_bytes,
            self._shard_samples,
            node_lanes=-(-lanes // nodes) if lanes else int(self._lanes_of_nodes.max()),
            lanes=lanes or self._lanes,
            block_samples=block_samples or self._config.block_samples,
            window_blocks=window_blocks or self._config.window_blocks,
        )

    def _fits(
        self,
        block_samples: int | None = None,
        window_blocks: int | None = None,
        lanes: int | None = None,
    ) -> bool:
        return self._need(block_samples, window_blocks, lanes) <= self._cache_bytes

    def _largest_window(self, block_samples: int) -> int:
        """Of at most the run's blocks; 0 if none fits."""
        return largest(self._config.window_blocks, lambda n: self._fits(block_samples, n))

    def _fetches(self, block_samples: int) -> np.ndarray:
        cached_shards = self._cache_bytes / float(self._shard_bytes.mean())
        return expected_fetches(
            self._shard_samples, block_samples, self._lanes_of_nodes, self._lanes, cached_shards
        )
