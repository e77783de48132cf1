"""The sections of a plan that depend on the data set, and remarks about them."""

import math
from bisect import bisect
from dataclasses import dataclass
from functools import partial

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.order import blocks_per_shard, working_set_bytes
from ganscale.errors import UserError
from ganscale.plan.sections import Cache, Cluster, Epochs, Lanes, Reading, readable_bytes
from ganscale.plan.shard_reads import expected_fetches, expected_shards, mean_size, ranks_of_lanes
from ganscale.schema import Config, DataConfig
from ganscale.secrets import without_secrets
from ganscale.training.data_flow import batches_per_cycle, data_position
from ganscale.training.invariance_checks import nearest

_FEW_FETCHES = 2.0  # of a shard per epoch; no advice up to here


@dataclass(frozen=True)
class DataPlan:
    """By default of data without a manifest."""

    epochs: Epochs | None = None
    lanes: Lanes | None = None
    reading: Reading | None = None
    cache: Cache | None = None
    remarks: tuple[str, ...] = (
        "without a manifest, epochs, bytes read, lanes and the size of the cache are unknown (make "
        "a manifest with `ganscale shards index`)",
    )


def plan_data(config: Config, cluster: Cluster, manifest: Manifest) -> DataPlan:
    """Raises UserError for more ranks than samples and for a cache that is too small."""
    samples, batch = len(manifest.samples), config.training.global_batch_size
    _refuse_more_ranks_than_samples(config, cluster, samples)
    lane_count = min(config.data.lanes, samples)
    epoch_images = samples // lane_count * lane_count
    by_rank, is_complete = ranks_of_lanes(batch, lane_count, cluster.ranks)
    by_node = np.logical_or.reduce(by_rank.reshape(cluster.nodes, -1, lane_count), axis=1)
    lanes_per_node = by_node.sum(axis=1)
    lanes = Lanes(
        lanes=lane_count,
        images_per_lane=batch / lane_count,
        lanes_per_rank=int(by_rank.sum(axis=1).max()),
        lanes_per_node=int(lanes_per_node.max()),
        lanes_shared_by_nodes=_shared(by_node),
    )
    image_bytes, is_exact = mean_size(manifest.samples["size"])
    remarks = []
    if batch > epoch_images:
        remarks.append(
            f"a global batch of {batch:,} contains samples more than once: an epoch has "
            f"{epoch_images:,} images"
        )
    if config.data.lanes > samples:
        remarks.append(
            f"there is one lane per sample, so {samples:,} lanes, not {config.data.lanes:,}"
        )
    if not is_complete:
        remarks.append(
            "lanes per rank are counted over the first steps only, because the pattern takes too "
            "long to repeat"
        )
    if not is_exact:
        remarks.append("bytes read are estimated from a million images, evenly spread")
    cache = None
    if manifest.is_remote:
        cache_plan = _CachePlan(config.data, manifest, lane_count, lanes_per_node)
        cache_plan.refuse_small_cache(cluster.ranks)
        cache = cache_plan.section()
        remarks += cache_plan.remarks()
    remarks += _lane_remarks(batch, manifest, by_rank, by_node)
    cycles = epoch_images / (batches_per_cycle(config) * batch)
    epochs = Epochs(
        samples=samples,
        epoch_images=epoch_images,
        critic_steps_per_epoch=config.objective.n_critic * cycles,
        generator_steps_per_epoch=cycles,
        epochs=data_position(config, config.training.total_images) / epoch_images,
    )
    reading = _reading(config, cluster, manifest, lanes, image_bytes * epoch_images)
    return DataPlan(epochs, lanes, reading, cache, tuple(remarks))


def _refuse_more_ranks_than_samples(config: Config, cluster: Cluster, samples: int) -> None:
    if cluster.ranks > samples:
        images = config.training.global_batch_size // config.training.accumulate
        most = max(ranks for ranks in range(1, samples + 1) if images % ranks == 0)
        raise UserError(
            f"{cluster.ranks:,} ranks are more than the {samples:,} samples of "
            f"{without_secrets(config.data.path)}: choose at most {most:,} ranks"
        )


def _reading(
    config: Config, cluster: Cluster, manifest: Manifest, lanes: Lanes, epoch_bytes: float
) -> Reading:
    """epoch_bytes: of all images of an epoch"""
    shard_blocks = blocks_per_shard(np.diff(manifest.first_sample), config.data.block_samples)
    blocks = -(-len(manifest.samples) // config.data.block_samples)

    def shards_read(lanes_read: int) -> float:
        # The lanes of a rank are adjacent; their first and last block are shared with others.
        return expected_shards(shard_blocks, blocks, lanes_read * blocks / lanes.lanes + 1)

    return Reading(
        shards=len(manifest.shards),
        shard_bytes=sum(shard.bytes for shard in manifest.shards),
        shards_per_rank=shards_read(lanes.lanes_per_rank),
        shards_per_node=shards_read(lanes.lanes_per_node),
        bytes_per_rank=round(epoch_bytes / cluster.ranks),
        bytes_per_node=round(epoch_bytes / cluster.nodes),
    )


def _lane_remarks(
    batch: int, manifest: Manifest, by_rank: np.ndarray, by_node: np.ndarray
) -> list[str]:
    """Sharing lanes is correct on any cluster, but data is read twice."""
    if not (shared_by_ranks := _shared(by_rank)):
        return []
    ranks, lanes = by_rank.shape
    cost = "local disks are read in smaller pieces, but no byte twice"
    if manifest.is_remote:
        extra = (by_node.sum() / lanes - 1) * sum(shard.bytes for shard in manifest.shards)
        cost = f"up to {readable_bytes(extra)} per epoch are fetched by more than one node"
    choices = nearest(
        lanes,
        lambda n: n % ranks == 0 and (batch % n == 0 or n % batch == 0),
        at_most=max(batch, 2 * lanes),
    )
    return [
        f"{shared_by_ranks} of {lanes} lanes are shared by ranks, {_shared(by_node)} by nodes: "
        f"{cost}; with data.lanes={choices} none would be (which changes the curve)"
    ]


def _shared(lanes_read: np.ndarray) -> int:
    """How many lanes have several readers; `lanes_read`: (readers, lanes) bool."""
    return int((lanes_read.sum(axis=0) > 1).sum())


class _CachePlan:
    """The caches of remote shards on all nodes, which have the same size."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, lanes: int, lanes_per_node: np.ndarray
    ) -> None:
        """lanes_per_node: (nodes,), how many of all `lanes` each node reads"""
        self._config = config
        self._shard_samples = np.diff(manifest.first_sample)
        shard_bytes = np.array([shard.bytes for shard in manifest.shards])
        self._all_bytes, self._mean_bytes = float(shard_bytes.sum()), float(shard_bytes.mean())
        self._lanes = lanes
        self._lanes_per_node = lanes_per_node
        self._cache_bytes = round(config.cache_gib * 2**30)
        # Bytes of the largest working set of a node; arguments replace the run's settings.
        self._working_set = partial(
            working_set_bytes,
            shard_bytes,
            self._shard_samples,
            node_lanes=int(lanes_per_node.max()),
            lanes=lanes,
            block_samples=config.block_samples,
            window_blocks=config.window_blocks,
        )

    def section(self) -> Cache:
        fetches = self._fetches(self._config.block_samples)
        return Cache(
            cache_bytes=self._cache_bytes,
            working_set_shards=round(self._working_set() / self._mean_bytes),
            working_set_bytes=self._working_set(),
            fetches_per_shard=float(fetches.sum()) / len(self._shard_samples),
            fetched_bytes_per_node=round(float(fetches.max()) * self._mean_bytes),
        )

    def refuse_small_cache(self, ranks: int) -> None:
        """Raises UserError when a node's working set does not fit into its cache."""
        config, needed = self._config, self._working_set()
        if needed <= self._cache_bytes:
            return
        node_ranks = ranks // len(self._lanes_per_node)
        lanes = ranks * bisect(
            range(1, self._lanes // ranks + 1),
            self._cache_bytes,
            key=lambda n: self._working_set(lanes=n * ranks, node_lanes=n * node_ranks),
        )
        choices = [f"data.cache_gib={math.ceil(needed / 2**30 * 10) / 10:g}"]
        if window := self._largest_window(config.block_samples):
            choices.append(f"data.window_blocks={window}")
        if lanes:
            choices.append(f"data.lanes={lanes}")
        raise UserError(
            f"`data.cache_gib` of {config.cache_gib:g} is smaller than the shards that a node "
            f"reads from at the same time ({round(needed / self._mean_bytes)} of "
            f"{readable_bytes(self._mean_bytes)}): choose {' or '.join(choices)}"
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
        all_shards = readable_bytes(self._all_bytes)
        larger_cache = f"a data.cache_gib that holds all {all_shards} would avoid this"
        if best[0] > 0.8 * fetches:
            return [f"each shard is fetched {fetches:.1f} times per epoch; {larger_cache}"]
        return [
            f"each shard is fetched {fetches:.1f} times per epoch, because blocks of "
            f"{block_samples} samples are much smaller than shards; with data.block_samples="
            f"{best[1]} and data.window_blocks={best[2]} it would be {best[0]:.1f} times (which "
            f"changes the curve); {larger_cache}"
        ]

    def _largest_window(self, block_samples: int) -> int:
        """The largest `window_blocks` up to the run's that fits, or 0."""
        return bisect(
            range(1, self._config.window_blocks + 1),
            self._cache_bytes,
            key=lambda n: self._working_set(block_samples=block_samples, window_blocks=n),
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
