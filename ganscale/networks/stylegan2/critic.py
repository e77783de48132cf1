"""StyleGAN2's critic."""

from contextlib import nullcontext

from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.networks.batch_groups import MinibatchStdDev
from ganscale.networks.fir_resampling import Blur, FIRDownsample
from ganscale.networks.shapes import require_positive
from ganscale.networks.stylegan2.equalized import (
    ACTIVATION_GAIN,
    EqualizedConv2d,
    EqualizedLinear,
    activate,
)
from ganscale.networks.stylegan2.mapping import Mapping
from ganscale.networks.stylegan2.options import Stages, require_choice
from ganscale.runtime import autocast, compute_dtype


class StyleGAN2Critic(nn.Module):
    """Stages from the image's resolution down to the lowest, each with two convolutions and a
    halving; the minibatch standard deviation, a convolution and two linear layers.

    `architecture` is "resnet", where each stage is a residual block, or "skip", where each gets the
    image at its resolution, too (Karras et al. 2020, figure 7). `widths`, `channel_base`,
    `channel_max` and `bfloat16_stages` as in the generator; `widths` are from the lowest resolution
    up here, too. The deviation is that of groups of `group_size` images; 1 leaves it out.

    With classes, the logit is the product of the features and a mapping of the class through
    `mapping_layers` layers (Karras et al. 2020, https://arxiv.org/abs/2006.06676, and its code).
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        widths: int | list[int] | None = None,
        channel_base: int | None = None,
        channel_max: int | None = None,
        architecture: str = "resnet",
        group_size: int = 4,
        mapping_layers: int = 8,
        bfloat16_stages: int = 0,
    ) -> None:
        super().__init__()
        stages = Stages.of(sample_shape, widths, channel_base, channel_max, bfloat16_stages)
        require_positive("stylegan2", group_size=group_size, mapping_layers=mapping_layers)
        require_choice("architecture", architecture, ("resnet", "skip"))
        is_skip = architecture == "skip"
        self.stages = nn.ModuleList(
            _Stage(stages, stage, is_skip) for stage in reversed(range(1, len(stages.widths)))
        )
        width, pixels = stages.widths[0], stages.size(0)[0] * stages.size(0)[1]
        self.from_rgb = _from_rgb(stages.shape.channels, width) if is_skip else None
        self.deviation = MinibatchStdDev(group_size) if group_size > 1 else None
        inputs = width + (1 if group_size > 1 else 0)
        self.conv = EqualizedConv2d(inputs, width, 3, padding=1)
        gain = ACTIVATION_GAIN
        self.hidden = EqualizedLinear(width * pixels, width, input_gain=gain, gain=gain)
        self.output = EqualizedLinear(width, width if num_classes > 0 else 1)
        self.mapping = None
        if num_classes > 0:
            self.mapping = Mapping(0, num_classes, width, mapping_layers)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        maps = None
        for stage in self.stages:
            maps, images = stage(maps, images)
        assert maps is not None
        maps = maps.to(compute_dtype(self.conv.weight))
        if self.from_rgb is not None:
            maps = (maps + activate(self.from_rgb(images))) * ACTIVATION_GAIN
        if self.deviation is not None:
            maps = self.deviation(maps)
        features = activate(self.hidden(activate(self.conv(maps)).flatten(1)))
        features = self.output(features)
        if self.mapping is None:
            return features.squeeze(1)
        if labels is None:
            raise ValueError("a conditional StyleGAN2Critic needs the labels of its images")
        return (features * self.mapping(None, labels)).sum(1) * features.shape[1] ** -0.5


class _Stage(nn.Module):
    """The layers at one resolution, and the halving after them."""

    def __init__(self, stages: Stages, stage: int, is_skip: bool) -> None:
        super().__init__()
        inputs, outputs = stages.widths[stage], stages.widths[stage - 1]
        is_first = stage == len(stages.widths) - 1
        # Residual sums include the activation's gain; other maps leave it to the next layer.
        gain = ACTIVATION_GAIN if is_skip or is_first else 1.0
        has_rgb = is_skip or is_first
        self.from_rgb = _from_rgb(stages.shape.channels, inputs) if has_rgb else None
        self.conv1 = EqualizedConv2d(inputs, inputs, 3, gain=gain, padding=1)
        self.blur = Blur(2)
        self.conv2 = EqualizedConv2d(inputs, outputs, 3, gain=ACTIVATION_GAIN, stride=2)
        self.downsample = FIRDownsample()
        self.skip = None
        if not is_skip:
            self.skip = EqualizedConv2d(inputs, outputs, 1, gain=gain * 0.5**0.5, bias=False)
        self._is_bfloat16 = stages.is_bfloat16(stage)

    def forward(
        self,
        maps: Float[Tensor, "batch inputs height width"] | None,
        images: Float[Tensor, "batch channels _ _"],
    ) -> tuple[Float[Tensor, "batch outputs _ _"], Float[Tensor, "batch channels _ _"]]:
        """The maps, and the images at their resolution if the next stage needs them."""
        with autocast(images.device, "bfloat16") if self._is_bfloat16 else nullcontext():
            if self.from_rgb is not None:
                of_images = activate(self.from_rgb(images))
                maps = of_images if maps is None else of_images + maps.to(of_images.dtype)
            assert maps is not None
            maps = maps.to(compute_dtype(self.conv1.weight))
            residual = activate(self.conv1(maps))
            residual = activate(self.conv2(self.blur(residual)))
            if self.skip is None:
                return residual, self.downsample(images)
            # The sum's factor sqrt(1/2) cancels the gain that the residual has left out.
            return self.skip(self.downsample(maps)).add_(residual), images


def _from_rgb(channels: int, width: int) -> EqualizedConv2d:
    return EqualizedConv2d(channels, width, 1)
