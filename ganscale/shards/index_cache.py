"""The results of earlier indexing, so that unchanged shards are not read again.

While indexing runs, each shard that was read has a small file in the folder `indexing` beside the
manifest, written atomically: an interrupted command continues from there, and several machines can
share the folder. Once the manifest is written, it holds the rows, `indexing.json` holds the rest,
and the folder is deleted.

A local shard counts as unchanged if its size and modification time are the same, a remote one if
its size and its ETag or time are; where the server reports neither, if its address is.
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
from ganscale.files import atomic_write, write_text
from ganscale.shards.shard_index import ShardIndex

FOLDER_NAME, SUMMARY_NAME = "indexing", "indexing.json"


class IndexCache:
    """The shards that were indexed into the folder `output` before, even without a manifest."""

    def __init__(self, output: Path):
        self._output = output
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
            return  # then every shard without a file is read again

    def has_current(self, name: str, stamp: list, options: str) -> bool:
        """Whether the shard was indexed with the same `stamp` and `options`."""
        record = self._record(name)
        return record is not None and (record["stamp"], record["options"]) == (stamp, options)

    def load(self, name: str) -> ShardIndex:
        """The index of a shard. Raises UserError if its file has been deleted meanwhile."""
        path = _shard_path(self._folder, name)
        if path.exists():
            with path.open("rb") as file:
                record = json.loads(file.readline())
                rows = np.frombuffer(file.read(), SAMPLE_ROW)
            return _to_index(record, rows)
        if self._manifest is None or name not in self._position:
            raise UserError(f"{path} was deleted while shards were indexed: start again")
        position = self._position[name]
        first, last = self._manifest.first_sample[position : position + 2]
        return _to_index(self._records[name], self._manifest.samples[first:last])

    def excluded(self, name: str) -> int:
        """How many samples of a shard were left out of the manifest."""
        return self._records[name]["left_out"] if name in self._records else 0

    def compact(self, fingerprint: str, names: Iterable[str]) -> None:
        """Replaces the files of single shards by one, without the rows that the manifest has."""
        records = {name: self._record(name) for name in names}
        content = {"fingerprint": fingerprint, "shards": records}
        write_text(self._output / SUMMARY_NAME, json.dumps(content))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _record(self, name: str) -> dict[str, Any] | None:
        path = _shard_path(self._folder, name)
        try:
            with path.open("rb") as file:
                line = file.readline()
            record = json.loads(line)
            row_bytes = record["shard"]["samples"] * SAMPLE_ROW.itemsize
            if path.stat().st_size == len(line) + row_bytes:
                return record
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self._records.get(name)


def save_shard(output: Path, index: ShardIndex, stamp: list, options: str) -> None:
    """Adds a shard's index to the cache in `output`."""
    record = {
        "stamp": stamp,
        "options": options,
        "shard": asdict(index.shard),
        "extensions": index.extensions,
        "image_sizes": index.image_sizes,
        "left_out": index.excluded,
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


def options_digest(excluded_keys: Collection[str], uses_idx: bool) -> str:
    """A digest of the options that change the rows of a shard."""
    text = json.dumps([sorted(excluded_keys), uses_idx])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stamp_of(address: str) -> list:
    """Values that change when a shard changes, found without reading it.

    Raises UserError for a local shard that is missing. For a remote shard whose server reports
    nothing, the stamp is its address.
    """
    if address.startswith(objects.PIPE):
        return _stamp(address, None, None)
    if not objects.is_remote(address):
        try:
            status = Path(address).stat()
        except FileNotFoundError as error:
            raise UserError(f"no shard at {address}") from error
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise UserError(f"{address} is not a file")
        return [status.st_size, status.st_mtime_ns]
    try:
        return _stamp(address, *connections.stat(address, objects.STALL_SECONDS))
    except Exception:  # any error of a store's client; reading the shard will report it
        return _stamp(address, None, None)


def _stamp(address: str, size: int | None, identity: str | None) -> list:
    if size is not None and identity:
        return [size, identity]
    # Hashed, since a command may hold a password, and this is written to disk.
    return [hashlib.blake2b(objects.shown(address).encode(), digest_size=16).hexdigest(), size]
