"""The bytes of any sample of a data set on local disks, read in place from its tar."""

import os
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError


class BrokenSample(Exception):
    """A sample whose bytes cannot be had; transient failures of a disk are OSError instead.

    shard: the tar's file name; sample: the index in the manifest; reason: what was found.
    """

    def __init__(self, shard: str, sample: int, reason: str):
        super().__init__(f"sample {sample} of shard {shard} {reason}")
        self.shard, self.sample, self.reason = shard, sample, reason


class _OpenShard:
    """A file descriptor that lives as long as someone holds this object.

    So a shard can be dropped from the cache while another thread is still reading from it.
    """

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


class ShardStore:
    """Reads samples by index, from any number of threads.

    manifest: the data set
    max_open_shards: so many files are kept open; the least recently used is closed first
    """

    def __init__(self, manifest: Manifest, max_open_shards: int = 64):
        self.manifest = manifest
        self.max_open_shards = max_open_shards
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __reduce__(self):
        return ShardStore, (self.manifest, self.max_open_shards)

    def read(self, sample: int) -> bytes:
        """The image file of a sample, as its bytes stand in the tar.

        Raises BrokenSample when the shard ends before them, UserError when the shard is missing,
        and OSError as the file system does.
        """
        shard = self.manifest.shard_of(sample)
        row = self.manifest.samples[sample]
        size, offset = int(row["size"]), int(row["offset"])
        data = self._pread(shard, size, offset)
        if len(data) < size:
            raise BrokenSample(
                self.manifest.shards[shard].name,
                sample,
                f"is cut: {len(data):,} of {size:,} bytes at byte {offset:,}",
            )
        return data

    def locate(self, sample: int) -> tuple[str, str]:
        """(shard name, key) of a sample, for messages; "byte N" where its header is unreadable."""
        shard = self.manifest.shard_of(sample)
        offset = int(self.manifest.samples[sample]["offset"])
        name = self.manifest.shards[shard].name
        header = self._pread(shard, tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.TarError:
            return name, f"byte {offset}"
        folder, slash, base = member.rpartition("/")
        return name, folder + slash + base.split(".")[0]

    def close(self) -> None:
        """Closes the files that no thread is reading from; a later read opens them again."""
        with self._lock:
            self._open.clear()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; fewer only at the end of the file."""
        file = self._opened(shard)
        data = os.pread(file.descriptor, size, offset)
        while 0 < len(data) < size:  # a read may be interrupted, and never exceeds 2 GiB
            more = os.pread(file.descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _opened(self, shard: int) -> _OpenShard:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                path = self.manifest.root / self.manifest.shards[shard].name
                try:
                    file = _OpenShard(path)
                except FileNotFoundError as error:
                    raise UserError(f"the shard {path} of the manifest is missing") from error
                self._open[shard] = file
                if len(self._open) > self.max_open_shards:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return file
