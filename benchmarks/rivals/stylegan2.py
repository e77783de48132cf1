"""StyleGAN2 as it is usually written in plain PyTorch, after Karras et al. 2020 (arXiv:1912.04958).

Equations as in the paper, one after the other: every weight of an image is scaled and normalized,
every activation has its gain, maps are filtered by convolutions with one kernel for each channel.
The networks take the parameters of ours.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.networks.stylegan2.critic import StyleGAN2Critic
from ganscale.networks.stylegan2.generator import StyleGAN2Generator

Draw = Callable[[Tensor, str], Tensor]  # numbers of a tensor's shape, and their name


def plain_network(network: nn.Module) -> nn.Module:
    """The same function, if it is one of StyleGAN2's; any other network as it is."""
    if isinstance(network, StyleGAN2Generator):
        return PlainGenerator(network)
    return PlainCritic(network) if isinstance(network, StyleGAN2Critic) else network


class PlainGenerator(nn.Module):
    """A generator in training. Its `normal` and `uniform` draw for all images."""

    is_fused = False  # a grouped convolution with each image's own weights, or scaled maps

    def __init__(self, network: StyleGAN2Generator) -> None:
        super().__init__()
        self.network = network
        self.normal: Draw = lambda x, _: torch.randn_like(x)
        self.uniform: Draw = lambda x, _: torch.rand_like(x)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesis(self.styles(latents, labels))

    def styles(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        own, count = self.network, self.network.style_count
        style = mapped(own.mapping, latents, labels)[:, None].repeat(1, count, 1)
        if own.style_mixing == 0:
            return style
        other = mapped(own.mapping, self.normal(latents, "mixing latents"), labels)
        share = self.uniform(latents[:, :1], "mixing") / own.style_mixing
        crossover = torch.where(share < 1, 1 + torch.floor(share * (count - 1)), count)
        is_own = torch.arange(count, device=latents.device) < crossover
        return torch.where(is_own[:, :, None], style, other[:, None])

    def synthesis(self, styles: Tensor) -> Tensor:
        own: Any = self.network
        maps, images, layer = own.constant.expand(len(styles), -1, -1, -1), None, 0
        for stage in own.stages:
            inputs = maps
            for conv in stage.convs:
                maps = self._styled(conv, maps, styles[:, layer])
                layer += 1
            if stage.skip is not None:
                skip = F.conv2d(inputs, equalized(stage.skip.weight))
                maps = (upfirdn(skip, up=2) + maps) * math.sqrt(0.5)
            if images is not None:
                images = upfirdn(images, up=2)
            if stage.to_rgb is not None:
                new = self._to_rgb(stage.to_rgb, maps, styles[:, layer])
                images = new if images is None else images + new
        assert images is not None
        return images

    def _styled(self, conv: Any, maps: Tensor, style: Tensor) -> Tensor:
        weight, is_upsampling = conv.weight, conv.blur is not None
        weight = weight.transpose(0, 1) if is_upsampling else weight
        maps = self._modulated(maps, weight, affine(conv.affine, style), is_upsampling)
        noise = self.normal(maps[:, :1], conv._noise_name) * conv.noise_strength
        return activated(maps + noise + conv.bias[:, None, None])

    def _modulated(
        self, maps: Tensor, weight: Tensor, scales: Tensor, is_upsampling: bool
    ) -> Tensor:
        """weight: (outputs, inputs, 3, 3), as a transposed convolution has it if it is one"""
        weights = weight * scales[:, None, :, None, None]  # equation 1
        norms = (weights.square().sum((2, 3, 4)) + 1e-8).rsqrt()
        if not self.is_fused:
            maps = maps * scales[:, :, None, None]
            if is_upsampling:
                maps = F.conv_transpose2d(maps, weight.transpose(0, 1), stride=2)
                maps = upfirdn(maps, padding=1, gain=4)
            else:
                maps = F.conv2d(maps, weight, padding=1)
            return maps * norms[:, :, None, None]
        weights = weights * norms[:, :, None, None, None]  # equation 3
        groups, size = len(maps), maps.shape[2:]
        together = maps.reshape(1, -1, *size)
        if is_upsampling:
            flat = weights.transpose(1, 2).flatten(0, 1)
            together = F.conv_transpose2d(together, flat, stride=2, groups=groups)
            return upfirdn(together.unflatten(1, (groups, -1))[0], padding=1, gain=4)
        together = F.conv2d(together, weights.flatten(0, 1), padding=1, groups=groups)
        return together.unflatten(1, (groups, -1))[0]

    def _to_rgb(self, layer: Any, maps: Tensor, style: Tensor) -> Tensor:
        scales = affine(layer.affine, style) / math.sqrt(layer.weight.shape[1])
        images = F.conv2d(maps * scales[:, :, None, None], layer.weight[:, :, None, None])
        return images + layer.bias[:, None, None]


class PlainCritic(nn.Module):
    def __init__(self, network: StyleGAN2Critic) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        own: Any = self.network
        maps = None
        for stage in own.stages:
            if stage.from_rgb is not None:
                new = activated(convolved(stage.from_rgb, images))
                maps = new if maps is None else maps + new
            assert maps is not None
            residual = activated(convolved(stage.conv1, maps, padding=1))
            residual = upfirdn(residual, padding=2)
            residual = activated(convolved(stage.conv2, residual, stride=2))
            if stage.skip is None:
                maps, images = residual, upfirdn(images, down=2)
            else:
                skip = convolved(stage.skip, upfirdn(maps, down=2))
                maps = (skip + residual) * math.sqrt(0.5)
        assert maps is not None
        if own.from_rgb is not None:
            maps = maps + activated(convolved(own.from_rgb, images))
        if own.deviation is not None:
            maps = with_deviation(maps, own.deviation.batch_group_size)
        features = activated(convolved(own.conv, maps, padding=1)).flatten(1)
        features = affine(own.output, activated(affine(own.hidden, features)))
        if own.mapping is None:
            return features.squeeze(1)
        return (features * mapped(own.mapping, None, labels)).sum(1) / math.sqrt(features.shape[1])


def mapped(mapping: Any, latents: Tensor | None, labels: Tensor | None) -> Tensor:
    parts = [] if latents is None else [normalized(latents)]
    if mapping.embedding is not None:
        parts.append(normalized(mapping.embedding(labels)))
    features = torch.cat(parts, 1)
    for layer in mapping.layers:
        features = activated(affine(layer, features, rate_multiplier=0.01))
    return features


def normalized(vectors: Tensor) -> Tensor:
    return vectors * (vectors.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def affine(layer: Any, vectors: Tensor, rate_multiplier: float = 1.0) -> Tensor:
    weight = equalized(layer.weight) * rate_multiplier
    return F.linear(vectors, weight, layer.bias * rate_multiplier)


def convolved(layer: Any, maps: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(maps, equalized(layer.weight), layer.bias, stride, padding)


def equalized(weight: Tensor) -> Tensor:
    return weight / math.sqrt(weight[0].numel())


def activated(maps: Tensor) -> Tensor:
    return F.leaky_relu(maps, 0.2) * math.sqrt(2)


def with_deviation(maps: Tensor, group_size: int) -> Tensor:
    groups = maps.unflatten(0, (-1, group_size))
    variance = (groups - groups.mean(1, keepdim=True)).square().mean(1)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))
    new = deviation.repeat_interleave(group_size)[:, None, None, None]
    return torch.cat([maps, new.expand(-1, 1, *maps.shape[2:])], 1)


@lru_cache
def kernel_of(channels: int, gain: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype, device=device) / 8
    return torch.outer(line, line).expand(channels, 1, 4, 4) * gain


def upfirdn(maps: Tensor, up: int = 1, down: int = 1, padding: int = 1, gain: float = 1) -> Tensor:
    """Up- or down-sampling with the kernel [1, 3, 3, 1], or a blur."""
    channels = maps.shape[1]
    kernel = kernel_of(channels, up**2 * gain, maps.dtype, maps.device)
    if up > 1:
        return F.conv_transpose2d(maps, kernel, None, up, padding, groups=channels)
    return F.conv2d(maps, kernel, None, down, padding, groups=channels)
