"""R3GAN's networks (Huang et al. 2024, arXiv:2501.05441, section 4) in torch's plain functions, on
the weights of ganscale's networks: none of their layers, nor of their derivatives, is called."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.networks.fir_resampling import FIRDownsample, FIRUpsample
from ganscale.networks.r3gan import R3GANCritic, R3GANGenerator, ResidualBlock

# The authors' code convolves the [1, 2, 1] that it is given with [1, 1].
LINE = torch.tensor([1.0, 3.0, 3.0, 1.0]).double()
KERNEL = torch.outer(LINE, LINE) / LINE.sum() ** 2


def images_by_hand(generator: R3GANGenerator, latents: Tensor, labels: Tensor) -> Tensor:
    """Of a generator with classes."""
    assert generator.embedding is not None
    inputs = torch.cat([latents, generator.embedding.weight[labels]], 1)
    scales = torch.einsum("oi,bi->bo", generator.modulation.weight, inputs)
    maps = torch.einsum("bc,chw->bchw", scales, generator.basis)
    for stage in generator.stages:
        maps = _stage_by_hand(stage, maps)
    return maps


def logits_by_hand(critic: R3GANCritic, images: Tensor, labels: Tensor) -> Tensor:
    """Of a critic with classes."""
    maps = images
    for stage in critic.stages:
        maps = _stage_by_hand(stage, maps)
    return head_by_hand(critic, maps, labels)


def head_by_hand(critic: R3GANCritic, maps: Tensor, labels: Tensor) -> Tensor:
    """The depthwise 4x4 convolution, and the projection on the class."""
    features = F.conv2d(maps, critic.basis[:, None], groups=maps.shape[1]).flatten(1)
    assert critic.embedding is not None
    projected = torch.einsum("ec,bc->be", critic.output.weight, features)
    return torch.einsum("be,be->b", projected, critic.embedding.weight[labels])


def _stage_by_hand(stage: nn.Module, maps: Tensor) -> Tensor:
    for layer in stage.children():
        if isinstance(layer, ResidualBlock):
            maps = block_by_hand(layer, maps)
        elif isinstance(layer, nn.Conv2d):
            assert layer.bias is None
            maps = F.conv2d(maps, layer.weight)
        elif isinstance(layer, FIRUpsample):
            maps = upsample(maps)
        else:
            assert isinstance(layer, FIRDownsample)
            maps = downsample(maps)
    return maps


def block_by_hand(block: ResidualBlock, maps: Tensor) -> Tensor:
    """The grouped convolution as one convolution for each group."""
    inner = F.leaky_relu(F.conv2d(maps, block.conv1.weight, block.conv1.bias), 0.2)
    groups = zip(
        inner.split(block.conv2.weight.shape[1], 1),
        block.conv2.weight.split(block.conv2.weight.shape[1], 0),
        strict=True,
    )
    inner = torch.cat([F.conv2d(part, weight, padding=1) for part, weight in groups], 1)
    assert block.conv2.bias is not None
    inner = F.leaky_relu(inner + block.conv2.bias.view(-1, 1, 1), 0.2)
    return maps + F.conv2d(inner, block.conv3.weight)


def upsample(maps: Tensor) -> Tensor:
    weight, groups = (4 * KERNEL).expand(maps.shape[1], 1, 4, 4), maps.shape[1]
    return F.conv_transpose2d(maps, weight, None, 2, 1, groups=groups)


def downsample(maps: Tensor) -> Tensor:
    weight, groups = KERNEL.expand(maps.shape[1], 1, 4, 4), maps.shape[1]
    return F.conv2d(maps, weight, None, 2, 1, groups=groups)
