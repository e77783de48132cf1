"""What W&B takes for the values of a row: its own histograms and pictures, by the real client."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PICTURES = "samples/"
"""Rows hold pictures as paths in the run folder, under names that begin so."""

_MAX_SIDE = 2048
"""Of a picture, in pixels: a browser shows no more of it, and JPEG ends at 65,535."""

logger = logging.getLogger(__name__)


class WandbValues:
    """Turns rows into what W&B takes. A value that it cannot take is left out, and told of once:
    it must not hold up the rows after it."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._has_told = False

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, value in row.items():
            try:
                values[name] = self._value(name, value)
            except Exception as error:
                if not self._has_told:
                    logger.warning(
                        "W&B lacks %s, and what else it cannot take (%s: %s)",
                        name,
                        type(error).__name__,
                        error,
                    )
                self._has_told = True
        return values

    def _value(self, name: str, value: Any) -> Any:
        import wandb

        if isinstance(value, dict):
            return wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
        if isinstance(value, str) and name.startswith(PICTURES):
            return self._picture(self._folder / value)
        return value

    def _picture(self, file: Path) -> Any:
        import wandb
        from PIL import Image

        with _pictures_of_any_size(), Image.open(file) as picture:
            is_large = max(picture.size) > _MAX_SIDE
            if file.suffix == ".jpg" and not is_large:
                return wandb.Image(str(file))
            if is_large:
                picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
            return wandb.Image(picture.convert("RGB"), file_type="jpg")


@contextlib.contextmanager
def _pictures_of_any_size() -> Iterator[None]:
    """Pillow takes a large grid for an attack; these pictures are the run's own."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
