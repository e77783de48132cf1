"""The bytes of any sample of a data set, read in place from its tar or from a staged copy."""

import errno
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ganscale.data.remote import objects
from ganscale.data.manifest import Manifest
from ganscale.data.backoff import Backoff
from ganscale.data.remote.shard_cache import ShardCache, CachedShard
from ganscale.errors import UserError
from ganscale.schema import DataConfig

LARGEST_IMAGE_BYTES = 256 << 20
"""Larger members are refused: no image is so large, but a damaged row may say so."""

_TRANSIENT = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK, errno.ENOTCONN,
    errno.EREMOTEIO, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
_SECOND_LOOK_SECONDS = 0.2  # a network file system may miss a file for a moment


class BadSampleError(Exception):
    """A sample whose bytes cannot be had, however often they are asked for.

    shard: the tar's file name; sample: the index in the manifest; reason: what was found.
    """

    def __init__(self, shard: str, sample: int, reason: str):
        super().__init__(f"sample {sample} of shard {shard} {reason}")
        self.shard, self.sample, self.reason = shard, sample, reason


class SampleLocation(NamedTuple):
    """A sample by its index, and the bytes of its image in a shard."""

    sample: int
    shard: int
    offset: int
    size: int


class _OpenShard:
    """A file descriptor that lives as long as someone holds this object.

    So a shard can be dropped from the cache while another thread is still reading from it.
    """

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


class ShardReader:
    """Reads samples by index, from any number of threads.

    manifest: the data set
    cache: where shards that lie elsewhere are staged; needed for these only
    retry_seconds: how long a disk may fail
    max_open_shards: so many local files are kept open; the least recently used is closed first.
        Staged copies are opened for each read (9 us): one that is open cannot be evicted.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache: ShardCache | None = None,
        *,
        retry_seconds: float = 300.0,
        max_open_shards: int = 64,
    ):
        if manifest.is_remote and cache is None:
            raise ValueError("shards that lie elsewhere need a cache")
        self.manifest = manifest
        self.retry_seconds = retry_seconds
        self.max_open_shards = max_open_shards
        self._cache = cache if manifest.is_remote else None
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __reduce__(self):
        return _made_again, (
            self.manifest, self._cache, self.retry_seconds, self.max_open_shards
        )  # fmt: skip

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read, so that `prefetch` helps."""
        return self._cache is not None

    def places(self, samples: np.ndarray) -> list[SampleLocation]:
        """Where the samples lie; for many at once a tenth of what each of them would cost."""
        rows = self.manifest.samples[samples]
        shards = np.searchsorted(self.manifest.first_sample, samples, side="right") - 1
        columns = samples, shards, rows["offset"], rows["size"]
        return [SampleLocation(*each) for each in zip(*(c.tolist() for c in columns), strict=True)]

    def read(self, sample: int) -> bytes:
        """`read_location` for a sample by its index."""
        (place,) = self.places(np.array([sample]))
        return self.read_location(place)

    def read_location(self, place: SampleLocation) -> bytes:
        """The image file of a sample, as its bytes stand in the tar.

        Raises BrokenSample when the shard ends before them, UserError when the shard is missing or
        may not be read, and UnavailableError for a disk or network that fails for too long.
        """
        sample, shard, offset, size = place
        about = self.manifest.shards[shard]
        if size > LARGEST_IMAGE_BYTES:
            limit = f"more than {LARGEST_IMAGE_BYTES >> 20} MiB"
            raise BadSampleError(about.name, sample, f"has {size:,} bytes, {limit}")
        if offset + size > about.bytes:
            end = f"at byte {offset:,} of {about.bytes:,}"
            raise BadSampleError(about.name, sample, f"has {size:,} bytes {end}")
        data = self._pread(shard, size, offset)
        if len(data) < size:
            found = f"is cut: {len(data):,} of {size:,} bytes at byte {offset:,}"
            raise BadSampleError(about.name, sample, found)
        return data

    def locate(self, sample: int) -> tuple[str, str]:
        """(shard name, key) of a sample, for messages; "byte N" where its header is unreadable."""
        ((_, shard, offset, _),) = self.places(np.array([sample]))
        name = self.manifest.shards[shard].name
        if not tarfile.BLOCKSIZE <= offset <= self.manifest.shards[shard].bytes:
            return name, f"byte {offset}"
        header = self._pread(shard, tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.TarError:
            return name, f"byte {offset}"
        folder, slash, base = member.rpartition("/")
        return name, folder + slash + base.split(".")[0]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Says which shards are needed next, in order; for shards on disk nothing is to be done."""
        if self._cache is not None:
            manifest = self.manifest
            self._cache.prefetch((manifest.address(i), manifest.shards[i]) for i in shards)

    def close(self) -> None:
        """Closes the files that no thread is reading from; a later read opens them again. Nothing
        is fetched ahead any more."""
        with self._lock:
            self._open.clear()
        if self._cache is not None:
            self._cache.close()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        patience: Backoff | None = None
        was_missing = False
        while True:
            try:
                return _read_up_to(self._opened(shard), size, offset)
            except FileNotFoundError as error:
                if was_missing:
                    raise UserError(
                        f"the shard {self._path(shard)} of the manifest is missing"
                    ) from error
                was_missing = True
                time.sleep(_SECOND_LOOK_SECONDS)
            except OSError as error:
                with self._lock:
                    self._open.pop(shard, None)  # a stale handle does not recover
                problem = f"the shard {self._path(shard)} cannot be read"
                if error.errno not in _TRANSIENT:
                    raise UserError(f"{problem}: {error.strerror}") from error
                patience = patience or Backoff(self.retry_seconds)
                patience.wait(error, problem)

    def _path(self, shard: int) -> str:
        return objects.shown(self.manifest.address(shard))

    def _opened(self, shard: int) -> _OpenShard | CachedShard:
        if self._cache is not None:
            return self._cache.open(self.manifest.address(shard), self.manifest.shards[shard])
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
        # Outside the lock: a file system that takes long for one shard must not hold up the others.
        file = _OpenShard(self.manifest.address(shard))
        with self._lock:
            self._open[shard] = file
            while len(self._open) > self.max_open_shards:
                self._open.popitem(last=False)
        return file


def open_shard_reader(manifest: Manifest, config: DataConfig) -> ShardReader:
    """The shards of a run, staged into the config's cache where they lie elsewhere."""
    cache = None
    if manifest.is_remote:
        cache = ShardCache(config.cache, round(config.cache_gib * 2**30), config.retry_seconds)
    return ShardReader(manifest, cache, retry_seconds=config.retry_seconds)


def _read_up_to(file: _OpenShard | CachedShard, size: int, offset: int) -> bytes:
    data = os.pread(file.descriptor, size, offset)
    while 0 < len(data) < size:  # a read may be interrupted, and never exceeds 2 GiB
        more = os.pread(file.descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _made_again(
    manifest: Manifest, cache: ShardCache | None, retry_seconds: float, max_open_shards: int
) -> ShardReader:
    return ShardReader(manifest, cache, retry_seconds=retry_seconds, max_open_shards=max_open_shards)
