"""Sample grids over time, small enough for a page."""

import base64
import io
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ganscale.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Frames of one kind on a page, shared by its runs: of the EMA generator, and of other kinds.
_FRAMES, _FEWEST_FRAMES = 32, 6
_OTHER_FRAMES, _FEWEST_OTHER_FRAMES = 12, 3
_LONGEST_SIDE = 640  # pixels
_QUALITY = 85  # of WebP: 22 kB for 64 digits of 32 pixels, a PNG takes 50

_TITLES = {
    "ema": "EMA generator",
    "non_ema": "Non-EMA weights",
    "real": "Real images",
    "interpolation": "Interpolation between latents",
}


@dataclass(frozen=True)
class Frame:
    """One sample grid; `address` is a data URL. `images_seen` is None for real images."""

    images_seen: int | None
    width: int
    height: int
    address: str


@dataclass(frozen=True)
class GridSeries:
    """The grids of one kind and run in order of images seen, and how many there are in all."""

    frames: list[Frame]
    total: int
    damaged: int


def title_of_kind(kind: str) -> str:
    return _TITLES.get(kind, kind.replace("_", " ").replace("-", " ").capitalize())


def order_of_kinds(kinds: Iterable[str]) -> list[str]:
    """Each kind once; the kinds that training makes come first."""
    known = list(_TITLES)
    return sorted(
        set(kinds), key=lambda kind: (known.index(kind) if kind in known else len(known), kind)
    )


def read_grids(folder: RunFolder, runs: int) -> dict[str, GridSeries]:
    """The sample grids of a run by kind, for a page of `runs` runs.

    Of many grids, the first, the last and evenly spaced ones are kept.
    """
    files: dict[str, list[tuple[int | None, Path]]] = {}
    for kind, images_seen, path in folder.sample_files():
        files.setdefault(kind, []).append((images_seen, path))
    return {kind: _series(files[kind], _most_frames(kind, runs)) for kind in order_of_kinds(files)}


def _most_frames(kind: str, runs: int) -> int:
    if kind == "ema":
        return max(_FEWEST_FRAMES, _FRAMES // runs)
    return max(_FEWEST_OTHER_FRAMES, _OTHER_FRAMES // runs)


def _series(files: list[tuple[int | None, Path]], most: int) -> GridSeries:
    files.sort(key=lambda file: (-1 if file[0] is None else file[0], file[1]))
    chosen = files
    if len(files) > most:
        chosen = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    frames = [_frame(images_seen, path) for images_seen, path in chosen]
    readable = [frame for frame in frames if frame is not None]
    return GridSeries(readable, len(files), len(frames) - len(readable))


def _frame(images_seen: int | None, path: Path) -> Frame | None:
    """None for a file that is damaged, half written or far too large."""
    encoded = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        logger.warning("%s is left out of the report: %s", path, error)
        return None
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    image.save(encoded, "WEBP", quality=_QUALITY, method=4, use_sharp_yuv=True)
    address = "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
    return Frame(images_seen, image.width, image.height, address)
