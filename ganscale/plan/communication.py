"""What the ranks exchange in a cycle: collectives and their bytes."""

from typing import NamedTuple

import torch
from torch import nn

from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.objectives.objective import Objective
from ganscale.plan.networks import trainable
from ganscale.plan.sections import Communication
from ganscale.random import drawing
from ganscale.runtime import weights_dtype
from ganscale.schema import Config
from ganscale.training.cycle import makes_fakes_together

# DistributedDataParallel's defaults: it reduces a bucket of gradients as soon as it is full.
_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20
# Means, maxima, bad samples, images for `collapse/`, edges and counts of histograms.
_LOG_ROW_COLLECTIVES = 6


class Exchange(NamedTuple):
    """The collectives of a section of a cycle."""

    reduced_bytes: int
    gathered_bytes: int  # that each rank contributes
    collectives: int


_VOTE = Exchange(8, 0, 1)  # on stopping: one int64 per cycle, between the hosts


def communication(
    config: Config,
    objective: Objective,
    generator: nn.Module,
    critic: nn.Module,
    ranks: int,
    audited_tensors: int,
) -> Communication | None:
    """None for a single rank."""
    if ranks == 1:
        return None
    exchanges = cycle_exchanges(config, objective, generator, critic, ranks)
    fakes, critic_step, generator_step = exchanges
    n_critic = config.objective.n_critic
    images = n_critic * config.training.global_batch_size
    cycle = [fakes, *[critic_step] * n_critic, generator_step, _VOTE]
    reduced, gathered, collectives = map(sum, zip(*cycle, strict=True))
    traffic = round(2 * (ranks - 1) / ranks * reduced) + (ranks - 1) * gathered
    return Communication(
        fakes_bytes=fakes.reduced_bytes,
        fakes_collectives=fakes.collectives,
        critic_step_bytes=critic_step.reduced_bytes,
        critic_step_collectives=critic_step.collectives,
        generator_step_bytes=generator_step.reduced_bytes,
        generator_step_collectives=generator_step.collectives,
        cycle_bytes=reduced,
        cycle_collectives=collectives,
        collectives_per_image=collectives / images,
        rank_traffic_bytes_per_cycle=traffic,
        rank_traffic_bytes_per_image=traffic / images,
        log_row_collectives=_LOG_ROW_COLLECTIVES,
        audit_bytes=2 * 8 * audited_tensors,
    )


def cycle_exchanges(
    config: Config, objective: Objective, generator: nn.Module, critic: nn.Module, ranks: int
) -> tuple[Exchange, Exchange, Exchange]:
    """(fakes of all critic steps of a cycle, one critic step without them, generator step)."""
    micro_batches, n_critic = config.training.accumulate, config.objective.n_critic
    reuses_fakes = config.training.reuse_fakes
    norms = [m for m in generator.modules() if isinstance(m, GlobalBatchNorm)]
    # Mean and square per channel in float64 in each forward, and their gradients in a backward.
    norm_bytes = sum(2 * 8 * norm.running_mean.numel() for norm in norms)
    has_dragan = "dragan" in objective.penalties  # two float64 for the deviation of the batch
    lengths = len(objective.generator_penalties)  # a float64 each for the mean of the batch
    is_global = objective.loss.needs_global_batch  # gathers the logits
    images_per_rank = config.training.global_batch_size // ranks
    logit_bytes = images_per_rank * _logit_bytes(config, critic) if is_global else 0
    forwards = (1 if reuses_fakes else 2) * micro_batches
    if is_global and micro_batches > 1:
        forwards += micro_batches
    fakes_forwards = n_critic
    if makes_fakes_together(config, generator, ranks, torch.device("cpu")):
        fakes_forwards = min(n_critic, 1 + reuses_fakes)
    critic_bytes, critic_buckets = _gradients(config, critic)
    generator_bytes, generator_buckets = _gradients(config, generator)
    return (
        Exchange(n_critic * norm_bytes, 0, fakes_forwards * len(norms)),
        Exchange(
            critic_bytes + 16 * has_dragan,
            2 * logit_bytes,
            critic_buckets + has_dragan + 2 * is_global,
        ),
        Exchange(
            generator_bytes + forwards * norm_bytes + 8 * lengths,
            2 * logit_bytes,
            generator_buckets + forwards * len(norms) + 2 * is_global + (lengths > 0),
        ),
    )


def _logit_bytes(config: Config, critic: nn.Module) -> int:
    """Bytes of one image's logits. Assumes a single logit if the critic does not run on the meta
    device."""
    device = next(critic.parameters()).device
    dtype = weights_dtype(config.training.precision)
    try:
        with torch.no_grad():
            batch = 2 * batch_group_size(critic)
            images = torch.empty(batch, *config.data.sample_shape, dtype=dtype, device=device)
            with drawing(0, ("plan",), torch.arange(batch, device=device)):
                logits = critic(images)
        return logits[0].numel() * logits.itemsize
    except Exception:  # a user's network, or one that needs labels
        return dtype.itemsize


def _gradients(config: Config, network: nn.Module) -> tuple[int, int]:
    """(bytes of the gradients as exchanged, buckets that DDP fills with them, last layer first)."""
    is_compressed = config.training.gradient_compression == "bfloat16"
    exchanged, buckets, filled, limit = 0, 0, 0, _FIRST_BUCKET_BYTES
    for parameter in reversed(trainable(network)):
        exchanged += 2 * parameter.numel() if is_compressed else parameter.nbytes
        filled += parameter.nbytes
        if filled >= limit:
            buckets, filled, limit = buckets + 1, 0, _BUCKET_BYTES
    return exchanged, buckets + (filled > 0)
