"""Checks of the sizes that a config gives a network, and the widths of its stages."""

from ganscale.errors import UserError

RESOLUTIONS = (16, 32, 64, 128, 256)


def image_shape(
    sample_shape: tuple[int, ...], network: str, resolutions: tuple[int, ...] = RESOLUTIONS
) -> tuple[int, int]:
    """Channels and resolution of a `(channels, height, width)` sample shape.

    Raises UserError unless the image is square with a side in `resolutions`.
    """
    if len(sample_shape) != 3:
        raise UserError(
            f"{network} is for images of shape (channels, height, width), not for samples of shape "
            f"{tuple(sample_shape)}: use mlp"
        )
    channels, height, width = sample_shape
    if height != width or height not in resolutions:
        nearest = sorted(resolutions, key=lambda valid: abs(valid - max(height, width)))[:2]
        raise UserError(
            f"{network} has no layers for {height}x{width} images: resize them to "
            + " or ".join(f"{side}x{side}" for side in sorted(nearest))
        )
    return channels, height


def require_positive(network: str, **sizes: object) -> None:
    """Raises UserError for a size that is not a whole number above zero."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{name} of {network} must be a whole number above 0, not {size!r}")


def require_unconditional(num_classes: int, network: str) -> None:
    """Raises UserError if a network that ignores labels is asked to use them."""
    if num_classes > 0:
        raise UserError(
            f"{network} cannot use the labels of {num_classes} classes: use resnet or r3gan, or "
            "train without labels"
        )


def doubling_widths(network: str, width: int, max_width: int | None, stages: int) -> list[int]:
    """Channels of each stage, from the highest resolution down: they double up to `max_width`,
    or stay the same without one. Raises UserError unless both widths are positive."""
    max_width = width if max_width is None else max_width
    require_positive(network, width=width, max_width=max_width)
    return [min(width * 2**stage, max_width) for stage in range(stages)]


def stage_widths(network: str, widths: int | list[int], resolution: int) -> list[int]:
    """Channels of each stage, from 4x4 pixels up to the resolution: `widths`, or the same one for
    all. Raises UserError unless they are positive and as many as there are stages."""
    stages = resolution.bit_length() - 2
    listed = list(widths) if isinstance(widths, list | tuple) else [widths] * stages
    for width in listed:
        require_positive(network, widths=width)
    if len(listed) != stages:
        raise UserError(
            f"widths of {network} has {len(listed)} numbers, but {resolution}x{resolution} images "
            f"need {stages}, one for each resolution from 4x4 pixels up"
        )
    return listed
