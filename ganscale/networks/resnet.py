"""The residual networks of "Improved Training of Wasserstein GANs" (Gulrajani et al. 2017,
https://arxiv.org/abs/1704.00028, the CIFAR-10 tables of the appendix), at 16 to 1024 pixels.

With classes, the generator's batch normalization is conditional and the critic's score has a
projection term (Miyato & Koyama 2018, https://arxiv.org/abs/1802.05637).

1x1 shortcut convolutions run at the smaller resolution of their block, where the paper's code runs
some at the larger one: the same function, with a quarter of the multiplications.
"""

import math
from itertools import pairwise
from typing import TypeVar

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as normalize_spectrally

from ganscale.errors import UserError
from ganscale.networks.normalization import ConditionalBatchNorm2d, GlobalBatchNorm
from ganscale.networks.resampling import PooledConv2d, UpsampledConv2d, upsampled
from ganscale.networks.shapes import doubling_widths, image_shape

Conv = TypeVar("Conv", bound=nn.Conv2d)

RELU_GAIN = math.sqrt(2)  # He's initialization, with the mean of fan-in and fan-out


class ResNetGenerator(nn.Module):
    """Latents to a 4x4 map, one residual block per doubling, and a convolution to the image. For
    images that are not square, the map has another height or width (`shapes.ImageShape`).

    `width` is the number of channels of every block, as in the paper, or, with a larger
    `max_width`, at the highest resolution; it then doubles with every halving, up to `max_width`.
    `norm` is "batch", or "none" to save its collectives on several ranks.
    """

    can_concatenate_batches = True

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 128,
        max_width: int | None = None,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        channels, self.grid, doublings = image_shape(sample_shape, "resnet")
        if norm not in ("batch", "none"):
            raise UserError(f'norm of a resnet generator is "batch" or "none", not {norm!r}')
        if norm == "none" and num_classes > 0:
            raise UserError(
                "a resnet generator learns its classes in batch normalization: set norm to "
                '"batch", or train without labels'
            )
        self.is_conditional = num_classes > 0

        widths = doubling_widths("resnet", width, max_width, doublings + 1)[::-1]
        self.input = _linear(latent_dim, math.prod(self.grid) * widths[0])
        self.blocks = nn.ModuleList(
            UpBlock(inputs, outputs, norm, num_classes) for inputs, outputs in pairwise(widths)
        )
        self.norm = GlobalBatchNorm(widths[-1]) if norm == "batch" else nn.Identity()
        self.output = _conv(widths[-1], channels, 3, gain=1.0)

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        if self.is_conditional and labels is None:
            raise ValueError("a conditional ResNetGenerator needs the labels of its latents")
        features = self.input(latents).unflatten(1, (-1, *self.grid))
        for block in self.blocks:
            features = block(features, labels)
        return self.output(F.relu(self.norm(features))).tanh()


class UpBlock(nn.Module):
    """A pre-activation residual block of the generator, which doubles the resolution."""

    def __init__(self, inputs: int, outputs: int, norm: str, num_classes: int) -> None:
        super().__init__()
        self.norm1 = _norm(norm, inputs, num_classes)
        self.norm2 = _norm(norm, outputs, num_classes)
        # A later batch norm subtracts whatever a bias adds to the residual or to the shortcut.
        has_bias = norm == "none"
        self.conv1 = _initialize(UpsampledConv2d(inputs, outputs, 3, bias=has_bias))
        self.conv2 = _conv(outputs, outputs, 3, bias=has_bias)
        self.shortcut = _conv(inputs, outputs, 1, gain=1.0, bias=has_bias)

    def forward(
        self,
        images: Float[Tensor, "batch inputs height width"],
        labels: Int64[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch outputs 2*height 2*width"]:
        residual = self.conv1(F.relu(_normalize(self.norm1, images, labels)))
        residual = self.conv2(F.relu(_normalize(self.norm2, residual, labels)))
        return upsampled(self.shortcut(images)) + residual


class ResNetCritic(nn.Module):
    """One residual block per halving down to 8x8, two more there, a mean over pixels, a logit.

    `width` and `max_width` as in the generator. With `spectral_norm` all weights are divided by
    their largest singular value (Miyato et al. 2018, https://arxiv.org/abs/1802.05957), estimated
    by power iteration.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 128,
        max_width: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        channels, _, doublings = image_shape(sample_shape, "resnet")
        widths = doubling_widths("resnet", width, max_width, doublings - 1)
        self.blocks = nn.Sequential(
            DownBlock(channels, widths[0], is_first=True),
            *(DownBlock(inputs, outputs) for inputs, outputs in pairwise(widths)),
            PlainBlock(widths[-1]),
            PlainBlock(widths[-1]),
            nn.ReLU(),
        )
        self.output = _linear(widths[-1], 1)
        self.embedding = nn.Embedding(num_classes, widths[-1]) if num_classes > 0 else None
        if self.embedding is not None:
            nn.init.xavier_uniform_(self.embedding.weight)
        if spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
                    normalize_spectrally(module)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        features = self.blocks(images).mean(dim=(2, 3))
        logits = self.output(features).squeeze(1)
        if self.embedding is None:
            return logits
        if labels is None:
            raise ValueError("a conditional ResNetCritic needs the labels of its images")
        return logits + (self.embedding(labels) * features).sum(dim=1)  # f(x, y) of section 3


class DownBlock(nn.Module):
    """A pre-activation residual block of the critic, which halves the resolution.

    The first one takes the image, without an activation before it.
    """

    def __init__(self, inputs: int, outputs: int, *, is_first: bool = False) -> None:
        super().__init__()
        self.is_first = is_first
        hidden = outputs if is_first else inputs
        self.conv1 = _conv(inputs, hidden, 3)
        self.conv2 = _initialize(PooledConv2d(hidden, outputs, 3))
        self.shortcut = _conv(inputs, outputs, 1, gain=1.0)

    def forward(
        self, images: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height//2 width//2"]:
        residual = self.conv1(images if self.is_first else F.relu(images))
        residual = self.conv2(F.relu(residual))
        return self.shortcut(F.avg_pool2d(images, 2)) + residual


class PlainBlock(nn.Module):
    """A pre-activation residual block of the critic that keeps its input's shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3)
        self.conv2 = _conv(channels, channels, 3)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return images + self.conv2(F.relu(self.conv1(F.relu(images))))


def _norm(norm: str, channels: int, num_classes: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if num_classes > 0:
        return ConditionalBatchNorm2d(channels, num_classes)
    return GlobalBatchNorm(channels)


def _normalize(norm: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    return norm(images, labels) if isinstance(norm, ConditionalBatchNorm2d) else norm(images)


def _conv(
    inputs: int, outputs: int, kernel_size: int, *, gain: float = RELU_GAIN, bias: bool = True
) -> nn.Conv2d:
    """A convolution that keeps the resolution."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)
    return _initialize(conv, gain)


def _initialize(conv: Conv, gain: float = RELU_GAIN) -> Conv:
    """As in the paper's code."""
    nn.init.xavier_uniform_(conv.weight, gain)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
