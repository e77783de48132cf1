"""What to do where a data set was expected and there is no manifest."""

import os
from itertools import chain, islice
from pathlib import Path

from ganscale.data.labels import CONVERTED_EXTENSIONS, IMAGE_EXTENSIONS

_MOST_FILES = 1000  # that are looked at: a folder may have millions
_IMAGES = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *CONVERTED_EXTENSIONS))


def how_to_make_a_data_set(where: str, path: Path) -> str:
    """The command that makes a data set of what is at `path`, which the user knows as `where`."""
    if _holds_images(path):
        return (
            f"make a data set of its images with: ganscale shards write {where} OUTPUT, and use "
            "OUTPUT"
        )
    return f"make one with: ganscale shards index {where}"


def _holds_images(path: Path) -> bool:
    """Whether it is a zip, or a folder with images and without shards."""
    if path.suffix.lower() == ".zip":
        return path.is_file()
    if not path.is_dir() or any(path.glob("*.tar")):
        return False
    names = chain.from_iterable(files for _, _, files in os.walk(path))
    return any(name.lower().endswith(_IMAGES) for name in islice(names, _MOST_FILES))
