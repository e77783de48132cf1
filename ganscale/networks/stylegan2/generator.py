"""StyleGAN2's generator: a mapping of latents to styles, and a synthesis of images from styles."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.fir_resampling import FIRUpsample
from ganscale.networks.random_layers import EVALUATION_NOISES
from ganscale.networks.shapes import require_positive
from ganscale.networks.stylegan2.equalized import ACTIVATION_GAIN, EqualizedConv2d
from ganscale.networks.stylegan2.mapping import Mapping
from ganscale.networks.stylegan2.modulation import (
    LayerSettings,
    Scales,
    StyledConv2d,
    ToRGB,
)
from ganscale.networks.stylegan2.options import Stages, require_choice
from ganscale.random import normal_like, uniform_like
from ganscale.runtime import at_least_float32, autocast, compute_dtype


class StyleGAN2Generator(nn.Module):
    """A learned map of the lowest resolution, then stages: a convolution at that resolution and two
    at each further one, all scaled by the styles of their layers.

    `architecture` is "skip", where each resolution adds to the image, or "resnet", where each is a
    residual block (Karras et al. 2020, figure 7).

    `widths` is the number of channels of every stage, or a list of them from the lowest resolution
    up. Without it, stage n has `channel_base` / (4 * 2^n) channels (32768 by default), and at most
    `channel_max` (512). Styles have `style_dim` numbers, from `mapping_layers` layers. In training,
    the share `style_mixing` of all images has the style of another latent from a random layer on.
    In evaluation, noise is "random", drawn as in training, "fixed", the same for all images, or
    "off" (`evaluation_noise`). The `bfloat16_stages` of the highest resolutions compute in bfloat16
    in every forward, unless the weights are in float64.
    """

    can_concatenate_batches = True

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        widths: int | list[int] | None = None,
        channel_base: int | None = None,
        channel_max: int | None = None,
        style_dim: int = 512,
        mapping_layers: int = 8,
        architecture: str = "skip",
        style_mixing: float = 0.9,
        evaluation_noise: str = "random",
        bfloat16_stages: int = 0,
    ) -> None:
        super().__init__()
        stages = Stages.of(sample_shape, widths, channel_base, channel_max, bfloat16_stages)
        require_positive("stylegan2", style_dim=style_dim, mapping_layers=mapping_layers)
        require_choice("architecture", architecture, ("skip", "resnet"))
        require_choice("evaluation_noise", evaluation_noise, EVALUATION_NOISES)
        is_number = isinstance(style_mixing, int | float) and not isinstance(style_mixing, bool)
        if not is_number or not 0 <= style_mixing <= 1:
            raise UserError(
                f"style_mixing of stylegan2 must be a number from 0 to 1, not {style_mixing!r}"
            )
        self.style_mixing = style_mixing
        self.mapping = Mapping(latent_dim, num_classes, style_dim, mapping_layers)
        self.constant = nn.Parameter(torch.randn(stages.widths[0], *stages.size(0)))
        self.stages = nn.ModuleList()
        for stage in range(len(stages.widths)):
            layers = LayerSettings(style_dim, stages.size(stage), evaluation_noise)
            self.stages.append(_Stage(stages, stage, layers, architecture == "resnet"))
        self.style_count = 2 * len(stages.widths)

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        return self.synthesis(self.styles(latents, labels))

    def styles(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch layers style_dim"]:
        """The style of each layer."""
        if self.mapping.embedding is not None and labels is None:
            raise ValueError("a conditional StyleGAN2Generator needs the labels of its latents")
        if not self.training or self.style_mixing == 0:
            return self.mapping(latents, labels)[:, None].expand(-1, self.style_count, -1)
        others = normal_like(latents, "mixing latents")
        twice = None if labels is None else torch.cat([labels, labels])
        own, other = self.mapping(torch.cat([latents, others]), twice)[:, None].chunk(2)
        # One number decides whether styles are mixed, and from which layer on: any but the first.
        share = uniform_like(latents[:, :1], "mixing") / self.style_mixing
        layers = torch.arange(self.style_count, device=latents.device)
        is_own = (layers < 1 + (share * (self.style_count - 1)).floor()) | (share >= 1)
        return torch.where(is_own[:, :, None], own, other)

    def synthesis(
        self, styles: Float[Tensor, "batch layers style_dim"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images, not squashed to [-1, 1]."""
        of_layers = styles.unbind(1)
        with autocast(styles.device, "float32"):
            scales = [stage.scales(of_layers) for stage in self.stages]  # type: ignore[operator]
        maps, images = self.constant.expand(len(styles), -1, -1, -1), None
        for stage, own in zip(self.stages, scales, strict=True):
            maps, images = stage(maps, images, own)  # type: ignore[operator]
        assert images is not None  # the last stage makes some
        return images.to(compute_dtype(self.constant))


class _Stage(nn.Module):
    """The layers at one resolution."""

    def __init__(self, stages: Stages, stage: int, layers: LayerSettings, is_resnet: bool) -> None:
        super().__init__()
        width, is_last = stages.widths[stage], stage == len(stages.widths) - 1
        is_residual = is_resnet and stage > 0
        self.convs = nn.ModuleList()
        self.skip = self.to_rgb = None
        if stage > 0:
            inputs = stages.widths[stage - 1]
            # Residual sums include the activation's gain; other maps leave it to the next layer.
            gain = 1.0 if is_resnet and stage > 1 else ACTIVATION_GAIN
            self.convs.append(StyledConv2d(inputs, width, layers, gain=gain, is_upsampling=True))
            if is_residual:
                self.skip = EqualizedConv2d(inputs, width, 1, gain=gain * 0.5**0.5, bias=False)
        gain = 1.0 if stage == 0 else ACTIVATION_GAIN
        self.convs.append(StyledConv2d(width, width, layers, gain=gain))
        if is_last or not is_resnet:
            gain = 1.0 if is_residual else ACTIVATION_GAIN
            self.to_rgb = ToRGB(width, stages.shape.channels, layers.style_dim, gain=gain)
        self.upsample = FIRUpsample()
        self._first_style = max(0, 2 * stage - 1)
        self._is_bfloat16 = stages.is_bfloat16(stage)

    def scales(
        self, styles: Sequence[Float[Tensor, "batch style_dim"]]
    ) -> tuple[list[Scales], Tensor | None]:
        """styles: of all layers. A stage's ToRGB shares that of the next stage's first layer."""
        own = styles[self._first_style :]
        pairs = zip(self.convs, own, strict=False)
        scales = [conv.scales(style) for conv, style in pairs]  # type: ignore[operator]
        return scales, None if self.to_rgb is None else self.to_rgb.weights(own[len(scales)])

    def forward(
        self,
        maps: Float[Tensor, "batch inputs _ _"],
        images: Float[Tensor, "batch channels _ _"] | None,
        scales: tuple[list[Scales], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        of_convs, rgb_weights = scales
        with autocast(maps.device, "bfloat16") if self._is_bfloat16 else nullcontext():
            maps = maps.to(compute_dtype(next(self.parameters())))
            residual = maps
            for conv, own in zip(self.convs, of_convs, strict=True):
                residual = conv(residual, own)
            if self.skip is not None:
                # The sum's factor sqrt(1/2) cancels the gain that the residual has left out.
                residual = self.upsample(self.skip(maps)).add_(residual)
            if images is not None:
                images = self.upsample(images)
            if self.to_rgb is not None:
                new = at_least_float32(self.to_rgb(residual, rgb_weights))
                images = new if images is None else images + new
            return residual, images
