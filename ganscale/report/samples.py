"""Sample grids over time, small enough for a page."""

import base64
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ganscale.files import file_within
from ganscale.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Frames of one kind on a page, shared by its runs, and the fewest of a run.
_EMA_FRAMES, _OTHER_FRAMES = (32, 6), (12, 3)
_LONGEST_SIDE = 640  # pixels
_QUALITY = 85  # of WebP: 22 kB for 64 digits of 32 pixels, a PNG takes 50

KIND_TITLES = {
    "ema": "EMA generator",
    "non_ema": "Non-EMA weights",
    "real": "Real images",
    "interpolation": "Interpolation between latents",
}
"""Of the kinds that training makes, in the order of the page."""


@dataclass(frozen=True)
class Frame:
    """One sample grid; `address` is a data URL. `images_seen` is None for real images."""

    images_seen: int | None
    width: int
    height: int
    address: str


@dataclass(frozen=True)
class GridSeries:
    """The grids of one kind and run in order of images seen, how many there are in all, and how
    many of those chosen cannot be shown."""

    frames: list[Frame]
    total: int
    left_out: int


def title_of_kind(kind: str) -> str:
    return KIND_TITLES.get(kind, kind.replace("_", " ").replace("-", " ").capitalize())


def read_grids(folder: RunFolder, runs: int) -> dict[str, GridSeries]:
    """The sample grids of a run by kind, for a page of `runs` runs.

    Of many grids, the first, the last and evenly spaced ones are kept.
    """
    files: dict[str, list[tuple[int | None, Path]]] = {}
    for kind, images_seen, path in folder.sample_files():
        files.setdefault(kind, []).append((images_seen, path))
    series = {}
    for kind, files_of_kind in files.items():
        shared, fewest = _EMA_FRAMES if kind == "ema" else _OTHER_FRAMES
        series[kind] = _series(files_of_kind, max(fewest, shared // runs))
    return series


def _series(files: list[tuple[int | None, Path]], most: int) -> GridSeries:
    files.sort(key=lambda file: (-1 if file[0] is None else file[0], file[1]))
    chosen = files
    if len(files) > most:
        chosen = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    frames = [frame for file in chosen if (frame := _frame(*file)) is not None]
    return GridSeries(frames, len(files), len(chosen) - len(frames))


def _frame(images_seen: int | None, path: Path) -> Frame | None:
    """None for a file that is damaged, half written, far too large, or a link to elsewhere."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            inside = file_within(path.parent, path.name)
            with Image.open(inside, formats=("PNG", "JPEG", "WEBP")) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        logger.warning("%s is left out of the report: %s", path, error)
        return None
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=_QUALITY, method=4, use_sharp_yuv=True)
    address = "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
    return Frame(images_seen, image.width, image.height, address)
