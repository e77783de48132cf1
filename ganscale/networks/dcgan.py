"""DCGAN: "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks" (Radford et al. 2016, https://arxiv.org/abs/1511.06434).

Two departures from the paper. Kernels are 4x4, where it draws 5x5: with a kernel that the stride
divides, every pixel is covered equally often, which avoids checkerboards (Odena et al. 2016,
https://distill.pub/2016/deconv-checkerboard). The critic has no batch normalization by default.
"""

from functools import partial
from itertools import pairwise

from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.networks.shapes import doubling_widths, image_shape, require_unconditional

WEIGHT_STD = 0.02  # section 4: "initialized from a zero-centered Normal distribution"
_NORMS = {
    "batch": GlobalBatchNorm,
    "layer": partial(nn.GroupNorm, 1),
    "instance": partial(nn.InstanceNorm2d, affine=True),
}


class DCGANGenerator(nn.Module):
    """Latents to a map of 4x4 pixels, then one transposed convolution per doubling, for images of
    16 to 1024 pixels; images that are not square have a map that is not (`shapes.ImageShape`).

    `width` is the number of channels before the image layer; it doubles with every halving of the
    resolution, up to `max_width`. The paper's 64x64 generator has `width=128`. `norm` is "batch" or
    "none".
    """

    can_concatenate_batches = True

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 64,
        max_width: int = 1024,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        require_unconditional(num_classes, "dcgan")
        channels, grid, doublings = image_shape(sample_shape, "dcgan")
        if norm not in ("batch", "none"):
            raise UserError(f'norm of a dcgan generator is "batch" or "none", not {norm!r}')
        has_bias = norm == "none"  # batch normalization subtracts it again
        widths = doubling_widths("dcgan", width, max_width, doublings)[::-1]
        layers = nn.Sequential(nn.ConvTranspose2d(latent_dim, widths[0], grid, bias=has_bias))
        layers.extend(_activation(norm, widths[0]))
        for inputs, outputs in pairwise(widths):
            conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=has_bias)
            layers.extend([conv, *_activation(norm, outputs)])
        image = nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1)
        layers.extend([image, nn.Tanh()])
        self.layers = layers.apply(_initialize)

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        return self.layers(latents[:, :, None, None])


class DCGANCritic(nn.Module):
    """One strided convolution per halving, down to the generator's 4x4 map, and that to a logit.

    `width` is the number of channels after the first convolution; it doubles with every further
    one, up to `max_width`. `norm` follows all but the first and last convolution (section 3):
    "none", "layer" (a mean and deviation per sample, a gain and bias per channel) or "instance".
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 64,
        max_width: int = 1024,
        norm: str = "none",
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        require_unconditional(num_classes, "dcgan")
        channels, grid, doublings = image_shape(sample_shape, "dcgan")
        if norm == "batch":
            raise UserError(
                "batch norm in a dcgan critic mixes the samples that a gradient penalty keeps "
                'apart, and its statistics differ between ranks: set norm to "layer", "instance" '
                'or "none"'
            )
        if norm not in ("none", "layer", "instance"):
            raise UserError(
                f'norm of a dcgan critic is "none", "layer" or "instance", not {norm!r}'
            )
        widths = doubling_widths("dcgan", width, max_width, doublings)
        layers = nn.Sequential(
            nn.Conv2d(channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(negative_slope),
        )
        for inputs, outputs in pairwise(widths):
            conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=norm == "none")
            layers.extend([conv, *_activation(norm, outputs, negative_slope)])
        # No bias, as in the authors' code: it would shift all logits, which a Wasserstein loss
        # does not notice.
        layers.append(nn.Conv2d(widths[-1], 1, grid, bias=False))
        self.layers = layers.apply(_initialize)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        return self.layers(images).flatten()


def _activation(norm: str, channels: int, negative_slope: float = 0.0) -> list[nn.Module]:
    """The normalization named `norm`, if any, and a ReLU (leaky if a slope is given)."""
    relu = nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()
    return [relu] if norm == "none" else [_NORMS[norm](channels), relu]


def _initialize(module: nn.Module) -> None:
    """Weights from N(0, 0.02), gains of batch normalization from N(1, 0.02), biases zero."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, GlobalBatchNorm) and module.weight is not None:
        nn.init.normal_(module.weight, 1.0, WEIGHT_STD)
