"""The pipeline of adaptive discriminator augmentation: Karras et al. 2020, "Training generative
adversarial networks with limited data" (arXiv:2006.06676), appendix B."""

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.augmentation.resampling import Affine, reflected, sample_nearest, sample_smoothly
from ganscale.augmentation.transformations import (
    ALWAYS_ONE,
    Parameters,
    Transformation,
    integer_below,
    normal_with,
    uniform_between,
)

_TURN = uniform_between(-math.pi, math.pi)
_EIGHTH = uniform_between(-0.125, 0.125)

# Lengths are in widths of the image, amplifications are binary logarithms, angles are in radians.
TRANSFORMATIONS = (
    Transformation("xflip", "blit", {"xflip": integer_below(2)}),
    Transformation("rotate90", "blit", {"rotate90": integer_below(4)}),
    Transformation("xint", "blit", {"xint_x": _EIGHTH, "xint_y": _EIGHTH}),
    Transformation("scale", "geom", {"scale": normal_with(0.2)}),
    Transformation("rotate", "geom", {"rotate_before": _TURN}, is_twice=True),
    Transformation("aniso", "geom", {"aniso": normal_with(0.2)}),
    Transformation("rotate", "geom", {"rotate_after": _TURN}, is_twice=True),
    Transformation("xfrac", "geom", {"xfrac_x": normal_with(0.125), "xfrac_y": normal_with(0.125)}),
    Transformation("brightness", "color", {"brightness": normal_with(0.2)}),
    Transformation("contrast", "color", {"contrast": normal_with(0.5)}),
    Transformation("lumaflip", "color", {"lumaflip": integer_below(2)}),
    Transformation("hue", "color", {"hue": _TURN}, needs_color=True),
    Transformation("saturation", "color", {"saturation": normal_with(1.0)}, needs_color=True),
    *(
        Transformation("imgfilter", "filter", {f"imgfilter_{band}": normal_with(1.0)})
        for band in range(4)
    ),
    Transformation("noise", "noise", {"noise": normal_with(0.1)}),
    Transformation(
        "cutout",
        "cutout",
        {
            "cutout": ALWAYS_ONE,
            "cutout_x": uniform_between(-0.5, 0.5),
            "cutout_y": uniform_between(-0.5, 0.5),
        },
    ),
)
DEFAULT_CATEGORIES = "blit", "geom", "color"

_CUTOUT_SIZE = 0.5
_BLITTING = frozenset({"xflip", "rotate90", "xint"})
_SMOOTH = frozenset({"scale", "rotate", "aniso", "xfrac"})
_COLOR = frozenset({"brightness", "contrast", "lumaflip", "hue", "saturation"})
_SYM2 = -0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025


def augment(
    images: Float[Tensor, "batch channels height width"],
    parameters: Parameters,
    is_on: frozenset[str],
    noise: Tensor | None,
) -> Float[Tensor, "batch channels height width"]:
    """In the paper's order; groups of which nothing is on are skipped."""
    if is_on & (_BLITTING | _SMOOTH):
        images = _move(images, parameters, is_smooth=bool(is_on & _SMOOTH))
    if is_on & _COLOR:
        images = _recolor(images, parameters)
    if "imgfilter" in is_on:
        images = _filter(images, parameters)
    if noise is not None:
        images = torch.addcmul(images, noise, parameters["noise"].view(-1, 1, 1, 1))
    if "cutout" in is_on:
        images = images * _outside_of_cutout(parameters, *images.shape[-2:])
    return images


def _move(images: Tensor, parameters: Parameters, *, is_smooth: bool) -> Tensor:
    """All geometric transformations at once; without those by fractions of pixels, exactly."""
    height, width = images.shape[-2:]
    affine = affine_map(parameters, height, width)
    if not is_smooth:
        return sample_nearest(images, affine, is_reflected=True)
    names = ("xflip", "rotate90", "xint_x", "xint_y", "scale", "rotate_before", "aniso")
    names += ("rotate_after", "xfrac_x", "xfrac_y")
    # At the border, up- and down-sampling changes an image that nothing else is done to.
    is_moved = torch.stack([parameters[name] for name in names]).any(dim=0)
    return torch.where(is_moved.view(-1, 1, 1, 1), sample_smoothly(images, affine), images)


def affine_map(parameters: Parameters, height: int, width: int) -> Affine:
    """The inverse of the composed transformations: where each pixel comes from.

    The paper flips, rotates and then translates by whole pixels; here the translation comes first.
    As it is as likely in all four directions, that is the same distribution.
    """
    p = parameters
    angles = torch.stack(
        [p["rotate90"] * (-math.pi / 2) - p["rotate_before"], -p["rotate_after"]], dim=1
    )
    cosines, sines = angles.cos(), angles.sin()
    rotations = torch.stack([cosines, -sines, sines, cosines], dim=-1).unflatten(-1, (2, 2))
    before, after = rotations.unbind(1)
    shrinking = torch.stack([-p["scale"] - p["aniso"], p["aniso"] - p["scale"]], dim=1).exp2()
    before = before * shrinking[:, None, :]
    matrix = before[:, :, :1] * after[:, :1, :] + before[:, :, 1:] * after[:, 1:, :]
    flipped = torch.stack([1 - 2 * p["xflip"], torch.ones_like(p["xflip"])], dim=1)
    matrix = matrix * flipped[:, :, None]
    whole = torch.stack([(p["xint_x"] * width).round(), (p["xint_y"] * height).round()], dim=1)
    fraction = torch.stack([p["xfrac_x"] * width, p["xfrac_y"] * height], dim=1)
    return matrix, -(matrix * fraction[:, None, :]).sum(dim=2) - whole


def _recolor(images: Tensor, parameters: Parameters) -> Tensor:
    """All color transformations as one affine map of an image's channels.

    Luma flip, hue and saturation commute: they act on the gray axis, the plane across it, and
    rotate that plane. On gray images, only brightness, contrast and luma flip act.
    """
    contrast = parameters["contrast"].exp2()
    gray = contrast * (1 - 2 * parameters["lumaflip"])
    added = (gray * parameters["brightness"]).view(-1, 1, 1)
    if images.shape[1] != 3:
        return torch.addcmul(added[..., None], images, gray.view(-1, 1, 1, 1))
    across = contrast * parameters["saturation"].exp2()
    angles = parameters["hue"]
    factors = torch.stack([gray, across * angles.cos(), across * angles.sin()], dim=1)
    matrices = (factors @ _color_basis(images.dtype, images.device)).unflatten(1, (3, 3))
    return torch.baddbmm(added, matrices, images.flatten(2)).view(images.shape)


@lru_cache(maxsize=8)
def _color_basis(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "3 9"]:
    """The projections on the gray axis and across it, and the quarter turn about it."""
    axis = np.full(3, 1 / np.sqrt(3))
    onto = np.outer(axis, axis)
    turn = np.cross(np.eye(3), axis)
    basis = np.stack([onto, np.eye(3) - onto, turn]).reshape(3, 9)
    return torch.from_numpy(basis).to(device, dtype)


def _filter(images: Tensor, parameters: Parameters) -> Tensor:
    """Each frequency band amplified, and all of them scaled to keep the expected power."""
    height, width = images.shape[-2:]
    amplified = torch.stack([parameters[f"imgfilter_{band}"] for band in range(4)], dim=1).exp2()
    power = _expected_power(images.dtype, images.device)
    scale = (1 + power * (amplified.square() - 1)).prod(dim=1, keepdim=True).rsqrt()
    gains = amplified * scale

    def filters(size: int) -> Tensor:
        bands = _band_filters(size, images.dtype, images.device)
        return (gains @ bands).view(-1, 1, size, size)

    rows = filters(height)
    columns = rows if height == width else filters(width)
    return rows @ (images @ columns.mT)


@lru_cache(maxsize=8)
def _expected_power(dtype: torch.dtype, device: torch.device) -> Float[Tensor, " 4"]:
    """Of natural images in the four bands."""
    return torch.tensor([10 / 13, 1 / 13, 1 / 13, 1 / 13], dtype=dtype, device=device)


@lru_cache(maxsize=8)
def _band_filters(
    size: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "4 size_squared"]:
    """The filter of each band, reflected about the outermost pixels, as (size, size) matrices."""
    matrices = np.zeros((4, size, size))
    half = band_kernels().shape[1] // 2
    for band, kernel in enumerate(band_kernels()):
        for row in range(size):
            for offset in range(-half, half + 1):
                matrices[band, row, reflected(row + offset, size)] += kernel[half + offset]
    return torch.from_numpy(matrices.reshape(4, -1)).to(device, dtype)


@lru_cache(maxsize=1)
def band_kernels() -> np.ndarray:
    """(4, 43): symmetric kernels of the bands up to 1/8, 1/4, 1/2 and all of the largest frequency,
    which add up to the identity: products of H(z) H(1/z) / 2 of the wavelet sym2."""
    low = np.convolve(_SYM2, _SYM2[::-1]) / 2
    high = low * (-1) ** np.arange(len(low))  # at -z; its middle, at an odd place, changes sign
    high = -high
    passed, bands = np.ones(1), []
    for level in range(3):
        spread = 2**level
        bands.append(np.convolve(passed, _spread(high, spread)))
        passed = np.convolve(passed, _spread(low, spread))
    bands = [passed, *reversed(bands)]
    longest = len(passed)
    return np.stack([np.pad(band, (longest - len(band)) // 2) for band in bands])


def _spread(kernel: np.ndarray, factor: int) -> np.ndarray:
    """Of z^factor."""
    spread = np.zeros((len(kernel) - 1) * factor + 1)
    spread[::factor] = kernel
    return spread


def _outside_of_cutout(parameters: Parameters, height: int, width: int) -> Tensor:
    """0 within a rectangle of half the image's size, 1 elsewhere; (batch, 1, height, width)."""
    like = parameters["cutout"]
    xs, ys = (
        ((torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size - 0.5)
        for size in (width, height)
    )
    inside_x = (xs - parameters["cutout_x"][:, None]).abs() < _CUTOUT_SIZE / 2
    inside_y = (ys - parameters["cutout_y"][:, None]).abs() < _CUTOUT_SIZE / 2
    inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    return 1 - inside * like.view(-1, 1, 1, 1)
