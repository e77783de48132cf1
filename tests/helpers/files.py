"""What lies in a folder."""

from pathlib import Path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The content of each file, by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
