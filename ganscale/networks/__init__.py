"""Generators and critics: `generator(latents, labels) -> images in [-1, 1]` and
`critic(images, labels) -> logits`, where labels are None for unconditional networks."""

from ganscale.networks.build import build_critic, build_generator, parameter_count
from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.networks.normalization import ConditionalBatchNorm2d, GlobalBatchNorm
from ganscale.networks.resnet import ResNetCritic, ResNetGenerator

__all__ = [
    "ConditionalBatchNorm2d",
    "DCGANCritic",
    "DCGANGenerator",
    "GlobalBatchNorm",
    "MLPCritic",
    "MLPGenerator",
    "ResNetCritic",
    "ResNetGenerator",
    "build_critic",
    "build_generator",
    "parameter_count",
]
