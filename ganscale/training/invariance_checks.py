"""Refuses networks at the start with which a run would depend on its cluster."""

from collections.abc import Callable

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm

from ganscale.errors import UserError
from ganscale.evaluation.sample_grids import INTERPOLATION_STEPS
from ganscale.networks.batch_groups import batch_group_size, check_whole_groups
from ganscale.networks.normalization import BATCH_NORMS
from ganscale.schema import Config, TrainingConfig


def check_batch_divides(
    config: TrainingConfig,
    world_size: int,
    group_size: int = 1,
    ranks_per_node: int | None = None,
) -> None:
    """Raises UserError, with the nearest numbers that would do, for a global batch that cannot be
    divided among ranks and micro-batches.

    group_size: consecutive images that have to stay together
    ranks_per_node: to offer other numbers of nodes in place of ranks
    """
    batch, accumulate = config.global_batch_size, config.accumulate
    divisor = world_size * accumulate * group_size
    if batch % divisor == 0:
        return

    def choices(value: int, unit: int) -> str:
        return nearest(value, lambda n: batch % (n * unit * group_size) == 0, at_most=batch)

    below, above = batch // divisor * divisor, -(-batch // divisor) * divisor
    others, per_node = [], ranks_per_node or 1
    nodes = choices(world_size // per_node, per_node * accumulate)
    if nodes and ranks_per_node:
        others.append(f"{nodes} nodes of {ranks_per_node}")
    elif ranks := choices(world_size, accumulate):
        others.append(f"{ranks} rank{'s' * (ranks != '1')}")
    if micro_batches := choices(accumulate, world_size):
        others.append(f"training.accumulate={micro_batches}")
    raise UserError(
        f"`training.global_batch_size` of {batch} cannot be divided evenly among {world_size} "
        f"rank{'s' * (world_size > 1)} of {accumulate} micro-batch{'es' * (accumulate > 1)}"
        + (f" of whole groups of {group_size} images" if group_size > 1 else "")
        + (f": choose {below} or {above}" if below else f": choose {above}")
        + (f"; or, with this batch, {'; or '.join(others)}" if others else "")
    )


def nearest(value: int, is_valid: Callable[[int], bool], at_most: int) -> str:
    """`a or b`, the nearest valid numbers below and above `value`, from 1 to `at_most`."""
    below = next((n for n in range(min(value - 1, at_most), 0, -1) if is_valid(n)), None)
    above = next((n for n in range(value + 1, at_most + 1) if is_valid(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def check_groups(
    config: Config,
    generator: nn.Module,
    critic: nn.Module,
    world_size: int,
    ranks_per_node: int | None = None,
) -> None:
    """Raises UserError for a number of images that is not a whole number of the groups that the
    networks look at: a micro-batch on one rank, and what the generator makes for samples and
    evaluations."""
    group_size = batch_group_size(generator, critic)
    check_batch_divides(config.training, world_size, group_size, ranks_per_node)
    made = {
        "samples.count": config.samples.count,
        f"{INTERPOLATION_STEPS} times samples.interpolations": INTERPOLATION_STEPS
        * config.samples.interpolations,
    }
    if config.evaluation.every_images:
        made["evaluation.samples"] = config.evaluation.samples
        made["evaluation.batch_size"] = config.evaluation.batch_size
    for name, images in made.items():
        check_whole_groups(generator, name, images)


def check_layers(generator: nn.Module, critic: nn.Module) -> None:
    """Raises UserError for layers that make a run depend on its cluster."""
    for network, layers in (("critic", critic), ("generator", generator)):
        for name, parameter in layers.named_parameters():
            if is_lazy(parameter):
                raise UserError(
                    f"the {network}'s `{name}` has no shape before its first forward (a lazy "
                    "layer): give the layer its sizes"
                )
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise UserError(
                    f"the {network}'s `{name}` has a gradient hook, which would see other "
                    "gradients on several ranks and in micro-batches: remove it"
                )
            if parameter.is_complex():
                raise UserError(f"the {network}'s `{name}` is complex: weights must be real")
        for name, module in layers.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise UserError(
                    f"the {network}'s layer `{name}` has extra state (get_extra_state), which "
                    "checkpoints do not hold: keep it in buffers"
                )
            if getattr(module, "max_norm", None) is not None:
                raise UserError(
                    f"the {network}'s layer `{name}` has a max_norm, with which a forward changes "
                    "the weights that its batch needs: set it to None"
                )
            if network == "critic" and isinstance(module, BATCH_NORMS):
                raise UserError(
                    f"the critic's layer `{name}` is a batch norm, which ties the samples of a "
                    "batch together and differs between ranks: use layer, group or instance norm, "
                    "or none"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise UserError(
                    f"the {network}'s layer `{name}` is a dropout, whose draws differ between "
                    "ranks and after a restart: use ganscale.networks.random_layers.Dropout"
                )
            if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
                raise UserError(
                    f"the {network}'s layer `{name}` has torch.nn.utils.spectral_norm, whose power "
                    "iteration goes on at every forward: use "
                    "torch.nn.utils.parametrizations.spectral_norm"
                )
