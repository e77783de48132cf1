"""The sections of a plan that depend on the data set, and what is to be said about them."""

from dataclasses import dataclass

import numpy as np

from ganscale.data.manifest import Manifest
from ganscale.data.order import blocks_per_shard
from ganscale.errors import UserError
from ganscale.plan.cache import Stage
from ganscale.plan.sections import Cache, Cluster, Epochs, Lanes, Reading, readable_bytes
from ganscale.plan.shard_reads import (
    Shares,
    expected_shards,
    lane_shares,
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
    samples = len(manifest.samples)
    _refuse_more_ranks_than_samples(config, cluster, samples)
    batch = config.training.global_batch_size
    lane_count = min(config.data.lanes, samples)
    epoch_images = samples // lane_count * lane_count
    epochs = Epochs(
        samples=samples,
        epoch_images=epoch_images,
        critic_steps_per_epoch=epoch_images / batch,
        generator_steps_per_epoch=epoch_images / batch / config.objective.n_critic,
        epochs=config.training.total_images / epoch_images,
    )
    remarks = []
    if batch > epoch_images:
        remarks.append(
            f"a global batch of {batch:,} holds samples more than once: an epoch is "
            f"{epoch_images:,} images"
        )
    if config.data.lanes > samples:
        remarks.append(f"there are {samples:,} lanes, one a sample, not {config.data.lanes:,}")

    shares = lane_shares(batch, lane_count, cluster.ranks)
    if not shares.is_complete:
        remarks.append("which lanes a rank reads repeats so late that only its start was counted")
    by_node = shares.by_node(cluster.nodes)
    lanes = Lanes(
        lanes=lane_count,
        images_per_lane=batch / lane_count,
        lanes_per_rank=int(shares.by_rank.sum(axis=1).max()),
        lanes_per_node=int(by_node.sum(axis=1).max()),
        lanes_shared_by_nodes=int((by_node.sum(axis=0) > 1).sum()),
    )

    shard_samples = np.diff(manifest.first_sample)
    shard_bytes = sum(shard.bytes for shard in manifest.shards)
    of_shards = blocks_per_shard(shard_samples, config.data.block_samples)
    blocks = -(-samples // config.data.block_samples)
    image_bytes, all_sizes = mean_image_bytes(manifest.samples["size"])
    if not all_sizes:
        remarks.append("the size of images is the mean of a million of them, evenly spread")
    of_rank, of_node = image_bytes * epoch_images / np.array([cluster.ranks, cluster.nodes])

    def touched(lanes_read: int) -> float:
        # The lanes of a rank lie side by side; their first and last block are cut through.
        return expected_shards(of_shards, blocks, lanes_read * blocks / lane_count + 1)

    read = Reading(
        shards=len(shard_samples),
        shard_bytes=shard_bytes,
        shards_per_rank=touched(lanes.lanes_per_rank),
        shards_per_node=touched(lanes.lanes_per_node),
        bytes_per_rank=round(of_rank),
        bytes_per_node=round(of_node),
    )
    cache = None
    if manifest.is_remote:
        stage = Stage(config.data, manifest, lane_count, by_node.sum(axis=1))
        stage.refuse_small_cache(cluster.ranks)
        cache = stage.section()
        remarks += stage.remarks()
    remarks += _remarks_on_lanes(config, cluster, shares, shard_bytes, manifest.is_remote)
    return DataPlan(epochs, lanes, read, cache, tuple(remarks))


def _refuse_more_ranks_than_samples(config: Config, cluster: Cluster, samples: int) -> None:
    if cluster.ranks <= samples:
        return
    parts = config.training.global_batch_size // config.training.accumulate
    most = max(ranks for ranks in range(1, samples + 1) if parts % ranks == 0)
    raise UserError(
        f"{cluster.ranks:,} ranks are more than the {samples:,} samples of {config.data.path}: "
        f"choose at most {most:,} ranks"
    )


def _remarks_on_lanes(
    config: Config, cluster: Cluster, shares: Shares, shard_bytes: int, is_remote: bool
) -> list[str]:
    """Sharing lanes is right on any cluster, and costs reading twice."""
    batch, lanes = config.training.global_batch_size, shares.by_rank.shape[1]
    readers = {"ranks": shares.by_rank, "nodes": shares.by_node(cluster.nodes)}
    shared = {who: int((of.sum(axis=0) > 1).sum()) for who, of in readers.items()}
    if not shared["ranks"]:
        return []
    extra = (int(readers["nodes"].sum()) / lanes - 1) * shard_bytes
    cost = "no byte is read twice from local disks, but in smaller pieces"
    if is_remote:
        cost = f"up to {readable_bytes(extra)} an epoch are fetched by more than one node"
    choices = nearest(
        lanes,
        lambda n: n % cluster.ranks == 0 and (batch % n == 0 or n % batch == 0),
        at_most=max(batch, 2 * lanes),
    )
    return [
        f"{shared['ranks']} of {lanes} lanes are shared by ranks, {shared['nodes']} by nodes: "
        f"{cost}; with data.lanes={either(choices)} none would be (another curve)"
    ]
