"""Copies of remote shards on a disk of this machine, shared by its ranks and by other runs.

A copy is named by the SHA-256 of its contents, so data sets that share shards share copies. It is
fetched as a partial (`cache_files`), and renamed once it is verified. A process that is killed
leaves a partial without a lock, which the next one completes or removes.
"""

import errno
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from pathlib import Path

from ganscale.data.manifest import Shard
from ganscale.data.remote import cache_files, objects
from ganscale.data.remote.cache_files import OpenShard, StallTimer, evict, list_cache
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import UnavailableError, UserError
from ganscale.files import FileLock, lock_descriptor, with_home

_PREFETCHING_THREADS = 4
_PIECE_BYTES = 1 << 20
_TOUCH_SECONDS = 1.0  # how exact the age of a copy is
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardCache:
    """Fetches shards whole, also ahead of need, for any number of threads and processes.

    folder: the copies are in its sub-folder `shards`
    capacity_bytes: of all copies, also partial ones; the least recently used are evicted
    """

    def __init__(
        self,
        folder: Path | str,
        capacity_bytes: int,
        retry_seconds: float,
        *,
        stall_seconds: float = objects.STALL_SECONDS,
    ) -> None:
        self.folder = with_home(folder) / "shards"
        self.capacity_bytes = capacity_bytes
        self.retry_seconds, self.stall_seconds = retry_seconds, stall_seconds
        # How long other processes may make no progress.
        self._stall_timeout = retry_seconds + 2 * stall_seconds
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._folder_lock():
                pass
        except OSError as error:
            raise UserError(
                f"data.cache={folder} cannot be written ({error.strerror}): name a folder on a "
                "disk of this machine"
            ) from error
        self._lock = threading.Lock()
        self._fetching: dict[Path, Future[None]] = {}
        self._queued: set[Path] = set()  # to be fetched ahead
        self._threads: DaemonThreadPool | None = None
        self._is_closed = False

    def open(self, url: str, shard: Shard) -> OpenShard:
        """The copy of a shard, fetched from `url` first if need be. Raises UserError for a shard
        that is missing or has changed since it was indexed, and for a cache without space for it;
        UnavailableError when the network fails for `retry_seconds`."""
        path = self._path(url, shard)
        while (copy := self._open_copy(path, shard)) is None:
            with self._lock:
                self._queued.discard(path)
            self._fetch_or_wait(url, shard, path)
        return copy

    def prefetch(self, shards: Iterable[tuple[str, Shard]]) -> None:
        """Starts to fetch (url, shard) in this order, in a few threads. Errors are left to `open`,
        which tries again."""
        for url, shard in shards:
            path = self._path(url, shard)
            if path.exists():
                continue
            with self._lock:
                if self._is_closed or path in self._queued or path in self._fetching:
                    continue
                self._queued.add(path)
                self._threads = self._threads or DaemonThreadPool(_PREFETCHING_THREADS, "prefetch")
                self._threads.submit(lambda job=(url, shard, path): self._prefetch(*job))

    def close(self, seconds: float = 5.0) -> None:
        """Ends prefetching within that time; copies stay, also partial ones."""
        with self._lock:
            self._is_closed = True
            self._queued.clear()
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.close(seconds)

    def _path(self, url: str, shard: Shard) -> Path:
        place = f"{shard.bytes} {url}".encode("utf-8", "surrogateescape")
        name = shard.sha256 or hashlib.sha256(place).hexdigest()
        return self.folder / f"{name}.tar"

    def _prefetch(self, url: str, shard: Shard, path: Path) -> None:
        with self._lock:
            if path not in self._queued:
                return
        with suppress(UserError, UnavailableError, OSError, CancelledError):
            if not path.exists():
                self._fetch_or_wait(url, shard, path)
        with self._lock:
            self._queued.discard(path)

    def _open_copy(self, path: Path, shard: Shard) -> OpenShard | None:
        """The copy, locked against eviction, or None; one of a wrong size is removed."""
        try:
            copy = OpenShard(path)
        except FileNotFoundError:
            return None
        lock_descriptor(copy.descriptor, shared=True, wait=True)
        status = os.fstat(copy.descriptor)
        if status.st_nlink == 0:  # evicted meanwhile
            return None
        if status.st_size != shard.bytes:
            with self._folder_lock():
                if cache_files.is_at(copy.descriptor, path):
                    path.unlink()
            return None
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            with suppress(PermissionError):  # another user's copy
                os.utime(copy.descriptor)
        return copy

    def _fetch_or_wait(self, url: str, shard: Shard, path: Path) -> None:
        """Fetches the copy, or waits for the thread or process that does."""
        with self._lock:
            other = self._fetching.get(path)
            fetch = self._fetching.setdefault(path, Future())
        if other is not None:
            other.result()
            return
        try:
            self._fetch(url, shard, path)
            fetch.set_result(None)
        except BaseException as error:
            fetch.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._fetching[path]

    def _fetch(self, url: str, shard: Shard, copy: Path) -> None:
        """Fetches the copy, unless another process does, which is waited for then."""
        partial = copy.with_suffix(f".{shard.bytes}.partial")
        timer = StallTimer(self._stall_timeout)
        while not copy.exists():
            descriptor = self._open_partial(copy, partial, shard)
            if descriptor is None:
                timer.wait(self.folder, objects.shown(url))
                continue
            try:
                try:
                    self._download(url, shard, partial, descriptor)
                except objects.ObjectChanged:  # once more, from the start
                    os.ftruncate(descriptor, 0)
                    self._download(url, shard, partial, descriptor)
                os.fsync(descriptor)
                partial.replace(copy)
            except OSError as error:
                raise UserError(
                    f"data.cache={self.folder.parent} cannot be written: {error.strerror}"
                ) from error
            except objects.ObjectChanged:
                partial.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)

    def _open_partial(self, copy: Path, partial: Path, shard: Shard) -> int | None:
        """The partial, locked, with space for all of it; None while another process has it, or
        while there is not enough space beside what others fetch."""
        with self._folder_lock():
            descriptor = cache_files.open_locked(partial)
            if descriptor is not None:
                return descriptor  # left behind: its space has been reserved all along
            # In this order: a partial may just have been renamed.
            if partial.exists() or copy.exists() or not self._make_space(shard):
                return None
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            lock_descriptor(descriptor, wait=True)
            return descriptor

    def _make_space(self, shard: Shard) -> bool:
        """Evicts until the shard fits, with the folder locked; False if others have to finish
        first. Raises UserError when it can never fit."""
        if shard.bytes > self.capacity_bytes:
            raise self._no_space(shard, f"data.cache_gib={self.capacity_bytes / 2**30:.4g} is less")
        files = sorted(list_cache(self.folder), key=lambda file: (file.is_whole, file.used_at))
        used = sum(file.reserved for file in files)
        free = shutil.disk_usage(self.folder).free
        free -= sum(file.reserved - file.bytes for file in files)  # still to be fetched
        missing = shard.bytes - min(self.capacity_bytes - used, free)
        is_in_use = False
        for file in files:
            if missing > 0 and evict(file.path):
                missing -= file.reserved
            elif missing > 0:
                is_in_use = True
        if missing > 0 and not is_in_use:
            problem = f"the disk has {max(0, shard.bytes - missing):,} bytes left, without any copy"
            raise self._no_space(shard, problem)
        return missing <= 0

    def _no_space(self, shard: Shard, problem: str) -> UserError:
        need = math.ceil(shard.bytes / 2**30 * 1000) / 1000
        return UserError(
            f"no space in data.cache={self.folder.parent} for the shard {shard.name} of "
            f"{shard.bytes:,} bytes: {problem}; it needs data.cache_gib={need:g} or more, on a "
            "disk with as much space"
        )

    def _download(self, url: str, shard: Shard, partial: Path, descriptor: int) -> None:
        """Completes the partial. Raises ObjectChanged unless it then is the shard."""
        digest = hashlib.sha256()
        if not shard.sha256:  # what an earlier process has fetched could not be verified
            os.ftruncate(descriptor, 0)
        position = os.lseek(descriptor, 0, os.SEEK_SET)
        while data := os.read(descriptor, _PIECE_BYTES):
            digest.update(data)
            position += len(data)
        if position < shard.bytes:
            size, stall = shard.bytes, self.stall_seconds
            with objects.RemoteObject(
                url, self.retry_seconds, start=position, expected_size=size, stall_seconds=stall
            ) as source:
                if source.size not in (None, size):
                    raise _changed(url, f"{source.size:,} bytes, not {shard.bytes:,}")
                while data := source.read(_PIECE_BYTES):
                    if self._is_closed:
                        raise CancelledError
                    position += len(data)
                    if position > shard.bytes:
                        break
                    digest.update(data)
                    self._write(descriptor, data, shard, partial)
        if position > shard.bytes:
            raise _changed(url, f"more than {shard.bytes:,} bytes")
        if shard.sha256 and digest.hexdigest() != shard.sha256:
            raise _changed(url, "another SHA-256")

    def _write(self, descriptor: int, data: bytes, shard: Shard, partial: Path) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                with self._folder_lock():  # others fill the same disk
                    files = sorted(list_cache(self.folder), key=lambda file: file.used_at)
                    if not any(evict(file.path) for file in files if file.path != partial):
                        raise self._no_space(shard, "the disk is full") from error

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        """Held for moments only, and never while waiting for another lock. Raises UnavailableError
        when another process keeps it, because it was stopped, say."""
        with FileLock(self.folder / "lock") as lock:
            if not lock.acquire(self._stall_timeout):
                raise UnavailableError(
                    f"data.cache={self.folder.parent} cannot be used: another process has kept it "
                    f"locked for {self._stall_timeout:.0f} s"
                )
            yield


def _changed(url: str, found: str) -> objects.ObjectChanged:
    return objects.ObjectChanged(
        f"{objects.shown(url)} changed since it was indexed: it has {found}; if that is intended, "
        "index the shards again: ganscale shards index"
    )
