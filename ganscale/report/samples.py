"""Sample grids over time, small enough for a page."""

import base64
import io
import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(?P<kind>.+?)(?:-(?P<images_seen>\d{1,15}))?\.(?:png|jpe?g|webp)", re.I)
# Of one kind on a page, shared by its runs: the averaged generator's, and others.
_FRAMES, _FEWEST_FRAMES = 32, 6
_OTHER_FRAMES, _FEWEST_OTHER_FRAMES = 12, 3
_LONGEST_SIDE = 640  # pixels
_QUALITY = 85  # of WebP: 22 kB for 64 digits of 32 pixels, a PNG takes 50

_AVERAGE = "images"
_TITLES = {
    _AVERAGE: "Averaged generator",
    "non_ema": "Weights as trained",
    "real": "Real images",
    "interpolation": "From one latent to another",
}


@dataclass(frozen=True)
class Frame:
    """One picture: its address is its own content. `images_seen` is None for one without time."""

    images_seen: int | None
    width: int
    height: int
    address: str


@dataclass(frozen=True)
class Strip:
    """The pictures of one kind and run in the order of time, and how many there are in all."""

    frames: list[Frame]
    total: int
    damaged: int


def title_of_kind(kind: str) -> str:
    return _TITLES.get(kind, kind.replace("_", " ").replace("-", " ").capitalize())


def order_of_kinds(kinds: Iterable[str]) -> list[str]:
    """Each kind once, those that training makes first."""
    known = list(_TITLES)
    return sorted(
        set(kinds), key=lambda kind: (known.index(kind) if kind in known else len(known), kind)
    )


def read_strips(folder: Path, runs: int) -> dict[str, Strip]:
    """The strips of a run's `samples` folder by kind, which is the file's name before its number.

    Of many pictures those evenly spaced in number stay, with the first and the last.
    """
    files: dict[str, list[tuple[int | None, Path]]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if (match := _FILE.fullmatch(path.name)) is not None and path.is_file():
                number = match["images_seen"]
                place = (None if number is None else int(number), path)
                files.setdefault(match["kind"].lower(), []).append(place)
    return {kind: _strip(files[kind], _most_frames(kind, runs)) for kind in order_of_kinds(files)}


def _most_frames(kind: str, runs: int) -> int:
    if kind == _AVERAGE:
        return max(_FEWEST_FRAMES, _FRAMES // runs)
    return max(_FEWEST_OTHER_FRAMES, _OTHER_FRAMES // runs)


def _strip(files: list[tuple[int | None, Path]], most: int) -> Strip:
    files.sort(key=lambda file: (-1 if file[0] is None else file[0], file[1]))
    chosen = files
    if len(files) > most:
        chosen = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    frames = [_frame(images_seen, path) for images_seen, path in chosen]
    whole = [frame for frame in frames if frame is not None]
    return Strip(whole, len(files), len(frames) - len(whole))


def _frame(images_seen: int | None, path: Path) -> Frame | None:
    """None for a file that is no whole picture: half written, damaged, or far too large."""
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
