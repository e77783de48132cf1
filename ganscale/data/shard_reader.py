"""The bytes of any sample of a data set, read in place from its tar or from a cached copy of it."""

import errno
import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ganscale.data.backoff import Backoff
from ganscale.data.bad_samples import BadSampleError
from ganscale.data.manifest import Manifest
from ganscale.data.remote import objects
from ganscale.data.remote.cache_files import OpenShard
from ganscale.data.remote.shard_cache import ShardCache
from ganscale.errors import UserError
from ganscale.schema import DataConfig

LARGEST_IMAGE_BYTES = 256 << 20
"""Larger members are refused: no image is that large, but a damaged manifest may claim so."""

_TRANSIENT = {
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLINK, errno.ENOTCONN,
    errno.EREMOTEIO, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
# Of local files. Cached copies are opened for each read (9 us): an open one cannot be evicted.
_MAX_OPEN_SHARDS = 64
_SECOND_LOOK_SECONDS = 0.2  # a network file system may miss a file for a moment


class SampleLocation(NamedTuple):
    """A sample by its index, and the bytes of its image in a shard."""

    sample: int
    shard: int
    offset: int
    size: int


class ShardReader:
    """Reads samples by index, from any number of threads; remote shards are copied into the cache
    of the config."""

    def __init__(self, manifest: Manifest, config: DataConfig) -> None:
        self.manifest = manifest
        self._retry_seconds = config.retry_seconds
        self._cache: ShardCache | None = None
        if manifest.is_remote:
            capacity_bytes = round(config.cache_gib * 2**30)
            self._cache = ShardCache(config.cache, capacity_bytes, config.retry_seconds)
        self._lock = threading.Lock()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def locations(self, samples: np.ndarray) -> list[SampleLocation]:
        """Where the samples are; for many at once, at a tenth of the cost of one by one."""
        rows = self.manifest.samples[samples]
        columns = samples, self.manifest.shards_of(samples), rows["offset"], rows["size"]
        lists = (column.tolist() for column in columns)
        return [SampleLocation(*row) for row in zip(*lists, strict=True)]

    def read(self, sample: int) -> bytes:
        """`read_location` for a sample by its index."""
        (location,) = self.locations(np.array([sample]))
        return self.read_location(location)

    def read_location(self, location: SampleLocation) -> bytes:
        """The image file of a sample, exactly as in the tar.

        Raises BadSampleError when the shard ends before it does, UserError when the shard is
        missing or may not be read, and UnavailableError when a disk or network fails for too long.
        """
        _, shard, offset, size = location
        shard_bytes = self.manifest.shards[shard].bytes
        if size > LARGEST_IMAGE_BYTES:
            raise too_large(size)
        if offset + size > shard_bytes:
            detail = f"has {size:,} bytes at byte {offset:,} of {shard_bytes:,}"
            raise BadSampleError(detail, "cut")
        data = self._pread(shard, size, offset)
        if len(data) < size:
            detail = f"is cut: {len(data):,} of {size:,} bytes at byte {offset:,}"
            raise BadSampleError(detail, "cut")
        return data

    def shard_and_key(self, sample: int) -> tuple[str, str]:
        """Names of a sample, for messages; "byte N" as the key where its header is unreadable."""
        ((_, index, offset, _),) = self.locations(np.array([sample]))
        shard, key = self.manifest.shards[index], f"byte {offset}"
        if tarfile.BLOCKSIZE <= offset <= shard.bytes:
            header = self._pread(index, tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            with suppress(tarfile.TarError):
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
                folder, slash, base = member.rpartition("/")
                key = folder + slash + base.split(".")[0]
        return shard.name, key

    def prefetch(self, shards: Sequence[int]) -> None:
        """Starts to fetch the remote shards that are needed next, in this order."""
        if self._cache is not None:
            self._cache.prefetch(
                (self.manifest.address(i), self.manifest.shards[i]) for i in shards
            )

    def close(self) -> None:
        """Ends fetching ahead and closes files, those that a thread is reading from when it is
        done. Afterwards, remote shards that are not in the cache can no longer be fetched."""
        with self._lock:
            self._open.clear()
        if self._cache is not None:
            self._cache.close()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        backoff: Backoff | None = None
        was_missing = False
        while True:
            try:
                return _read_up_to(self._open_shard(shard), size, offset)
            except FileNotFoundError as error:
                if was_missing:
                    path = objects.shown(self.manifest.address(shard))
                    raise UserError(f"the shard {path} of the manifest is missing") from error
                was_missing = True
                time.sleep(_SECOND_LOOK_SECONDS)
            except OSError as error:
                with self._lock:
                    self._open.pop(shard, None)  # a stale handle does not recover
                problem = f"the shard {objects.shown(self.manifest.address(shard))} cannot be read"
                if error.errno not in _TRANSIENT:
                    raise UserError(f"{problem}: {error.strerror}") from error
                backoff = backoff or Backoff(self._retry_seconds)
                backoff.wait(error, problem)

    def _open_shard(self, shard: int) -> OpenShard:
        if self._cache is not None:
            return self._cache.open(self.manifest.address(shard), self.manifest.shards[shard])
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
        # Outside the lock: a file system that is slow for one shard must not delay the others.
        file = OpenShard(self.manifest.address(shard))
        with self._lock:
            self._open[shard] = file
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return file


def too_large(size: int) -> BadSampleError:
    detail = f"has {size:,} bytes, more than {LARGEST_IMAGE_BYTES >> 20} MiB"
    return BadSampleError(detail, "too large")


def _read_up_to(file: OpenShard, size: int, offset: int) -> bytes:
    data = more = os.pread(file.descriptor, size, offset)
    while more and len(data) < size:  # a read may be interrupted, and never exceeds 2 GiB
        more = os.pread(file.descriptor, size - len(data), offset + len(data))
        data += more
    return data
