"""Converts the values of a row to the client's types: histograms and images."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SAMPLES = "samples/"
"""Names with this prefix have the path of an image in the run folder as their value."""

_MAX_SIDE = 2048  # pixels; a browser shows no more, and JPEG ends at 65,535

logger = logging.getLogger(__name__)


class WandbValues:
    """Converts rows for W&B. A value that it cannot take must not hold up later rows: it is left
    out, with a warning for the first."""

    def __init__(self, folder: Path) -> None:
        """folder: that the paths of images are relative to"""
        self._folder = folder
        self._has_warned = False

    def convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, value in row.items():
            try:
                values[name] = self._convert_value(name, value)
            except Exception as error:
                if not self._has_warned:
                    logger.warning(
                        "W&B cannot take %s (%s: %s); it gets the rows without such values",
                        name,
                        type(error).__name__,
                        error,
                    )
                self._has_warned = True
        return values

    def _convert_value(self, name: str, value: Any) -> Any:
        import wandb

        if isinstance(value, dict):
            return wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
        if isinstance(value, str) and name.startswith(SAMPLES):
            return self._image(self._folder / value)
        return value

    def _image(self, path: Path) -> Any:
        import wandb
        from PIL import Image

        with _without_size_limit(), Image.open(path) as image:
            is_large = max(image.size) > _MAX_SIDE
            if path.suffix == ".jpg" and not is_large:
                return wandb.Image(str(path))
            if is_large:
                image.thumbnail((_MAX_SIDE, _MAX_SIDE))
            return wandb.Image(image.convert("RGB"), file_type="jpg")


@contextlib.contextmanager
def _without_size_limit() -> Iterator[None]:
    """Pillow refuses large grids as decompression bombs, but these images are the run's own."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
