"""Copies of remote shards on a disk of this machine, shared by its ranks and by other runs.

A copy is `<SHA-256 of its contents>.tar`: nothing else may stand under that name, and data sets
that share shards share copies. While it is fetched it is `<name>.<bytes>.partial`, locked by who
fetches it, and only a verified one is renamed. So a process that is killed leaves a partial that
nobody holds a lock on: the next one takes it up or removes it.
"""

import errno
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ganscale.data.remote import objects
from ganscale.data.remote.cache_files import CachedShard, StallTimer, cache_files_in, evict, is_at, locked_or_none
from ganscale.data.manifest import Shard
from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import UnavailableError, UserError
from ganscale.files import FileLock, lock_descriptor

_PREFETCHING_THREADS = 4
_PIECE_BYTES = 1 << 20
_TOUCH_SECONDS = 1.0  # a copy's age is as exact as this
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ShardCache:
    """Fetches shards whole, ahead of need if asked to; any number of threads and processes.

    folder: the copies are in its sub-folder `shards`
    capacity_bytes: of all copies, those being fetched included; the least recently used go first
    retry_seconds: how long a fetch may fail before UnavailableError
    """

    def __init__(
        self,
        folder: Path | str,
        capacity_bytes: int,
        retry_seconds: float,
        *,
        stall_seconds: float = objects.STALL_SECONDS,
    ) -> None:
        self.folder = Path(folder).expanduser() / "shards"
        self.capacity_bytes = capacity_bytes
        self.retry_seconds = retry_seconds
        self.stall_seconds = stall_seconds
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._folder_locked():
                pass
        except OSError as error:
            raise UserError(
                f"data.cache={folder} cannot be written ({error.strerror}): name a folder on a "
                "disk of this machine"
            ) from error
        self._lock = threading.Lock()
        self._fetching: dict[str, Future[None]] = {}
        self._wanted: set[str] = set()
        self._crew: DaemonThreadPool | None = None
        self._is_closed = False

    def __reduce__(self):
        return _made_again, (
            self.folder.parent, self.capacity_bytes, self.retry_seconds, self.stall_seconds
        )  # fmt: skip

    def open(self, url: str, shard: Shard) -> CachedShard:
        """The copy of a shard, fetched from `url` first if it is not there.

        Raises UserError for a shard that is missing, or not the one that was indexed, and for a
        cache that has no room for it; UnavailableError when the network fails for too long.
        """
        name = _name(url, shard)
        while (staged := self._opened(name, shard)) is None:
            with self._lock:
                self._wanted.discard(name)  # it is being seen to
            self._stage(url, shard, name)
        return staged

    def prefetch(self, shards: Iterable[tuple[str, Shard]]) -> None:
        """Has (url, shard) fetched in this order by a few threads. What goes wrong is left to
        `open`, which then tries itself."""
        for url, shard in shards:
            name = _name(url, shard)
            if (self.folder / f"{name}.tar").exists():
                continue
            with self._lock:
                if self._is_closed or name in self._wanted or name in self._fetching:
                    continue
                self._wanted.add(name)
                self._crew = self._crew or DaemonThreadPool(_PREFETCHING_THREADS, "stage")
                self._crew.submit(lambda job=(url, shard, name): self._prefetch(*job))

    def close(self, seconds: float = 5.0) -> None:
        """Ends prefetching, within that time; copies stay, and so does what was fetched in part."""
        with self._lock:
            self._is_closed = True
            self._wanted.clear()
            crew, self._crew = self._crew, None
        if crew is not None:
            crew.close(seconds)

    def _prefetch(self, url: str, shard: Shard, name: str) -> None:
        with self._lock:
            if name not in self._wanted:
                return
        with suppress(UserError, UnavailableError, OSError, _Closed):
            if not (self.folder / f"{name}.tar").exists():
                self._stage(url, shard, name)
        with self._lock:
            self._wanted.discard(name)

    def _opened(self, name: str, shard: Shard) -> CachedShard | None:
        """The copy, locked against eviction, or None; one of a wrong size is removed."""
        path = self.folder / f"{name}.tar"
        try:
            staged = CachedShard(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        lock_descriptor(staged.descriptor, shared=True, wait=True)
        found = os.fstat(staged.descriptor)
        if found.st_nlink == 0:  # evicted in between
            return None
        if found.st_size != shard.bytes:
            with self._folder_locked():
                if is_at(staged.descriptor, path):
                    path.unlink()
            return None
        if time.time() - found.st_mtime > _TOUCH_SECONDS:
            with suppress(PermissionError):  # another user's copy
                os.utime(staged.descriptor)
        return staged

    def _stage(self, url: str, shard: Shard, name: str) -> None:
        """Fetches the copy, or waits for the thread or process that does."""
        with self._lock:
            fetch = self._fetching.get(name)
            is_ours = fetch is None
            if fetch is None:
                fetch = self._fetching[name] = Future()
        if not is_ours:
            fetch.result()
            return
        try:
            self._fetch_once(url, shard, name)
        except BaseException as error:
            fetch.set_exception(error)
            raise
        else:
            fetch.set_result(None)
        finally:
            with self._lock:
                del self._fetching[name]

    def _fetch_once(self, url: str, shard: Shard, name: str) -> None:
        partial = self.folder / f"{name}.{shard.bytes}.partial"
        waiting = StallTimer(self._patience_seconds)
        copy = self.folder / f"{name}.tar"
        while not copy.exists():
            descriptor = self._claimed(copy, partial, shard)
            if descriptor is None:
                waiting.wait(self.folder, objects.shown(url))
                continue
            try:
                self._fetch(url, shard, partial, descriptor)
                os.fsync(descriptor)
                partial.replace(copy)
            except OSError as error:
                raise UserError(
                    f"data.cache={self.folder.parent} cannot be written: {error.strerror}"
                ) from error
            finally:
                os.close(descriptor)

    def _claimed(self, copy: Path, partial: Path, shard: Shard) -> int | None:
        """The partial, locked, with room made for all of it; None while another has it, or while
        others fetch what there would be no room beside."""
        with self._folder_locked():
            descriptor = locked_or_none(partial)
            if descriptor is not None:
                return descriptor  # left behind: its room was counted all along
            # One that was just renamed is a copy now: that comes before it is no partial.
            if partial.exists() or copy.exists() or not self._make_room(shard):
                return None
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            lock_descriptor(descriptor, wait=True)
            return descriptor

    def _make_room(self, shard: Shard) -> bool:
        """Evicts until the shard fits, with the folder locked; False if it is to be tried again
        when others are done. Raises UserError when it can never fit."""
        if shard.bytes > self.capacity_bytes:
            raise self._no_room(shard, f"data.cache_gib={self.capacity_bytes / 2**30:.4g} is less")
        copies = sorted(cache_files_in(self.folder), key=lambda copy: (copy.is_whole, copy.used_at))
        used = sum(copy.reserved for copy in copies)
        missing = sum(copy.reserved - copy.bytes for copy in copies)
        free = shutil.disk_usage(self.folder).free - missing
        is_used = False
        for copy in copies:
            if used + shard.bytes <= self.capacity_bytes and free >= shard.bytes:
                break
            if evict(copy.path):
                used -= copy.reserved
                free += copy.bytes if copy.is_whole else copy.reserved
            else:
                is_used = True
        if used + shard.bytes <= self.capacity_bytes and free >= shard.bytes:
            return True
        if not is_used:
            raise self._no_room(shard, f"the disk has {max(0, free):,} left, without any copy")
        return False

    def _no_room(self, shard: Shard, problem: str) -> UserError:
        need = math.ceil(shard.bytes / 2**30 * 1000) / 1000
        return UserError(
            f"no room in data.cache={self.folder.parent} for the shard {shard.name} of "
            f"{shard.bytes:,} bytes: {problem}; it needs data.cache_gib={need:g} or more, on a "
            "disk with as much space"
        )

    def _fetch(self, url: str, shard: Shard, partial: Path, descriptor: int) -> None:
        """Fills the partial; twice if the first time something else than the shard came."""
        try:
            self._fill(url, shard, partial, descriptor)
        except objects.ObjectChanged:
            os.ftruncate(descriptor, 0)
            try:
                self._fill(url, shard, partial, descriptor)
            except objects.ObjectChanged:
                partial.unlink(missing_ok=True)
                raise

    def _fill(self, url: str, shard: Shard, partial: Path, descriptor: int) -> None:
        """Raises ObjectChanged unless it was the shard that came."""
        digest = hashlib.sha256()
        if not shard.sha256:  # what a partial was begun from could not be told
            os.ftruncate(descriptor, 0)
        start = os.lseek(descriptor, 0, os.SEEK_SET)
        while data := os.read(descriptor, _PIECE_BYTES):
            digest.update(data)
            start += len(data)
        if start > shard.bytes:
            raise _changed(url, f"more than {shard.bytes:,} bytes")
        if start < shard.bytes:
            with objects.RemoteObject(
                url,
                self.retry_seconds,
                start=start,
                expected_size=shard.bytes,
                stall_seconds=self.stall_seconds,
            ) as source:
                if source.size is not None and source.size != shard.bytes:
                    raise _changed(url, f"{source.size:,} bytes, not {shard.bytes:,}")
                while data := source.read(_PIECE_BYTES):
                    if self._is_closed:
                        raise _Closed
                    start += len(data)
                    if start > shard.bytes:
                        raise _changed(url, f"more than {shard.bytes:,} bytes")
                    digest.update(data)
                    self._write(descriptor, data, shard, partial)
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
                with self._folder_locked():  # others fill the same disk
                    copies = sorted(cache_files_in(self.folder), key=lambda copy: copy.used_at)
                    if not any(evict(copy.path) for copy in copies if copy.path != partial):
                        raise self._no_room(shard, "the disk is full") from error

    @property
    def _patience_seconds(self) -> float:
        """How long others may do nothing with what they hold."""
        return self.retry_seconds + 2 * self.stall_seconds

    @contextmanager
    def _folder_locked(self) -> Iterator[None]:
        """Held for moments only: whoever holds it waits for no other lock. Raises UnavailableError
        when it is held for longer: by a process that was stopped, say."""
        seconds = self._patience_seconds
        with FileLock(self.folder / "lock") as lock:
            if not lock.acquire(seconds):
                raise UnavailableError(
                    f"data.cache={self.folder.parent} cannot be used: another process holds "
                    f"it for {seconds:.0f} s"
                )
            yield


def working_set(
    shard_bytes: np.ndarray,
    shard_samples: np.ndarray,
    *,
    node_lanes: int,
    lanes: int,
    block_samples: int,
    window_blocks: int,
) -> int:
    """The bytes of shards that the ranks of a node read from at one time, or have fetched ahead.

    Those of two windows of each of its `node_lanes` of all `lanes`, in shards of mean size. Windows
    begin and end inside blocks, so they touch one block more than they are long; a block that is
    made of what is left at the ends of shards touches several shards.
    """
    shards, samples = len(shard_samples), int(shard_samples.sum())
    blocks = -(-samples // block_samples)
    rest = shard_samples % block_samples
    ends = np.cumsum(rest)
    in_mixed = (ends - 1) // block_samples - (ends - rest) // block_samples + 1
    pieces = int((shard_samples // block_samples + np.where(rest > 0, in_mixed, 0)).sum())
    lane_blocks = 2 * (min(window_blocks, blocks / lanes) + 1)  # of two epochs, they lie apart
    per_lane = min(shards, math.ceil(lane_blocks * pieces / blocks))
    return round(min(shards, node_lanes * per_lane) * float(shard_bytes.mean()))


class _Closed(Exception):
    """The cache was closed while something was fetched ahead."""


def _name(url: str, shard: Shard) -> str:
    return shard.sha256 or hashlib.sha256(f"{shard.bytes} {url}".encode()).hexdigest()


def _changed(url: str, found: str) -> objects.ObjectChanged:
    return objects.ObjectChanged(
        f"{objects.shown(url)} changed since it was indexed: it has {found}; if that is intended, "
        "index the shards anew: ganscale shards index"
    )


def _made_again(
    folder: Path, capacity_bytes: int, retry_seconds: float, stall_seconds: float
) -> ShardCache:
    return ShardCache(folder, capacity_bytes, retry_seconds, stall_seconds=stall_seconds)
