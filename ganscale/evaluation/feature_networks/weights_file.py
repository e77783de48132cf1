"""A file of weights, verified by its SHA-256: from this machine, or fetched once for all ranks."""

import errno
import hashlib
import shutil
from pathlib import Path
from typing import BinaryIO

from ganscale.data.remote import objects
from ganscale.data.remote.cache_files import StallTimer
from ganscale.errors import UserError
from ganscale.files import FileLock, atomic_write, with_home

_FOLDER = "feature_networks"
_PIECE_BYTES = 1 << 20
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def read_weights(location: str, sha256: str, cache: Path, retry_seconds: float) -> bytes:
    """The content of the file at a path or an address. The returned bytes themselves are
    verified, not a file that could change in between, because they may be executed.

    cache: a file from an address is kept in the sub-folder `feature_networks`
    Raises UserError for a file that is missing or another one, and for a cache that is full or
    cannot be written; UnavailableError when the network fails for `retry_seconds`.
    """
    if objects.is_remote(location):
        return _Copy(location, sha256, cache).read(retry_seconds)
    path = with_home(location.removeprefix("file://"))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    _verify(str(path), hashlib.sha256(content).hexdigest(), sha256)
    return content


class _Copy:
    """A remote file's copy, named by its checksum."""

    def __init__(self, address: str, sha256: str, cache: Path) -> None:
        self._address, self._sha256, self._cache = address, sha256, cache
        self._folder = with_home(cache) / _FOLDER
        self._path = self._folder / sha256

    def read(self, retry_seconds: float) -> bytes:
        if (content := self._content()) is not None:
            return content
        timer = StallTimer(retry_seconds + 2 * objects.STALL_SECONDS)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / f"{self._sha256}.lock") as lock:
                while not lock.acquire():
                    timer.wait(self._folder, objects.shown(self._address))
                if (content := self._content()) is None:
                    self._fetch(retry_seconds)
                    content = self._path.read_bytes()
        except OSError as error:
            if error.errno in FULL_DISK:
                raise self._no_space() from error
            raise UserError(
                f"data.cache={self._cache} cannot be written ({error.strerror}): name a folder on "
                "a disk of this machine"
            ) from error
        return content

    def _content(self) -> bytes | None:
        """None without a whole copy."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == self._sha256 else None

    def _fetch(self, retry_seconds: float) -> None:
        for partial in self._folder.glob(f".{self._sha256}.*"):
            partial.unlink()  # of a process that was killed: this one has the lock
        with (
            objects.RemoteObject(self._address, retry_seconds) as source,
            atomic_write(self._path) as file,
        ):
            if source.size is not None and source.size > shutil.disk_usage(self._folder).free:
                raise self._no_space(f" for its {source.size:,} bytes")
            found = _copy(source, file)
            _verify(objects.shown(self._address), found, self._sha256)

    def _no_space(self, need: str = "") -> UserError:
        return UserError(
            f"no space in data.cache={self._cache} for {objects.shown(self._address)}: the disk is "
            f"full{need}"
        )


def _copy(source: objects.RemoteObject, file: BinaryIO) -> str:
    """The checksum of what was copied."""
    digest = hashlib.sha256()
    while piece := source.read(_PIECE_BYTES):
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _verify(shown: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{shown} is damaged or another file: its SHA-256 is {found}, not {expected}; if it is "
            "the one that you want, and you trust it, set that as the option sha256"
        )
