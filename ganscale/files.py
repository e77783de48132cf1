"""Files that are written whole or not at all, and locks between processes."""

import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, on disk and as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file at once: readers see the old or the new one."""
    with atomic_write(path) as file:
        file.write(text.encode())


def lock_descriptor(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file against other processes until it is closed; the system also drops the lock
    of a process that is killed.

    shared: other shared locks are allowed at the same time
    wait: until the lock is free; else the result is False if another process holds it

    Raises OSError on a file system without locks.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FileLock:
    """An exclusive lock between processes, on a file that is created if need be and stays.

    `with FileLock(path) as lock:` closes it at the end; `acquire` takes the lock. Raises OSError
    for a file that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def acquire(self, timeout_seconds: float = 0.0, poll_seconds: float = 0.005) -> bool:
        """Whether the lock was free, or became free within `timeout_seconds` (math.inf: waits).

        Raises OSError on a file system without locks.
        """
        deadline = time.monotonic() + timeout_seconds
        while not lock_descriptor(self._descriptor):
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_seconds)
        return True

    def close(self) -> None:
        """Releases the lock."""
        os.close(self._descriptor)

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Writes a new safetensors file of CPU tensors that are contiguous and share no memory.

    Raises OSError with the number that the system gave.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by one that only its owner may read
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(str(error)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)
