"""DiffAugment: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training"
(arXiv:2006.10738), appendix; there, everything is applied to every image."""

import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.augmentation.resampling import sample_nearest
from ganscale.augmentation.transformations import (
    ALWAYS_ONE,
    Parameters,
    Transformation,
    uniform_between,
)

_EITHER_WAY, _SHARE = uniform_between(-1.0, 1.0), uniform_between(0.0, 1.0)

# Saturation and contrast are how much their factors are above 1.
TRANSFORMATIONS = (
    Transformation("brightness", "color", (uniform_between(-0.5, 0.5),)),
    Transformation("saturation", "color", (_EITHER_WAY,), needs_color=True),
    Transformation("contrast", "color", (uniform_between(-0.5, 0.5),)),
    Transformation("translation", "translation", (_EITHER_WAY, _EITHER_WAY)),
    Transformation("cutout", "cutout", (ALWAYS_ONE, _SHARE, _SHARE)),
)
DEFAULT_CATEGORIES = "color", "translation", "cutout"

_LARGEST_TRANSLATION = 1 / 8
_CUTOUT_SIZE = 1 / 2
_COLOR = frozenset({"brightness", "saturation", "contrast"})


def augment(
    images: Float[Tensor, "batch channels height width"],
    parameters: Parameters,
    is_on: frozenset[str],
    _: Tensor | None,
) -> Float[Tensor, "batch channels height width"]:
    """In the order of the authors' code."""
    if is_on & _COLOR:
        images = _recolor(images, parameters)
    if "translation" in is_on:
        images = _translate(images, parameters)
    if "cutout" in is_on:
        images = images * _outside_of_cutout(parameters, *images.shape[-2:])
    return images


def _recolor(images: Tensor, parameters: Parameters) -> Tensor:
    """Brightness is added; saturation scales what differs from the mean of a pixel's channels, and
    contrast what differs from the mean of the image."""
    brightness, saturation, contrast = (
        parameters[name].view(-1, 1, 1, 1) for name in ("brightness", "saturation", "contrast")
    )
    images = images + brightness
    gray = images.mean(dim=1, keepdim=True)
    images = torch.addcmul(images, images - gray, saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(images, images - mean, contrast)


def _translate(images: Tensor, parameters: Parameters) -> Tensor:
    """By whole pixels, equally likely, up to an eighth of the image either way; zeros come in."""
    shares = parameters["translation"].split(1, dim=1)
    sizes = images.shape[-1], images.shape[-2]
    moved = [
        _whole_pixels(share, int(size * _LARGEST_TRANSLATION + 0.5))
        for share, size in zip(shares, sizes, strict=True)
    ]
    unchanged = torch.eye(2, dtype=images.dtype, device=images.device).expand(len(images), 2, 2)
    return sample_nearest(images, (unchanged, -torch.cat(moved, dim=1)), is_reflected=False)


def _whole_pixels(share: Tensor, largest: int) -> Tensor:
    """Integers from -largest to largest, equally likely for a uniform share in [-1, 1); 0 of 0."""
    return (share * (largest + 0.5) + 0.5).floor()


def _outside_of_cutout(parameters: Parameters, height: int, width: int) -> Tensor:
    """0 within a rectangle of half the image's size, part of which may be outside of the image; its
    middle is on any pixel, equally likely, or, where its side is even, one beyond the last."""
    is_cut, x, y = parameters["cutout"].split(1, dim=1)

    def inside(share: Tensor, size: int) -> Tensor:
        cut = int(size * _CUTOUT_SIZE + 0.5)
        middles = (share * (size + 1 - cut % 2)).floor()
        offsets = torch.arange(size, dtype=x.dtype, device=x.device) - middles + cut // 2
        return (offsets >= 0) & (offsets < cut)

    inside_both = inside(y, height)[:, None, :, None] & inside(x, width)[:, None, None]
    return 1 - inside_both * is_cut[:, :, None, None]
