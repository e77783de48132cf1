"""The files in the folder of a shard cache, and the locks that show which are in use.

`NAME.tar` is a whole copy; each reader has a shared lock on it. `NAME.BYTES.partial` will have
BYTES and is being fetched by the process that has an exclusive lock on it. The system drops the
locks of a process that is killed.
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


class OpenShard:
    """A descriptor of a shard's file, closed with the last reference to this object: a thread can
    still read what another one drops."""

    def __init__(self, path: Path | str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True)
class CacheFile:
    """A file of the folder. reserved: its bytes when it is whole; used_at: in seconds."""

    path: Path
    bytes: int
    reserved: int
    is_whole: bool
    used_at: float


def list_cache(folder: Path) -> Iterator[CacheFile]:
    """All copies, whole and partial."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status, path = entry.stat(), Path(entry.path)
                size, is_whole = status.st_size, path.suffix == ".tar"
                if is_whole or path.suffix == ".partial":
                    stated = path.stem.rpartition(".")[2]
                    reserved = int(stated) if stated.isdigit() and not is_whole else 0
                    yield CacheFile(path, size, max(reserved, size), is_whole, status.st_mtime)


def evict(path: Path) -> bool:
    """Removes a copy that nobody reads or fetches; whether it is gone."""
    try:
        descriptor = open_locked(path)
    except PermissionError:
        return False
    if descriptor is None:
        return not path.exists()
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return True


def open_locked(path: Path) -> int | None:
    """An exclusively locked descriptor, or None if there is no such file or it is in use."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if lock_descriptor(descriptor) and is_at(descriptor, path):  # else it was renamed meanwhile
        return descriptor
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class StallTimer:
    """Waits for other processes, until nothing in the folder has changed for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._files: list[tuple[str, int]] | None = None
        self._changed_at = 0.0

    def wait(self, folder: Path, url: str) -> None:
        """Waits for a moment. Raises UnavailableError when others have stalled."""
        files = sorted((file.path.name, file.bytes) for file in list_cache(folder))
        now = time.monotonic()
        if files != self._files:
            self._files, self._changed_at = files, now
        if now - self._changed_at > self._seconds:
            raise UnavailableError(
                f"{url} cannot be fetched: another process holds it, or all space in {folder}, and "
                f"has made no progress for {self._seconds:.0f} s"
            )
        time.sleep(_POLL_SECONDS)
