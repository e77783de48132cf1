"""Networks from a config: one of ours by name, or the user's own by import path.

Every generator is called as `Target(latent_dim=..., sample_shape=..., num_classes=..., **options)`,
every critic as `Target(sample_shape=..., num_classes=..., **options)`, where `num_classes=0` means
unconditional. A network of the user's own gets those of the first three that it accepts.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ganscale.errors import UserError
from ganscale.importing import call, find
from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.networks.resnet import ResNetCritic, ResNetGenerator

GENERATORS = {"mlp": MLPGenerator, "dcgan": DCGANGenerator, "resnet": ResNetGenerator}
CRITICS = {"mlp": MLPCritic, "dcgan": DCGANCritic, "resnet": ResNetCritic}


def build_generator(
    target: str,
    options: Mapping[str, Any],
    *,
    latent_dim: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """The generator that `target` names ("resnet" or "package.module:Name"), freshly initialized.

    Raises UserError for a target that cannot be found or imported, and for options that it refuses.
    """
    constructor = find(target, GENERATORS, "network")
    given = {"latent_dim": latent_dim, "sample_shape": sample_shape, "num_classes": num_classes}
    return _construct(constructor, f"generator {target}", given, options)


def build_critic(
    target: str,
    options: Mapping[str, Any],
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """The critic that `target` names ("resnet" or "package.module:Name"), freshly initialized.

    Raises UserError for a target that cannot be found or imported, and for options that it refuses.
    """
    constructor = find(target, CRITICS, "network")
    given = {"sample_shape": sample_shape, "num_classes": num_classes}
    return _construct(constructor, f"critic {target}", given, options)


def parameter_count(module: nn.Module) -> int:
    """The number of trainable scalars, shared parameters once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _construct(
    constructor: Callable[..., Any],
    network: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> nn.Module:
    module = call(constructor, options, network, given)
    if not isinstance(module, nn.Module):
        raise UserError(f"{network} is a {type(module).__name__}, not a torch.nn.Module")
    return module
