"""The results of indexing: kept, so that unchanged shards are not read again, and combined.

While indexing runs, each shard that was read has a small file in the folder `indexing` beside the
manifest: an interrupted command continues from there, and several machines can share the folder.
Once the manifest is written, it holds the rows, `indexing.json` holds the rest, and the folder is
deleted.

A local shard counts as unchanged if its size and modification time are the same, a remote one if
its size and its ETag or time are; where the server reports neither, if its address is.

Where labels are names, each shard numbers its own; `write_manifest` numbers those of all shards.
"""

import hashlib
import json
import shutil
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ganscale.data.manifest import (
    CLASSES_NAME,
    JSON_NAME,
    ROWS_NAME,
    SAMPLE_ROW,
    VERSION,
    Manifest,
    Shard,
    update_fingerprint,
)
from ganscale.data.remote import connections, objects
from ganscale.errors import UserError
from ganscale.files import atomic_write, write_text
from ganscale.shards.shard_index import ShardIndex

_FOLDER_NAME, _SUMMARY_NAME = "indexing", "indexing.json"
_MAX_NAMED = 5


class IndexCache:
    """The shards that were indexed into the folder `output` before, even without a manifest."""

    def __init__(self, output: Path):
        self._output = output
        self._folder = output / _FOLDER_NAME
        self._manifest: Manifest | None = None
        self._records: dict[str, dict[str, Any]] = {}
        self._position: dict[str, int] = {}
        # If these do not fit together, every shard without a file is read again.
        with suppress(OSError, ValueError, KeyError, TypeError, UserError):
            summary = json.loads((output / _SUMMARY_NAME).read_bytes())
            manifest = Manifest.load(output)
            if summary["fingerprint"] == manifest.fingerprint:
                self._manifest, self._records = manifest, summary["shards"]
                self._position = {shard.name: i for i, shard in enumerate(manifest.shards)}

    def has_current(self, name: str, stamp: list, options: str) -> bool:
        """Whether the shard was indexed with the same `stamp` and `options`."""
        record = self._record(name)
        return record is not None and (record["stamp"], record["options"]) == (stamp, options)

    def excluded(self, name: str) -> int:
        """How many samples of a shard were left out of the manifest."""
        return self._records[name]["left_out"] if name in self._records else 0

    def json_keys(self, name: str) -> tuple[str, ...]:
        """What JSON of a sample has, for a shard without classes."""
        return tuple((self._record(name) or {}).get("json_keys", ()))

    def write_manifest(self, location: str, names: list[str]) -> int:
        """Combines the indices of the shards `names` into the manifest, and compacts the cache.

        Returns how many samples were left out. Raises UserError for shards that do not go together.
        """
        root = self._output
        named_labels = self._named_labels(names)
        class_names = (_read_class_names(root) or named_labels) if named_labels else []
        shards: list[Shard] = []
        extensions: set[str] = set()
        image_sizes: set[tuple[int, int] | None] = set()
        class_count = excluded = 0
        digest = hashlib.sha256()
        with atomic_write(root / ROWS_NAME) as file:
            write_header = np.lib.format.write_array_header_1_0
            header = {"descr": SAMPLE_ROW.descr, "fortran_order": False, "shape": (0,)}
            write_header(file, header)
            for index in map(self._load, names):
                excluded += index.excluded
                if not len(index.rows):
                    continue
                rows = _renumbered(index, class_names, root) if named_labels else index.rows
                largest_label = int(rows["label"].max())
                if shards and (largest_label >= 0) != (class_count > 0):
                    raise UserError(
                        f"{index.shard.name} is {'not ' if class_count else ''}labelled, unlike "
                        f"{shards[0].name}: label all shards of {root} or none"
                    )
                class_count = max(class_count, largest_label + 1)
                shards.append(index.shard)
                extensions.update(index.extensions)
                # None counts as another size: then the sizes may differ.
                image_sizes.update((None,) if index.image_sizes is None else index.image_sizes)
                update_fingerprint(digest, index.shard, rows)
                file.write(rows.tobytes())
            if not shards:
                raise UserError(f"no sample is left for the manifest in {root}")
            # NumPy leaves room in a header for its first dimension to grow.
            file.seek(0)
            write_header(file, header | {"shape": (sum(shard.samples for shard in shards),)})
            if class_count and not named_labels:
                class_names = _read_class_names(root, class_count)
            # An old description must never be beside new rows.
            (root / JSON_NAME).unlink(missing_ok=True)
        content = {
            "version": VERSION,
            "fingerprint": digest.hexdigest(),
            "location": location,
            "fields": {
                "extensions": sorted(extensions),
                "resolution": next(iter(image_sizes)) if len(image_sizes) == 1 else None,
                "class_count": len(class_names) or class_count,
                "class_names": class_names,
            },
            "shards": [asdict(shard) for shard in shards],
        }
        if named_labels:  # shards that are added later keep these numbers
            write_text(root / CLASSES_NAME, json.dumps(class_names) + "\n")
        write_text(root / JSON_NAME, json.dumps(content, indent=1) + "\n")
        self._compact(digest.hexdigest(), [shard.name for shard in shards])
        return excluded

    def _load(self, name: str) -> ShardIndex:
        """The index of a shard. Raises UserError if its file has been deleted meanwhile."""
        path = _shard_path(self._folder, name)
        class_names: Sequence[str] = ()
        if path.exists():
            with path.open("rb") as file:
                record = json.loads(file.readline())
                rows = np.frombuffer(file.read(), SAMPLE_ROW)
            class_names = record.get("class_names", ())
        elif self._manifest is not None and name in self._position:
            record, position = self._records[name], self._position[name]
            first, last = self._manifest.first_sample[position : position + 2]
            rows = self._manifest.samples[first:last]
            if record.get("class_names"):
                class_names = self._manifest.class_names
        else:
            raise UserError(f"{path} was deleted while shards were indexed: start again")
        sizes = record["image_sizes"]
        return ShardIndex(
            Shard(**record["shard"]),
            rows,
            tuple(record["extensions"]),
            None if sizes is None else tuple((height, width) for height, width in sizes),
            tuple(class_names),
            excluded=record["left_out"],
        )

    def _compact(self, fingerprint: str, names: Iterable[str]) -> None:
        """Replaces the files of single shards by one, without the rows that the manifest has."""
        records = {name: self._record(name) for name in names}
        content = {"fingerprint": fingerprint, "shards": records}
        write_text(self._output / _SUMMARY_NAME, json.dumps(content))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _named_labels(self, names: Iterable[str]) -> list[str]:
        """The classes of the shards `names` whose labels are names."""
        found: set[str] = set()
        for name in names:
            found.update((self._record(name) or {}).get("class_names", ()))
        return sorted(found)

    def _record(self, name: str) -> dict[str, Any] | None:
        path = _shard_path(self._folder, name)
        with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
            line = file.readline()
            record = json.loads(line)
            row_bytes = record["shard"]["samples"] * SAMPLE_ROW.itemsize
            if path.stat().st_size == len(line) + row_bytes:
                return record
        return self._records.get(name)


def _renumbered(index: ShardIndex, class_names: list[str], root: Path) -> np.ndarray:
    """The rows of a shard in the numbers of the data set, whose labels are names. Raises UserError
    for a shard whose labels are numbers, and for a class that CLASSES_NAME lacks."""
    labels, positions = np.unique(index.rows["label"], return_inverse=True)
    if labels[-1] < 0:  # unlabelled
        return index.rows
    if not index.class_names:
        raise UserError(
            f"the labels of {index.shard.name} are numbers, but those of other shards are names: "
            f"{', '.join(class_names[:_MAX_NAMED])}"
        )
    number_of = {name: number for number, name in enumerate(class_names)}
    names = [index.class_names[label] for label in labels.tolist()]
    if missing := [name for name in names if name not in number_of]:
        raise UserError(
            f"{root / CLASSES_NAME} lacks the class {missing[0]!r} of {index.shard.name}: add it "
            "at the end, or delete the file to number all classes anew"
        )
    rows = index.rows.copy()
    rows["label"] = np.array([number_of[name] for name in names], np.int32)[positions]
    return rows


def _read_class_names(root: Path, least: int = 0) -> list[str]:
    """The list in CLASSES_NAME; empty if it does not exist. Raises UserError for fewer than `least`
    names."""
    path = root / CLASSES_NAME
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of class names")
    if len(names) < least:
        raise UserError(f"{path} names {len(names)} classes, but labels go up to {least - 1}")
    return names


def save_shard(output: Path, index: ShardIndex, stamp: list, options: str) -> None:
    """Adds a shard's index to the cache in `output`."""
    record = {
        "stamp": stamp,
        "options": options,
        "shard": asdict(index.shard),
        "extensions": index.extensions,
        "image_sizes": index.image_sizes,
        "class_names": index.class_names,
        "json_keys": index.json_keys,
        "left_out": index.excluded,
    }
    folder = output / _FOLDER_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(_shard_path(folder, index.shard.name)) as file:
        file.write((json.dumps(record) + "\n").encode())
        file.write(index.rows.tobytes())


def _shard_path(folder: Path, name: str) -> Path:
    return folder / text_digest(name)  # a name may hold slashes and be of any length


def stamp_of(address: str) -> list:
    """Values that change when a shard changes, found without reading it.

    Raises UserError for a local shard that is missing. For a remote shard whose server reports
    nothing, and for a command, the stamp is the address.
    """
    if not objects.is_remote(address):
        try:
            status = Path(address).stat()
        except FileNotFoundError as error:
            raise UserError(f"no shard at {address}") from error
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise UserError(f"{address} is not a file")
        return [status.st_size, status.st_mtime_ns]
    size, identity = None, None
    if not address.startswith(objects.PIPE):
        with suppress(Exception):  # any error of a store's client; reading the shard will report it
            size, identity = connections.stat(address, objects.STALL_SECONDS)
    if size is not None and identity:
        return [size, identity]
    # Hashed, since this is written to disk and a command may hold a password. Any of its words may
    # decide on what it prints.
    is_command = address.startswith(objects.PIPE)
    return [text_digest(address if is_command else objects.shown(address)), size]


def text_digest(text: str) -> str:
    """A short digest, in hexadecimal."""
    encoded = text.encode("utf-8", "surrogateescape")  # a name need not be UTF-8
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()
