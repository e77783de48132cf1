"""The files in the folder of a shard cache, and the locks that tell who uses them.

`NAME.tar` is a whole copy, with a shared lock for each reader; `NAME.BYTES.partial` will have BYTES
and is being fetched by whoever has an exclusive lock on it. The locks of a process that is killed
are dropped by the system.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ganscale.errors import UnavailableError
from ganscale.files import lock_descriptor

_POLL_SECONDS = 0.05


class CachedShard:
    """An open copy; while someone holds this object it is not evicted."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class CacheFile:
    """A file as it was found: `reserved`, its bytes when it is whole; `used_at`, in seconds."""

    path: Path
    bytes: int
    reserved: int
    is_whole: bool
    used_at: float


def cache_files_in(folder: Path) -> Iterator[CacheFile]:
    """All copies, whole and partial."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found = entry.stat()
                if entry.name.endswith(".tar"):
                    size = found.st_size
                    yield CacheFile(Path(entry.path), size, size, True, found.st_mtime)
                elif entry.name.endswith(".partial"):
                    stated = entry.name.split(".")[-2]
                    reserved = max(int(stated) if stated.isdigit() else 0, found.st_size)
                    yield CacheFile(Path(entry.path), found.st_size, reserved, False, found.st_mtime)


def evict(path: Path) -> bool:
    """Removes a copy that nobody reads or fetches; whether it is gone."""
    try:
        descriptor = locked_or_none(path)
    except PermissionError:
        return False
    if descriptor is None:
        return not path.exists()
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


def locked_or_none(path: Path) -> int | None:
    """An exclusively locked descriptor, or None if there is no such file or another has a lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if lock_descriptor(descriptor) and is_at(descriptor, path):  # else it was renamed meanwhile
        return descriptor
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is what the path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class StallTimer:
    """Gives up on other processes when nothing in the folder changes for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._state: object = None
        self._since = time.monotonic()

    def wait(self, folder: Path, url: str) -> None:
        state = sorted((copy.path.name, copy.bytes) for copy in cache_files_in(folder))
        now = time.monotonic()
        if state != self._state:
            self._state, self._since = state, now
        if now - self._since > self._seconds:
            raise UnavailableError(
                f"{url} is not fetched: another process holds it, or all room in {folder}, and "
                f"did nothing for {self._seconds:.0f} s"
            )
        time.sleep(_POLL_SECONDS)
