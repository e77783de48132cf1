"""A config held against a cluster: the plan, or why there is none and the nearest that there is."""

import sys
from dataclasses import astuple

import numpy as np

from ganscale.data.dataset import open_data
from ganscale.data.loader import parts_and_depth
from ganscale.data.manifest import Manifest, Shard
from ganscale.errors import UserError
from ganscale.networks.build import parameter_count
from ganscale.objectives.objective import build_objective
from ganscale.plan.data import DataPlan, plan_data
from ganscale.plan.networks import (
    Exchange,
    checkpoint_files,
    cycle_exchanges,
    device_bytes,
    planned_networks,
    safetensors_bytes,
)
from ganscale.plan.sections import (
    Batches,
    Cluster,
    Communication,
    HostMemory,
    Networks,
    Plan,
    Run,
)
from ganscale.plan.suggestions import either, nearest
from ganscale.schema import Config
from ganscale.training.invariance_checks import check_batch_divides
from ganscale.training.network_setup import class_count

_LOADER_BYTES = 160 << 20  # Python and torch; measured, without what is mapped from files
_VOTE_BYTES = 8  # one int64 a cycle, on the hosts
# Means, maxima, bad samples, images for `collapse/`, edges and counts of histograms.
_LOG_ROW_COLLECTIVES = 6


def make_plan(config: Config, nodes: int, gpus_per_node: int) -> Plan:
    """What `config` means on `nodes` machines of `gpus_per_node` ranks each.

    Reads the manifest and no shard. Raises UserError, with the nearest plan that is possible, for
    one that is not, and for whatever the manifest, networks and objective are refused for.
    """
    cluster = Cluster(nodes, gpus_per_node, nodes * gpus_per_node)
    _refuse_batch(config, cluster)
    objective = build_objective(config.objective)
    share = config.training.global_batch_size // cluster.ranks
    batches = Batches(
        global_batch_size=config.training.global_batch_size,
        images_per_rank=share,
        images_per_micro_batch=share // config.training.accumulate,
    )
    data_set = open_data(config.data)
    num_classes = class_count(config, data_set)
    data = None
    remarks: tuple[str, ...] = (
        "shards without a manifest: epochs, bytes read, lanes and the cache's need cannot be known "
        "(ganscale shards index makes a manifest)",
    )
    if data_set.manifest is not None:
        data = plan_data(config, cluster, data_set.manifest)
        remarks = data.remarks
    generator, critic = planned_networks(config, num_classes)
    files = checkpoint_files(config, generator, critic)
    saved_at = checkpoint_positions(config)
    checkpoint_bytes = sum(safetensors_bytes(tensors) for tensors in files.values())
    images = config.objective.n_critic * config.training.global_batch_size
    return Plan(
        cluster=cluster,
        batches=batches,
        run=Run(
            total_images=config.training.total_images,
            cycles=-(-config.training.total_images // images),
            checkpoints=len(saved_at),
        ),
        epochs=data and data.epochs,
        lanes=data and data.lanes,
        reading=data and data.reading,
        cache=data and data.cache,
        host_memory=_host_memory(config, share, data_set.manifest, data),
        networks=Networks(
            generator_parameters=parameter_count(generator),
            critic_parameters=parameter_count(critic),
            device_bytes=device_bytes(files, generator, critic),
            checkpoint_bytes=checkpoint_bytes,
            checkpoints_kept_bytes=_kept(config, saved_at) * checkpoint_bytes,
        ),
        communication=_communication(
            config,
            cluster.ranks,
            sum(map(len, files.values())),
            *cycle_exchanges(config, objective, generator, critic, cluster.ranks),
        ),
        remarks=remarks,
    )


def _refuse_batch(config: Config, cluster: Cluster) -> None:
    """`check_batch_divides`, and what else than the batch could be changed."""
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
        if parts := nearest(accumulate, lambda n: batch % (n * cluster.ranks) == 0, at_most=batch):
            choices.append(f"training.accumulate={either(parts)}")
        others = f"; or, with this batch, {'; or '.join(choices)}" if choices else ""
        raise UserError(f"{error}{others}") from None


def checkpoint_positions(config: Config) -> np.ndarray:
    """After how many images each checkpoint of the run is written, (n,) int64, ascending."""
    images = config.objective.n_critic * config.training.global_batch_size
    cycles = -(-config.training.total_images // images)
    # At the first end of a cycle at or after each multiple, and at the end.
    every = max(config.checkpoint.every_images, images)
    multiples = np.arange(1, cycles * images // every + 1) * every
    return np.unique(np.append(-(-multiples // images) * images, cycles * images))


def _kept(config: Config, saved_at: np.ndarray) -> int:
    """How many of the checkpoints are left at the end."""
    keep = config.checkpoint
    older = saved_at[: -keep.keep_last]
    every = keep.keep_every_images
    multiples = int((older % every == 0).sum()) if every else 0
    best = 1 if keep.best else 0  # unless it is among the others
    return min(len(saved_at), keep.keep_last + multiples + best)


def _host_memory(
    config: Config, share: int, manifest: Manifest | None, data: DataPlan | None
) -> HostMemory:
    # Those of the cycle that is trained on, of the next one, of the one after it but the last, and
    # what is being decoded behind them.
    batches = 3 * config.objective.n_critic - 1 + parts_and_depth(config.data, share)[1]
    pixels = config.data.resolution**2 * config.data.channels
    order_bytes = shard_list_bytes = manifest_bytes = None
    processes = 2 if config.data.workers else 1
    if manifest is not None and data is not None:
        shards, lanes = len(manifest.shards), data.lanes
        window = min(
            config.data.block_samples * config.data.window_blocks,
            data.epochs.epoch_images // lanes.lanes,
        )
        # Five columns of the order and one of the manifest; two windows of each lane.
        order_bytes = 8 * (6 * shards + 2 * lanes.lanes_per_rank * window)
        each_bytes = _object_bytes(manifest.shards[0]) if shards else 0
        shard_list_bytes = processes * shards * each_bytes
        manifest_bytes = manifest.samples.nbytes
    return HostMemory(
        batches=batches,
        batches_bytes=batches * share * (pixels + 8 + 8),
        order_bytes=order_bytes,
        shard_list_bytes=shard_list_bytes,
        manifest_bytes=manifest_bytes,
        loader_bytes=(processes - 1) * _LOADER_BYTES,
    )


def _object_bytes(shard: Shard) -> int:
    """Of an entry of the manifest's list, with the reference to it."""
    return 8 + sum(map(sys.getsizeof, (shard, *astuple(shard))))


def _communication(
    config: Config,
    ranks: int,
    tensors: int,
    fakes: Exchange,
    critic: Exchange,
    generator: Exchange,
) -> Communication:
    """tensors: so many are audited"""
    if ranks == 1:
        return Communication(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0.0, 0, 0)
    n_critic = config.objective.n_critic
    images = n_critic * config.training.global_batch_size
    reduced = fakes.reduced_bytes + n_critic * critic.reduced_bytes + generator.reduced_bytes
    reduced += _VOTE_BYTES
    gathered = n_critic * critic.gathered_bytes + generator.gathered_bytes
    collectives = fakes.collectives + n_critic * critic.collectives + generator.collectives + 1
    traffic = round(2 * (ranks - 1) / ranks * reduced) + (ranks - 1) * gathered
    return Communication(
        fakes_bytes=fakes.reduced_bytes,
        fakes_collectives=fakes.collectives,
        critic_step_bytes=critic.reduced_bytes,
        critic_step_collectives=critic.collectives,
        generator_step_bytes=generator.reduced_bytes,
        generator_step_collectives=generator.collectives,
        cycle_bytes=reduced,
        cycle_collectives=collectives,
        collectives_per_image=collectives / images,
        rank_traffic_bytes_per_cycle=traffic,
        rank_traffic_bytes_per_image=traffic / images,
        log_row_collectives=_LOG_ROW_COLLECTIVES,
        audit_bytes=2 * 8 * tensors,
    )
