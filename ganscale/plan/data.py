"""The sections of a plan that depend on the data set, and remarks about them."""

from dataclasses import dataclass

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.order import blocks_per_shard
from ganscale.errors import UserError
from ganscale.plan.cache import CachePlan
from ganscale.plan.sections import Cache, Cluster, Epochs, Lanes, Reading, readable_bytes
from ganscale.plan.shard_reads import (
    LaneReaders,
    expected_shards,
    lane_readers,
    mean_image_bytes,
)
from ganscale.plan.suggestions import either, nearest
from ganscale.schema import Config


@dataclass(frozen=True)
class DataPlan:
    epochs: Epochs
    lanes: Lanes
    reading: Reading
    cache: Cache | None
    remarks: tuple[str, ...]


def plan_data(config: Config, cluster: Cluster, manifest: Manifest) -> DataPlan:
    """Raises UserError for more ranks than samples and for a cache that is too small."""
    samples, batch = len(manifest.samples), config.training.global_batch_size
    _refuse_more_ranks_than_samples(config, cluster, samples)
    lane_count = min(config.data.lanes, samples)
    epochs = _epochs(config, samples, lane_count)
    readers = lane_readers(batch, lane_count, cluster.ranks)
    lanes_per_node = readers.by_node(cluster.nodes).sum(axis=1)
    lanes = Lanes(
        lanes=lane_count,
        images_per_lane=batch / lane_count,
        lanes_per_rank=int(readers.by_rank.sum(axis=1).max()),
        lanes_per_node=int(lanes_per_node.max()),
        lanes_shared_by_nodes=_shared(readers.by_node(cluster.nodes)),
    )
    image_bytes, is_exact = mean_image_bytes(manifest.samples["size"])

    remarks = []
    if batch > epochs.epoch_images:
        remarks.append(
            f"a global batch of {batch:,} contains samples more than once: an epoch has "
            f"{epochs.epoch_images:,} images"
        )
    if config.data.lanes > samples:
        remarks.append(
            f"there is one lane per sample, so {samples:,} lanes, not {config.data.lanes:,}"
        )
    if not readers.is_complete:
        remarks.append(
            "lanes per rank are counted over the first steps only, because the pattern takes too "
            "long to repeat"
        )
    if not is_exact:
        remarks.append("bytes read are estimated from a million images, evenly spread")
    cache = None
    if manifest.is_remote:
        cache_plan = CachePlan(config.data, manifest, lane_count, lanes_per_node)
        cache_plan.refuse_small_cache(cluster.ranks)
        cache = cache_plan.section()
        remarks += cache_plan.remarks()
    remarks += _lane_remarks(config, cluster, readers, manifest)
    reading = _reading(config, cluster, manifest, lanes, image_bytes * epochs.epoch_images)
    return DataPlan(epochs, lanes, reading, cache, tuple(remarks))


def _refuse_more_ranks_than_samples(config: Config, cluster: Cluster, samples: int) -> None:
    if cluster.ranks <= samples:
        return
    images = config.training.global_batch_size // config.training.accumulate
    most = max(ranks for ranks in range(1, samples + 1) if images % ranks == 0)
    raise UserError(
        f"{cluster.ranks:,} ranks are more than the {samples:,} samples of {config.data.path}: "
        f"choose at most {most:,} ranks"
    )


def _epochs(config: Config, samples: int, lane_count: int) -> Epochs:
    epoch_images = samples // lane_count * lane_count
    critic_steps = epoch_images / config.training.global_batch_size
    return Epochs(
        samples=samples,
        epoch_images=epoch_images,
        critic_steps_per_epoch=critic_steps,
        generator_steps_per_epoch=critic_steps / config.objective.n_critic,
        epochs=config.training.total_images / epoch_images,
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
    config: Config, cluster: Cluster, readers: LaneReaders, manifest: Manifest
) -> list[str]:
    """Sharing lanes is correct on any cluster, but data is read twice."""
    batch, (_, lanes) = config.training.global_batch_size, readers.by_rank.shape
    by_node = readers.by_node(cluster.nodes)
    shared_by_ranks = _shared(readers.by_rank)
    if not shared_by_ranks:
        return []
    cost = "local disks are read in smaller pieces, but no byte twice"
    if manifest.is_remote:
        all_bytes = sum(shard.bytes for shard in manifest.shards)
        extra = (int(by_node.sum()) / lanes - 1) * all_bytes
        cost = f"up to {readable_bytes(extra)} per epoch are fetched by more than one node"
    choices = nearest(
        lanes,
        lambda n: n % cluster.ranks == 0 and (batch % n == 0 or n % batch == 0),
        at_most=max(batch, 2 * lanes),
    )
    return [
        f"{shared_by_ranks} of {lanes} lanes are shared by ranks, {_shared(by_node)} by nodes: "
        f"{cost}; with data.lanes={either(choices)} none would be (which changes the curve)"
    ]


def _shared(lanes_read: np.ndarray) -> int:
    """How many lanes have several readers; `lanes_read`: (readers, lanes) bool."""
    return int((lanes_read.sum(axis=0) > 1).sum())
