"""Checks of the sizes that a config gives a network, and the widths of its stages."""

from collections.abc import Callable
from math import ceil, floor, log2
from typing import NamedTuple

from ganscale.errors import UserError

_SMALLEST, _LARGEST = 16, 1024  # sides of images
_GRID = 4  # the shorter side of the lowest resolution has 4 to 7 pixels


class ImageShape(NamedTuple):
    """Images as convolutional networks make them: a map of `grid` pixels, (height, width), whose
    sides are doubled `doublings` times, so there are `doublings + 1` resolutions.

    64x64 pixels are a grid of 4x4 and 4 doublings, 256x512 are 4x8 and 6, 192x256 are 6x8 and 5.
    """

    channels: int
    grid: tuple[int, int]
    doublings: int

    def __str__(self) -> str:
        """Of the whole image: 64x64."""
        return _shown(*(side << self.doublings for side in self.grid))


def image_shape(sample_shape: tuple[int, ...], network: str) -> ImageShape:
    """How a network named `network` makes samples of the shape `(channels, height, width)`.

    Both sides are halved as long as the shorter one keeps at least 4 pixels. Raises UserError
    unless they are from 16 to 1024 pixels and all their halves are whole.
    """
    if len(sample_shape) != 3:
        raise UserError(
            f"{network} is for images of shape (channels, height, width), not for samples of shape "
            f"{tuple(sample_shape)}: use mlp"
        )
    channels, height, width = sample_shape
    if not _is_possible((height, width)):
        raise UserError(
            f"{network} has no layers for {_shown(height, width)} images: resize them to "
            + " or ".join(_shown(*size) for size in _nearest_sizes(height, width))
        )
    doublings = _doublings(height, width)
    return ImageShape(channels, (height >> doublings, width >> doublings), doublings)


def _doublings(height: int, width: int) -> int:
    return (min(height, width) // _GRID).bit_length() - 1


def _is_possible(size: tuple[int, int]) -> bool:
    step = 1 << max(0, _doublings(*size))
    return _SMALLEST <= min(size) <= max(size) <= _LARGEST and all(n % step == 0 for n in size)


def _nearest_sizes(height: float, width: float) -> list[tuple[int, int]]:
    """One or two possible sizes near this one, or near it shrunk to the largest, in ascending
    order."""
    shrink = min(1.0, _LARGEST / max(height, width))
    height, width = height * shrink, width * shrink
    steps = [1 << doublings for doublings in range(_doublings(_LARGEST, _LARGEST) + 1)]
    sizes = {
        (_multiple(round_, height, step), _multiple(round_, width, step))
        for step in steps
        for round_ in (floor, ceil)
    }
    possible = filter(_is_possible, sizes)
    nearest = sorted(possible, key=lambda n: abs(log2(n[0] / height)) + abs(log2(n[1] / width)))
    return sorted(nearest[:2])


def _multiple(round_: Callable[[float], int], side: float, step: int) -> int:
    return min(max(round_(side / step), _GRID) * step, _LARGEST)


def _shown(height: int, width: int) -> str:
    return f"{height}x{width}"


def require_positive(network: str, **sizes: object) -> None:
    """Raises UserError for a size that is not a whole number above zero."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{name} of {network} must be a whole number above 0, not {size!r}")


def require_unconditional(num_classes: int, network: str) -> None:
    """Raises UserError if a network that ignores labels is asked to use them."""
    if num_classes > 0:
        raise UserError(
            f"{network} cannot use the labels of {num_classes} classes: use resnet, r3gan or "
            "stylegan2, or train without labels"
        )


def doubling_widths(network: str, width: int, max_width: int | None, stages: int) -> list[int]:
    """Channels of each stage, from the highest resolution down: they double up to `max_width`,
    or stay the same without one. Raises UserError unless both widths are positive."""
    max_width = width if max_width is None else max_width
    require_positive(network, width=width, max_width=max_width)
    return [min(width * 2**stage, max_width) for stage in range(stages)]


def stage_widths(network: str, widths: int | list[int], shape: ImageShape) -> list[int]:
    """Channels of each stage, from the lowest resolution up: `widths`, or the same one for all.
    Raises UserError unless they are positive and as many as there are stages."""
    stages = shape.doublings + 1
    listed = list(widths) if isinstance(widths, list | tuple) else [widths] * stages
    for width in listed:
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UserError(
                f"widths of {network} must be a whole number above 0, or a list of them, not "
                f"{width!r}"
            )
    if len(listed) != stages:
        raise UserError(
            f"widths of {network} has {len(listed)} numbers, but {shape} images need {stages}, one "
            f"for each resolution from {_shown(*shape.grid)} pixels up"
        )
    return listed


def require_stages(network: str, bfloat16_stages: object, stages: int) -> None:
    """Raises UserError unless this is a number of stages, from none to all of them."""
    chosen = bfloat16_stages
    if not isinstance(chosen, int) or isinstance(chosen, bool) or not 0 <= chosen <= stages:
        raise UserError(
            f"bfloat16_stages of {network} must be a whole number from 0 to {stages}, the number "
            f"of stages, not {chosen!r}"
        )
