"""Refuses networks at the start with which a run would depend on its cluster."""

import torch
from torch import Tensor, nn
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
        for name, module in layers.named_modules():
            if network == "critic" and isinstance(module, _BATCH_NORMS):
                raise UserError(
                    f"the critic's layer `{name}` is a batch norm, which ties the samples of a "
                    "batch together and differs between ranks: use layer, group or instance norm, "
                    "or none"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise UserError(
                    f"the {network}'s layer `{name}` is a dropout, whose draws differ between "
                    "ranks and after a restart: set its p to 0"
                )
            if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
                raise UserError(
                    f"the {network}'s layer `{name}` has torch.nn.utils.spectral_norm, whose power "
                    "iteration goes on at every forward: use "
                    "torch.nn.utils.parametrizations.spectral_norm"
                )


@torch.no_grad()
def check_forwards(
    generator: nn.Module,
    critic: nn.Module,
    latents: Tensor,
    images: Tensor,
    labels: tuple[Tensor, ...],
) -> None:
    """Raises UserError for random draws inside a network, and for a critic that mixes samples.

    `latents`, `images` and `labels` are a small batch; networks are in training mode.
    """
    for name, network, batch in (("generator", generator, latents), ("critic", critic, images)):
        before = torch.get_rng_state()
        network(batch, *labels)
        if not torch.equal(before, torch.get_rng_state()):
            raise UserError(
                f"the {name} draws random numbers in its forward (dropout, noise, rrelu), which "
                "differ between ranks and after a restart: remove them, or feed noise in as latents"
            )
    in_training = [module for module in critic.modules() if module.training]
    critic.eval()  # power iterations would continue from one forward to the next
    whole, alone = critic(images, *labels), critic(images[:1], *(label[:1] for label in labels))
    for module in in_training:
        module.training = True
    if not torch.allclose(whole[:1], alone, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
        raise UserError(
            "the critic's logit of an image depends on the other images of its batch (minibatch "
            "deviation or discrimination), which differ between ranks: remove that layer"
        )
