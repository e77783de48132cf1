"""Plans a run on a cluster, or says why it is not possible and which settings would be."""

import sys
from dataclasses import astuple

import numpy as np

from ganscale.data.dataset import open_data
from ganscale.data.loader import chunks_and_depth
from ganscale.data.manifest import Manifest, Shard
from ganscale.errors import UserError
from ganscale.networks.build import parameter_count
from ganscale.objectives.objective import build_objective
from ganscale.plan.communication import communication
from ganscale.plan.data import DataPlan, plan_data
from ganscale.plan.networks import (
    device_bytes,
    planned_files,
    planned_networks,
    safetensors_bytes,
)
from ganscale.plan.sections import Batches, Cluster, HostMemory, Networks, Plan, Run
from ganscale.plan.suggestions import either, nearest
from ganscale.schema import Config
from ganscale.training.invariance_checks import check_batch_divides
from ganscale.training.network_setup import class_count

_LOADER_BYTES = 160 << 20  # measured; Python and torch, without memory-mapped files
_NO_MANIFEST = (
    "without a manifest, epochs, bytes read, lanes and the size of the cache are unknown (make a "
    "manifest with `ganscale shards index`)"
)


def make_plan(config: Config, nodes: int, gpus_per_node: int) -> Plan:
    """What `config` means on `nodes` machines with `gpus_per_node` ranks each.

    Reads the manifest but no shards. Raises UserError, with the nearest valid settings, for a run
    that is not possible there; and as training does for a bad manifest, network or objective.
    """
    cluster = Cluster(nodes, gpus_per_node, nodes * gpus_per_node)
    _refuse_batch(config, cluster)
    objective = build_objective(config.objective)
    data_set = open_data(config.data)
    num_classes = class_count(config, data_set)
    data, remarks = None, (_NO_MANIFEST,)
    if data_set.manifest is not None:
        data = plan_data(config, cluster, data_set.manifest)
        remarks = data.remarks
    generator, critic = planned_networks(config, num_classes)
    files = planned_files(config, generator, critic)
    saved_at = checkpoint_positions(config)
    checkpoint_bytes = sum(safetensors_bytes(tensors) for tensors in files.values())
    batches = _batches(config, cluster)
    return Plan(
        cluster=cluster,
        batches=batches,
        run=Run(
            total_images=config.training.total_images,
            cycles=-(-config.training.total_images // _cycle_images(config)),
            checkpoints=len(saved_at),
        ),
        epochs=data and data.epochs,
        lanes=data and data.lanes,
        reading=data and data.reading,
        cache=data and data.cache,
        host_memory=_host_memory(config, batches.images_per_rank, data_set.manifest, data),
        networks=Networks(
            generator_parameters=parameter_count(generator),
            critic_parameters=parameter_count(critic),
            device_bytes=device_bytes(files, generator, critic),
            checkpoint_bytes=checkpoint_bytes,
            checkpoints_kept_bytes=_checkpoints_kept(config, saved_at) * checkpoint_bytes,
        ),
        communication=communication(
            config,
            objective,
            generator,
            critic,
            cluster.ranks,
            audited_tensors=sum(map(len, files.values())),
        ),
        remarks=remarks,
    )


def _batches(config: Config, cluster: Cluster) -> Batches:
    images_per_rank = config.training.global_batch_size // cluster.ranks
    return Batches(
        global_batch_size=config.training.global_batch_size,
        images_per_rank=images_per_rank,
        images_per_micro_batch=images_per_rank // config.training.accumulate,
    )


def _cycle_images(config: Config) -> int:
    return config.objective.n_critic * config.training.global_batch_size


def _refuse_batch(config: Config, cluster: Cluster) -> None:
    """`check_batch_divides`, but the message also says what to change instead of the batch."""
    try:
        check_batch_divides(config.training, cluster.ranks)
    except UserError as error:
        batch, accumulate = config.training.global_batch_size, config.training.accumulate

        def divides(nodes: int) -> bool:
            return batch % (nodes * cluster.gpus_per_node * accumulate) == 0

        choices = []
        if nodes := nearest(cluster.nodes, divides, at_most=batch):
            choices.append(f"{either(nodes)} nodes of {cluster.gpus_per_node}")
        elif ranks := nearest(
            cluster.ranks, lambda n: batch % (n * accumulate) == 0, at_most=batch
        ):
            choices.append(f"{either(ranks)} ranks")
        if micro_batches := nearest(
            accumulate, lambda n: batch % (n * cluster.ranks) == 0, at_most=batch
        ):
            choices.append(f"training.accumulate={either(micro_batches)}")
        alternatives = f"; or, with this batch, {'; or '.join(choices)}" if choices else ""
        raise UserError(f"{error}{alternatives}") from None


def checkpoint_positions(config: Config) -> np.ndarray:
    """The images seen at each checkpoint of the run, (checkpoints,) int64, ascending."""
    images = _cycle_images(config)
    cycles = -(-config.training.total_images // images)
    # At the end of the cycle that reaches each multiple, and at the end of the run.
    every = max(config.checkpoint.every_images, images)
    multiples = np.arange(1, cycles * images // every + 1) * every
    return np.unique(np.append(-(-multiples // images) * images, cycles * images))


def _checkpoints_kept(config: Config, saved_at: np.ndarray) -> int:
    """The number of checkpoints at the end of the run."""
    keep = config.checkpoint
    older = saved_at[: -keep.keep_last]
    every = keep.keep_every_images
    multiples = int((older % every == 0).sum()) if every else 0
    best = 1 if keep.best else 0  # counted even if it is among the others
    return min(len(saved_at), keep.keep_last + multiples + best)


def _host_memory(
    config: Config, images_per_rank: int, manifest: Manifest | None, data: DataPlan | None
) -> HostMemory:
    # All batches of this cycle and the next, all but the last of the one after, and those that are
    # being decoded.
    batches = 3 * config.objective.n_critic - 1 + chunks_and_depth(config.data, images_per_rank)[1]
    pixels = config.data.resolution**2 * config.data.channels
    order_bytes = shard_list_bytes = manifest_bytes = None
    processes = 2 if config.data.workers else 1
    if manifest is not None and data is not None:
        shards, lanes = len(manifest.shards), data.lanes
        window = min(
            config.data.block_samples * config.data.window_blocks,
            data.epochs.epoch_images // lanes.lanes,
        )
        # Five columns of the order, one of the manifest, and two windows of each lane.
        order_bytes = 8 * (6 * shards + 2 * lanes.lanes_per_rank * window)
        entry_bytes = _object_bytes(manifest.shards[0]) if shards else 0
        shard_list_bytes = processes * shards * entry_bytes
        manifest_bytes = manifest.samples.nbytes
    return HostMemory(
        batches=batches,
        batches_bytes=batches * images_per_rank * (pixels + 8 + 8),
        order_bytes=order_bytes,
        shard_list_bytes=shard_list_bytes,
        manifest_bytes=manifest_bytes,
        loader_bytes=(processes - 1) * _LOADER_BYTES,
    )


def _object_bytes(shard: Shard) -> int:
    """Bytes of an entry of the manifest's list, with the reference to it."""
    return 8 + sum(map(sys.getsizeof, (shard, *astuple(shard))))
