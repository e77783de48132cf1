"""R3GAN: "The GAN is dead; long live the GAN! A Modern Baseline GAN" (Huang et al. 2024,
https://arxiv.org/abs/2501.05441, section 4, Config E), at 16 to 1024 pixels.

A generator and a critic that mirrors it: stages of residual blocks from 4x4 pixels up, with grouped
convolutions and without normalization. Images are not squashed to [-1, 1]. What is 4x4 here has
another height or width for images that are not square (`shapes.ImageShape`).

With classes, the generator takes an embedding of the class beside the latent, and the critic's
logit is the product of its features and another such embedding: the projection of Miyato & Koyama
2018 (https://arxiv.org/abs/1802.05637), without its unconditional term.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.fir_resampling import FIRDownsample, FIRUpsample
from ganscale.networks.shapes import image_shape, require_positive, require_stages, stage_widths
from ganscale.runtime import autocast, compute_dtype

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

NEGATIVE_SLOPE = 0.2


class R3GANGenerator(nn.Module):
    """A learned 4x4 map, each channel times a linear function of the latent, then the stages.

    `widths` is the number of channels of every stage, or a list of them from 4x4 pixels up. A stage
    has `blocks` residual blocks; their 3x3 convolution sees `expansion` times as many channels, in
    groups of `group_width`. The `bfloat16_stages` of the highest resolutions compute in bfloat16 in
    every forward, unless the weights are in float64. A class embedding has `embedding_dim`
    dimensions.
    """

    can_concatenate_batches = True

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        widths: int | list[int] = 768,
        blocks: int = 2,
        group_width: int = 16,
        expansion: int = 2,
        bfloat16_stages: int = 0,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        require_positive("r3gan", embedding_dim=embedding_dim)
        shape = image_shape(sample_shape, "r3gan")
        widths = stage_widths("r3gan", widths, shape)
        layout = _Layout(widths, blocks, group_width, expansion, bfloat16_stages)
        self.embedding = _embedding(num_classes, embedding_dim)
        inputs = latent_dim + (embedding_dim if num_classes > 0 else 0)
        self.modulation = _initialize(nn.Linear(inputs, widths[0], bias=False))
        self.basis = nn.Parameter(torch.randn(widths[0], *shape.grid))
        self.stages = nn.ModuleList()
        for stage, width in enumerate(widths):
            before = _upsampling(widths[stage - 1], width) if stage > 0 else []
            after = [_conv1x1(width, shape.channels)] if stage == len(widths) - 1 else []
            self.stages.append(layout.stage(stage, before, after))

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        if self.embedding is not None:
            if labels is None:
                raise ValueError("a conditional R3GANGenerator needs the labels of its latents")
            latents = torch.cat([latents, self.embedding(labels)], 1)
        maps = self.modulation(latents)[:, :, None, None] * self.basis
        for stage in self.stages:
            maps = stage(maps)
        return maps.to(compute_dtype(self.basis))


class R3GANCritic(nn.Module):
    """The stages from the image's resolution down to 4x4 pixels, a depthwise 4x4 convolution, and a
    linear function of its outputs.

    Options as in the generator; `widths` are from 4x4 pixels up here, too.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        widths: int | list[int] = 768,
        blocks: int = 2,
        group_width: int = 16,
        expansion: int = 2,
        bfloat16_stages: int = 0,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        require_positive("r3gan", embedding_dim=embedding_dim)
        shape = image_shape(sample_shape, "r3gan")
        widths = stage_widths("r3gan", widths, shape)
        layout = _Layout(widths, blocks, group_width, expansion, bfloat16_stages)
        self.stages = nn.ModuleList()
        for stage, width in reversed(list(enumerate(widths))):
            before = [_conv1x1(shape.channels, width)] if stage == len(widths) - 1 else []
            after = _downsampling(width, widths[stage - 1]) if stage > 0 else []
            self.stages.append(layout.stage(stage, before, after))
        self.basis = nn.Parameter(
            torch.randn(widths[0], *shape.grid) / math.prod(shape.grid) ** 0.5
        )
        self.output = _initialize(
            nn.Linear(widths[0], embedding_dim if num_classes > 0 else 1, bias=False)
        )
        self.embedding = _embedding(num_classes, embedding_dim, gain=embedding_dim**-0.5)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        maps = images
        for stage in self.stages:
            maps = stage(maps)
        # A convolution's weight gradient would take up to 90 times as long on a CPU.
        features = self.output((maps * self.basis).sum((2, 3)))
        if self.embedding is None:
            return features.squeeze(1)
        if labels is None:
            raise ValueError("a conditional R3GANCritic needs the labels of its images")
        return (features * self.embedding(labels)).sum(1)


@dataclass(frozen=True)
class _Layout:
    """How the stages of a network are made. Raises UserError for impossible options."""

    widths: list[int]  # from the lowest resolution up
    blocks: int
    group_width: int
    expansion: int
    bfloat16_stages: int

    def __post_init__(self) -> None:
        sizes = {"group_width": self.group_width, "expansion": self.expansion}
        require_positive("r3gan", blocks=self.blocks, **sizes)
        require_stages("r3gan", self.bfloat16_stages, len(self.widths))
        for width in self.widths:
            hidden = width * self.expansion
            if hidden % self.group_width:
                raise UserError(
                    f"group_width {self.group_width} of r3gan does not divide {hidden}, which is "
                    f"the width {width} times the expansion {self.expansion}"
                )

    def stage(self, stage: int, before: Sequence[nn.Module], after: Sequence[nn.Module]) -> "Stage":
        """The blocks of a stage, with the layers before and after them."""
        sizes = self.widths[stage], self.group_width, self.expansion
        depth = self.blocks * len(self.widths)
        blocks = [ResidualBlock(*sizes, depth) for _ in range(self.blocks)]
        is_bfloat16 = stage >= len(self.widths) - self.bfloat16_stages
        return Stage([*before, *blocks, *after], is_bfloat16)


class Stage(nn.Sequential):
    """The layers at one resolution."""

    def __init__(self, layers: Sequence[nn.Module], is_bfloat16: bool) -> None:
        super().__init__(*layers)
        self.is_bfloat16 = is_bfloat16

    def forward(
        self, input: Float[Tensor, "batch inputs _ _"]
    ) -> Float[Tensor, "batch outputs _ _"]:
        with autocast(input.device, "bfloat16") if self.is_bfloat16 else nullcontext():
            # Autocast casts only what convolutions take: the residual sums would stay in float32.
            return super().forward(input.to(compute_dtype(next(self.parameters()))))


class ResidualBlock(nn.Module):
    """A 1x1, a grouped 3x3 and another 1x1 convolution; bias and leaky ReLU after the first two."""

    def __init__(self, width: int, group_width: int, expansion: int, depth: int) -> None:
        """depth: the number of blocks of the whole network"""
        super().__init__()
        hidden = width * expansion
        # The gain of Fixup (Zhang et al. 2019, https://arxiv.org/abs/1901.09321): L^(-1 / (2m - 2))
        # for L residual blocks of m layers, of which the last one starts at zero.
        gain = nn.init.calculate_gain("leaky_relu", NEGATIVE_SLOPE) * depth ** (-1 / 4)
        self.conv1 = _initialize(nn.Conv2d(width, hidden, 1), gain)
        groups = hidden // group_width
        self.conv2 = _initialize(nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups), gain)
        self.conv3 = _initialize(nn.Conv2d(hidden, width, 1, bias=False), 0.0)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)

    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        residual = self.activation(self.conv1(maps))
        residual = self.activation(self.conv2(residual))
        return maps + self.conv3(residual)


def _upsampling(inputs: int, outputs: int) -> list[nn.Module]:
    """With a change of width at the lower resolution, where it is the same function."""
    return [*_change_of_width(inputs, outputs), FIRUpsample()]


def _downsampling(inputs: int, outputs: int) -> list[nn.Module]:
    return [FIRDownsample(), *_change_of_width(inputs, outputs)]


def _change_of_width(inputs: int, outputs: int) -> Sequence[nn.Module]:
    return [] if inputs == outputs else [_conv1x1(inputs, outputs)]


def _conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return _initialize(nn.Conv2d(inputs, outputs, 1, bias=False))


def _embedding(num_classes: int, dim: int, gain: float = 1.0) -> nn.Embedding | None:
    """Initialized like the authors' linear layer of one-hot classes."""
    if not num_classes:
        return None
    embedding = nn.Embedding(num_classes, dim)
    nn.init.normal_(embedding.weight, std=gain * num_classes**-0.5)
    return embedding


def _initialize(layer: Layer, gain: float = 1.0) -> Layer:
    """Weights from N(0, gain^2 / fan-in), biases zero."""
    nn.init.normal_(layer.weight, std=gain * layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
