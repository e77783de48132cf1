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
from ganscale.tensor_cache import cached_tensors

_TURN = uniform_between(-math.pi, math.pi)
_EIGHTH = uniform_between(-0.125, 0.125)
_HALF_EITHER_WAY = uniform_between(-0.5, 0.5)

# Lengths are in sizes of the image along their axis, amplifications are binary logarithms, angles
# are in radians.
TRANSFORMATIONS = (
    Transformation("xflip", "blit", (integer_below(2),)),
    Transformation("rotate90", "blit", (integer_below(4),)),
    Transformation("xint", "blit", (_EIGHTH, _EIGHTH)),
    Transformation("scale", "geom", (normal_with(0.2),)),
    Transformation("rotate", "geom", (_TURN,), is_twice=True),  # before aniso
    Transformation("rotate", "geom", (_TURN,), is_twice=True),  # after it
    Transformation("aniso", "geom", (normal_with(0.2),)),
    Transformation("xfrac", "geom", (normal_with(0.125), normal_with(0.125))),
    Transformation("brightness", "color", (normal_with(0.2),)),
    Transformation("contrast", "color", (normal_with(0.5),)),
    Transformation("lumaflip", "color", (integer_below(2),)),
    Transformation("hue", "color", (_TURN,), needs_color=True),
    Transformation("saturation", "color", (normal_with(1.0),), needs_color=True),
    *[Transformation("imgfilter", "filter", (normal_with(1.0),))] * 4,  # for each band
    Transformation("noise", "noise", (normal_with(0.1),)),
    Transformation("cutout", "cutout", (ALWAYS_ONE, _HALF_EITHER_WAY, _HALF_EITHER_WAY)),
)
DEFAULT_CATEGORIES = "blit", "geom", "color"

_CUTOUT_SIZE = 0.5
_BLITTING = "xflip", "rotate90", "xint"
_SMOOTH = "scale", "rotate", "aniso", "xfrac"
_COLOR = frozenset({"brightness", "contrast", "lumaflip", "hue", "saturation"})
_SYM2 = -0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025


def augment(
    images: Float[Tensor, "batch channels height width"],
    parameters: Parameters,
    is_on: frozenset[str],
    noise: Tensor | None,
) -> Float[Tensor, "batch channels height width"]:
    """In the paper's order; groups of which nothing is on are skipped."""
    if is_on.intersection(_BLITTING + _SMOOTH):
        images = _move(images, parameters, is_smooth=bool(is_on.intersection(_SMOOTH)))
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
    """All geometric transformations in one resampling, exact where pixels move by whole steps."""
    height, width = images.shape[-2:]
    affine = affine_map(parameters, height, width)
    if not is_smooth:
        return sample_nearest(images, affine, is_reflected=True)
    # At the border, up- and down-sampling changes an image that nothing else is done to.
    is_moved = torch.cat([parameters[name] for name in _BLITTING + _SMOOTH], dim=1).any(dim=1)
    return torch.where(is_moved.view(-1, 1, 1, 1), sample_smoothly(images, affine), images)


def affine_map(parameters: Parameters, height: int, width: int) -> Affine:
    """The inverse of the composed transformations: where each pixel comes from.

    The paper flips, rotates and then translates by whole pixels; here the translation comes first.
    The distribution is the same: either direction is equally likely, and before an odd quarter
    turn, each axis is translated in sizes of the other.
    """
    p = parameters
    ones, quarter_turns, opposite, mirror, sizes = _constants(
        height, width, p["rotate"].dtype, p["rotate"].device
    )
    # The first angle turns by quarters and before the scaling, the second one after it.
    angles = torch.addcmul(p["rotate"], p["rotate90"], quarter_turns)
    cosines, sines = angles.cos(), angles.sin()
    inverse_rotations = torch.stack([cosines, sines, -sines, cosines], dim=-1)
    before, after = inverse_rotations.unflatten(-1, (2, 2)).unbind(1)
    shrinking = torch.addcmul(-p["scale"], p["aniso"], opposite).exp2()
    before = before * shrinking[:, None, :]
    matrix = before[:, :, :1] * after[:, :1, :] + before[:, :, 1:] * after[:, 1:, :]
    matrix = matrix * torch.addcmul(ones, p["xflip"], mirror)[:, :, None]
    sizes_before = sizes
    if height != width:
        sizes_before = torch.where(p["rotate90"] % 2 == 1, sizes.flip(0), sizes)
    whole, fraction = (p["xint"] * sizes_before).round(), p["xfrac"] * sizes
    return matrix, -(whole + (matrix * fraction[:, None, :]).sum(dim=2))


@cached_tensors(maxsize=8)
def _constants(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, " 2"], ...]:
    numbers = (1, 1), (math.pi / 2, 0), (-1, 1), (-2, 0), (width, height)
    return tuple(torch.tensor(pair, dtype=dtype, device=device) for pair in numbers)


def _recolor(images: Tensor, parameters: Parameters) -> Tensor:
    """All color transformations as one affine map of an image's channels.

    Luma flip, hue and saturation commute: they act on the gray axis, the plane across it, and
    rotate that plane. On gray images, only brightness, contrast and luma flip act.
    """
    contrast = parameters["contrast"].exp2()
    gray = contrast * (1 - 2 * parameters["lumaflip"])
    added = (gray * parameters["brightness"])[:, :, None]
    if images.shape[1] != 3:
        return torch.addcmul(added[..., None], images, gray[:, :, None, None])
    across = contrast * parameters["saturation"].exp2()
    angles = parameters["hue"]
    factors = torch.cat([gray, across * angles.cos(), across * angles.sin()], dim=1)
    matrices = (factors @ _color_basis(images.dtype, images.device)).unflatten(1, (3, 3))
    return torch.baddbmm(added, matrices, images.flatten(2)).view(images.shape)


@cached_tensors(maxsize=8)
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
    amplified = parameters["imgfilter"].exp2()
    power = _expected_power(images.dtype, images.device)
    scale = (1 + power * (amplified.square() - 1)).prod(dim=1, keepdim=True).rsqrt()
    gains = amplified * scale

    def filters(size: int) -> Tensor:
        bands = _band_filters(size, images.dtype, images.device)
        return (gains @ bands).view(-1, 1, size, size)

    rows = filters(height)
    columns = rows if height == width else filters(width)
    return rows @ (images @ columns.mT)


@cached_tensors(maxsize=8)
def _expected_power(dtype: torch.dtype, device: torch.device) -> Float[Tensor, " 4"]:
    """Of natural images in the four bands."""
    return torch.tensor([10 / 13, 1 / 13, 1 / 13, 1 / 13], dtype=dtype, device=device)


@cached_tensors(maxsize=8)
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
    # H(-z) H(-1/z) / 2; its middle, at an odd index, is positive.
    high = -low * (-1) ** np.arange(len(low))
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
    is_cut, x, y = parameters["cutout"].split(1, dim=1)
    inside_x, inside_y = (
        ((_centered_positions(size, x.dtype, x.device) - middle).abs() < _CUTOUT_SIZE / 2)
        for size, middle in ((width, x), (height, y))
    )
    inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    return 1 - inside * is_cut[:, :, None, None]


@cached_tensors(maxsize=8)
def _centered_positions(
    size: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " size"]:
    """Of pixels, in sizes of the image."""
    return ((torch.arange(size, dtype=dtype) + 0.5) / size - 0.5).to(device)
