"""Refuses networks at the start with which a run would depend on its cluster."""

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm

from ganscale.errors import UserError
from ganscale.networks.normalization import ConditionalBatchNorm2d, GlobalBatchNorm
from ganscale.schema import TrainingConfig

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, GlobalBatchNorm, ConditionalBatchNorm2d)


def check_batch_divides(config: TrainingConfig, world_size: int) -> None:
    """Raises UserError for a global batch that ranks and micro-batches do not divide."""
    batch, divisor = config.global_batch_size, world_size * config.accumulate
    if batch % divisor:
        below, above = batch // divisor * divisor, -(-batch // divisor) * divisor
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"`training.global_batch_size` of {batch} cannot be divided evenly among "
            f"{world_size} ranks of {config.accumulate} micro-batches: choose {nearest}"
        )


def check_layers(generator: nn.Module, critic: nn.Module) -> None:
    """Raises UserError for layers that make a run depend on its cluster."""
    for network, layers in (("critic", critic), ("generator", generator)):
        for name, parameter in layers.named_parameters():
            if is_lazy(parameter):
                raise UserError(
                    f"the {network}'s `{name}` has no shape before its first forward (a lazy "
                    "layer): give the layer its sizes"
                )
            if parameter._backward_hooks:
                raise UserError(
                    f"the {network}'s `{name}` has a gradient hook, which would see other "
                    "gradients on several ranks and in micro-batches: remove it"
                )
            if parameter.is_complex():
                raise UserError(f"the {network}'s `{name}` is complex: weights must be real")
        for name, module in layers.named_modules():
            if getattr(module, "max_norm", None) is not None:
                raise UserError(
                    f"the {network}'s layer `{name}` has a max_norm, with which a forward changes "
                    "the weights that its batch needs: set it to None"
                )
            if network == "critic" and isinstance(module, _BATCH_NORMS):
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
