"""Atomic files and folders, flushing, checksums, and locks between processes."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from ganscale.errors import UserError

UNFINISHED = ".unfinished-"  # begins the name of a folder until it is complete


@contextmanager
def atomic_write(path: Path, *, is_private: bool = False) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` at once, flushed to disk, if the block succeeds.

    is_private: only its owner may read it
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            if is_private:
                os.fchmod(file.fileno(), 0o600)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, is_private: bool = False) -> None:
    """Replaces a small file at once: readers see the old or the new one."""
    with atomic_write(path, is_private=is_private) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes an empty folder that is renamed to `path` if the block succeeds, else deleted."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_MISTAKES = {
    errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def is_users_mistake(error: OSError) -> bool:
    """Whether the path or its permissions are wrong, and trying again later would not help."""
    return error.errno in _MISTAKES


def with_home(path: Path | str) -> Path:
    """The path with the user's home folder in place of `~`. Raises UserError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path} begins with ~, but no home folder is known here: set HOME, or name the folder"
        ) from None


def file_within(folder: Path, name: str) -> Path:
    """The path of a regular file in `folder` or below. Raises ValueError for one that lies
    elsewhere, also behind a link."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{name} is not a file in {folder}")
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def lock_descriptor(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file against other processes until it is closed or this process ends.

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


class FileLock(AbstractContextManager["FileLock"]):
    """An exclusive lock between processes, on a file that is created if need be and stays; the end
    of a `with` block closes it. Raises OSError for a file that cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def acquire(self, timeout_seconds: float = 0.0, poll_seconds: float = 0.005) -> bool:
        """Takes the lock; False if it did not become free within `timeout_seconds`. Raises OSError
        on a file system without locks."""
        deadline = time.monotonic() + timeout_seconds
        while not lock_descriptor(self._descriptor):
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_seconds)
        return True

    def close(self) -> None:
        """Releases the lock."""
        os.close(self._descriptor)

    def __exit__(self, *_: object) -> None:
        self.close()
