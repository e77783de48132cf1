"""Plans a run on a cluster, or says why it is not possible and which settings would be."""

import math
import sys
from dataclasses import astuple, replace

import numpy as np

from ganscale.checkpoints.retention import first_of_multiples
from ganscale.data.dataset import open_data
from ganscale.data.loader import chunks_and_depth
from ganscale.data.manifest import Manifest
from ganscale.errors import UserCodeError, UserError
from ganscale.importing import describe
from ganscale.networks.build import parameter_count
from ganscale.objectives.objective import Objective, build_objective
from ganscale.plan.communication import communication
from ganscale.plan.computation import computation
from ganscale.plan.data import DataPlan, plan_data
from ganscale.plan.device_memory import MemoryPlanner
from ganscale.plan.networks import device_bytes, planned_files, planned_networks, safetensors_bytes
from ganscale.plan.sections import (
    Batches,
    Cluster,
    DeviceMemory,
    HostMemory,
    Networks,
    Plan,
    Run,
)
from ganscale.schema import Config
from ganscale.training.augmentation import check_augmentation
from ganscale.training.data_flow import batches_per_cycle, check_data_flow
from ganscale.training.invariance_checks import check_batch_divides, check_groups
from ganscale.training.network_setup import class_count

_LOADER_BYTES = 160 << 20  # measured; Python and torch, without memory-mapped files


def make_plan(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    gpu_gigabytes: int | None = None,
    gpu_tflops: float | None = None,
) -> Plan:
    """What `config` means on `nodes` machines with `gpus_per_node` ranks each.

    gpu_gigabytes: the memory of a GPU, which the run has to fit; None describes several usual ones
    gpu_tflops: that a GPU reaches, for the length of the run; None takes a usual number

    Reads the manifest but no shards. Raises UserError, with the nearest valid settings, for a run
    that is not possible there; and as training does for a bad manifest, network or objective.
    """
    cluster = Cluster(nodes, gpus_per_node, nodes * gpus_per_node)
    check_batch_divides(config.training, cluster.ranks, ranks_per_node=gpus_per_node)
    objective = build_objective(config.objective)
    check_augmentation(config, objective)
    check_data_flow(config, objective)
    data_set = open_data(config.data)
    num_classes = class_count(config, data_set)
    manifest = data_set.manifest
    data = DataPlan() if manifest is None else plan_data(config, cluster, manifest)
    generator, critic = planned_networks(config, num_classes)
    check_groups(config, generator, critic, cluster.ranks, gpus_per_node)
    files = planned_files(config, generator, critic)
    saved_at = checkpoint_positions(config)
    checkpoint_bytes = sum(map(safetensors_bytes, files.values()))
    tensors = sum(map(len, files.values()))
    batch = config.training.global_batch_size
    images_per_rank = batch // cluster.ranks
    memory, remarks = _device_memory(config, objective, num_classes, cluster.ranks, gpu_gigabytes)
    data = replace(data, remarks=(*data.remarks, *remarks))
    return Plan(
        cluster=cluster,
        batches=Batches(batch, images_per_rank, images_per_rank // config.training.accumulate),
        run=Run(
            total_images=config.training.total_images,
            cycles=-(-config.training.total_images // (config.objective.n_critic * batch)),
            checkpoints=len(saved_at),
        ),
        **vars(data),
        host_memory=_host_memory(config, images_per_rank, manifest, data),
        networks=Networks(
            generator_parameters=parameter_count(generator),
            critic_parameters=parameter_count(critic),
            device_bytes=device_bytes(files, generator, critic),
            checkpoint_bytes=checkpoint_bytes,
            checkpoints_kept_bytes=_checkpoints_kept(config, saved_at) * checkpoint_bytes,
        ),
        device_memory=memory,
        computation=computation(
            config, objective, generator, critic, num_classes, cluster.ranks, gpu_tflops
        ),
        communication=communication(config, objective, generator, critic, cluster.ranks, tensors),
    )


def _device_memory(
    config: Config, objective: Objective, num_classes: int, ranks: int, gpu_gigabytes: int | None
) -> tuple[DeviceMemory | None, list[str]]:
    """The section and remarks; no section if the cycle does not run on the meta device."""
    planner = MemoryPlanner(config, objective, num_classes, ranks)
    try:
        section = planner.section(gpu_gigabytes)
    except Exception as error:  # a user's network may raise anything
        if isinstance(error, UserError) and not isinstance(error, UserCodeError):
            raise
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return None, [
            "the peak of device memory is unknown, because the networks do not run on torch's meta "
            f"device: {describe(cause)}"
        ]
    return section, []


def checkpoint_positions(config: Config) -> np.ndarray:
    """The images seen at each checkpoint of the run, (checkpoints,) int64, ascending."""
    images = config.objective.n_critic * config.training.global_batch_size
    cycles = -(-config.training.total_images // images)
    # At the end of the cycle that reaches each multiple, and at the end of the run.
    every = max(config.checkpoint.every_images, images)
    multiples = np.arange(1, cycles * images // every + 1) * every
    return np.unique(np.append(-(-multiples // images) * images, cycles * images))


def _checkpoints_kept(config: Config, saved_at: np.ndarray) -> int:
    """The number of checkpoints at the end of the run; the best, even if it is kept anyway."""
    keep, every = config.checkpoint, config.checkpoint.keep_every_images
    spaced = first_of_multiples(saved_at.tolist(), every) & {*saved_at[: -keep.keep_last].tolist()}
    return min(len(saved_at), keep.keep_last + len(spaced) + bool(keep.best))


def _host_memory(
    config: Config, images_per_rank: int, manifest: Manifest | None, data: DataPlan
) -> HostMemory:
    # All batches of this cycle and the next, all but the last of the one after, and those that are
    # being decoded.
    batches = 3 * batches_per_cycle(config) - 1 + chunks_and_depth(config.data, images_per_rank)[1]
    pixels = math.prod(config.data.sample_shape)
    order_bytes = shard_list_bytes = manifest_bytes = None
    processes = 2 if config.data.workers else 1
    if manifest is not None and data.lanes is not None:
        shards, lanes = manifest.shards, data.lanes
        lane_samples = len(manifest.samples) // lanes.lanes
        window = min(config.data.block_samples * config.data.window_blocks, lane_samples)
        # Five columns of the order, one of the manifest, and two windows of each lane.
        order_bytes = 8 * (6 * len(shards) + 2 * lanes.lanes_per_rank * window)
        # An entry of the list, with the reference to it.
        entry_bytes = 8 + sum(map(sys.getsizeof, (shards[0], *astuple(shards[0]))))
        shard_list_bytes = processes * len(shards) * entry_bytes
        manifest_bytes = manifest.samples.nbytes
    return HostMemory(
        batches=batches,
        batches_bytes=batches * images_per_rank * (pixels + 8 + 8),
        order_bytes=order_bytes,
        shard_list_bytes=shard_list_bytes,
        manifest_bytes=manifest_bytes,
        loader_bytes=(processes - 1) * _LOADER_BYTES,
    )
