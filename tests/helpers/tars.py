"""Tar shards, written by the standard library, and damage done to files."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.helpers.images import png

Members = list[tuple[str, bytes]]
"""(name, content) of each member."""


def tar_bytes(members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, tar_format))
    return path


def labelled(count: int, first: int = 0) -> Members:
    """An image and a class of 0, 1, 2 for each sample, named by its number."""
    return [
        member
        for i in range(first, first + count)
        for member in ((f"{i:05d}.png", png(i)), (f"{i:05d}.cls", str(i % 3).encode()))
    ]


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
