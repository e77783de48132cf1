"""What earlier indexing has read, so that it need not be read again.

While shards are read, each has a small file in the folder `indexing` beside the manifest, written
whole or not at all: an interrupted command goes on there, and several machines can share it. Once
there is a manifest, that holds the rows, `indexing.json` the rest, and the folder goes.

What is trusted: a local shard of the same size and time of change, and a remote one of the same
size and ETag or time, as its server states them; where that states nothing, the same address.
"""

import hashlib
import json
import shutil
import stat
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ganscale.data.manifest import SAMPLE_ROW, Manifest, Shard
from ganscale.data.remote import connections, objects
from ganscale.errors import UserError
from ganscale.files import atomic_write
from ganscale.shards.shard_index import ShardIndex

FOLDER_NAME, SUMMARY_NAME = "indexing", "indexing.json"


class IndexCache:
    """The shards that were indexed into the folder `output` before, whole or in parts."""

    def __init__(self, output: Path):
        self._folder = output / FOLDER_NAME
        self._manifest: Manifest | None = None
        self._records: dict[str, dict[str, Any]] = {}
        self._position: dict[str, int] = {}
        try:
            summary = json.loads((output / SUMMARY_NAME).read_bytes())
            manifest = Manifest.load(output)
            if summary["fingerprint"] == manifest.fingerprint:
                self._manifest, self._records = manifest, summary["shards"]
                self._position = {shard.name: i for i, shard in enumerate(manifest.shards)}
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return  # without them, all is read

    def find(self, name: str, stamp: list, options: str) -> bool:
        """Whether a shard of that `stamp` was indexed with the same `options`."""
        record = self._record(name)
        return record is not None and (record["stamp"], record["options"]) == (stamp, options)

    def load(self, name: str) -> ShardIndex:
        """The index of a shard that was found, or saved since. Raises UserError if it has gone."""
        path = self._path(name)
        if path.exists():
            with path.open("rb") as file:
                record = json.loads(file.readline())
                rows = np.frombuffer(file.read(), SAMPLE_ROW)
            return _to_index(record, rows)
        if self._manifest is None or name not in self._position:
            raise UserError(f"the file {path} has gone while shards were indexed: start again")
        position = self._position[name]
        first, last = self._manifest.first_sample[position : position + 2]
        return _to_index(self._records[name], self._manifest.samples[first:last])

    def left_out(self, name: str) -> int:
        """How many samples of a shard are not in the manifest."""
        return self._records[name]["left_out"] if name in self._records else 0

    def summarize(self, output: Path, fingerprint: str, names: Iterable[str]) -> None:
        """Keeps all that is not in the manifest, which is written, and forgets the single files."""
        records = {name: self._record(name) for name in names}
        content = {"fingerprint": fingerprint, "shards": records}
        with atomic_write(output / SUMMARY_NAME) as file:
            file.write(json.dumps(content).encode())
        shutil.rmtree(self._folder, ignore_errors=True)

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            path = self._path(name)
            with path.open("rb") as file:
                line = file.readline()
            record = json.loads(line)
            row_bytes = record["shard"]["samples"] * SAMPLE_ROW.itemsize
            if path.stat().st_size == len(line) + row_bytes:
                return record
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self._records.get(name)

    def _path(self, name: str) -> Path:
        return _shard_path(self._folder, name)


def save_shard(output: Path, index: ShardIndex, stamp: list, options: str) -> None:
    """Keeps a shard's index, for this command and others."""
    record = {
        "stamp": stamp,
        "options": options,
        "shard": asdict(index.shard),
        "extensions": index.extensions,
        "image_sizes": index.image_sizes,
        "left_out": index.left_out,
    }
    folder = output / FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(_shard_path(folder, index.shard.name)) as file:
        file.write((json.dumps(record) + "\n").encode())
        file.write(index.rows.tobytes())


def _shard_path(folder: Path, name: str) -> Path:
    # A name may hold slashes and be of any length.
    return folder / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def _to_index(record: dict[str, Any], rows: np.ndarray) -> ShardIndex:
    sizes = record["image_sizes"]
    return ShardIndex(
        Shard(**record["shard"]),
        rows,
        tuple(record["extensions"]),
        None if sizes is None else tuple((height, width) for height, width in sizes),
        record["left_out"],
    )


def options_digest(left_out: Collection[str], is_trusted: bool) -> str:
    """Tells apart what gives one shard different rows."""
    text = json.dumps([sorted(left_out), is_trusted])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stamp_of(address: str) -> list:
    """What changes when a shard changes, without reading it. Raises UserError without a local one.

    A remote shard that cannot be asked about is told by its address.
    """
    if address.startswith(objects.PIPE):
        return _stamp(address, None, None)
    if not objects.is_remote(address):
        try:
            status = Path(address).stat()
        except FileNotFoundError as error:
            raise UserError(f"no shard at {address}") from error
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise UserError(f"{address} is no file")
        return [status.st_size, status.st_mtime_ns]
    try:
        return _stamp(address, *connections.stat(address, objects.STALL_SECONDS))
    except Exception:  # whatever a store's client raises; reading the shard says it in a sentence
        return _stamp(address, None, None)


def _stamp(address: str, size: int | None, identity: str | None) -> list:
    if size is not None and identity:
        return [size, identity]
    # Hashed: a command may hold a password, and this is written to disk.
    return [hashlib.blake2b(objects.shown(address).encode(), digest_size=16).hexdigest(), size]
