"""The height and width of images in settings: one number for square images, or both."""

from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    Resolution = int | list[int]
else:  # OmegaConf has no union with a list; ganscale.config_schedules checks these values
    Resolution = Annotated[Any, "a number, or [height, width]"]


def height_and_width(resolution: Resolution) -> tuple[int, int]:
    """In pixels."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return height, width


def as_resolution(height: int, width: int) -> Resolution:
    """As a setting: the same for the same size, so that settings can be compared."""
    return height if height == width else [height, width]
