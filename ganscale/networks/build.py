"""Networks from a config: one of ours by name, or the user's own by import path.

A generator is called as `Target(latent_dim=..., sample_shape=..., num_classes=..., **options)`, a
critic as `Target(sample_shape=..., num_classes=..., **options)`; `num_classes=0` means
unconditional. Of these three, a user's own network gets those that its constructor accepts.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ganscale.errors import UserError
from ganscale.importing import call, find
from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.networks.r3gan import R3GANCritic, R3GANGenerator
from ganscale.networks.random_layers import name_random_layers
from ganscale.networks.resnet import ResNetCritic, ResNetGenerator
from ganscale.networks.stylegan2.critic import StyleGAN2Critic
from ganscale.networks.stylegan2.generator import StyleGAN2Generator

NETWORKS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "generator": {
        "mlp": MLPGenerator,
        "dcgan": DCGANGenerator,
        "resnet": ResNetGenerator,
        "r3gan": R3GANGenerator,
        "stylegan2": StyleGAN2Generator,
    },
    "critic": {
        "mlp": MLPCritic,
        "dcgan": DCGANCritic,
        "resnet": ResNetCritic,
        "r3gan": R3GANCritic,
        "stylegan2": StyleGAN2Critic,
    },
}


def find_network(role: str, target: str) -> Callable[..., nn.Module]:
    """The constructor of the generator or critic (`role`) named `target`. Raises UserError if it
    cannot be found or imported."""
    return find(target, NETWORKS[role], "network", nn.Module)


def build_network(role: str, target: str, options: Mapping[str, Any], **facts: Any) -> nn.Module:
    """The generator or critic (`role`) named `target`, "resnet" or "package.module:Name", freshly
    initialized.

    facts: sample_shape, num_classes, and latent_dim for a generator

    Raises UserError if the target cannot be found or imported, or refuses an option.
    """
    constructor = find_network(role, target)
    network = call(constructor, options, f"{role} {target}", facts)
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise UserError(f"{role} {target} is a {kind}, not a torch.nn.Module")
    name_random_layers(network)
    return network


def parameter_count(module: nn.Module) -> int:
    """The number of trainable scalars; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
