"""The list of a data set's shards and of every sample in them.

`manifest.json` describes the shards; `manifest.npy` has one row a sample, in shard order, and is
memory-mapped: a data set of ten billion samples costs a reader no more memory than a small one.
Both lie beside the tars, or apart from them with the place of the tars as `location`.

A manifest may come from anyone: it can name objects in public stores, but no command and, if it was
downloaded, nothing on this machine's disks.
"""

import hashlib
import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ganscale.data.remote import objects
from ganscale.errors import UserError
from ganscale.files import FileLock, atomic_write, write_text

VERSION = 2
JSON_NAME, ROWS_NAME = "manifest.json", "manifest.npy"
CLASSES_NAME = "classes.json"
"""A list of class names beside the shards, optional: kept apart so that indexing again keeps it."""

DEFAULT_CACHE = "~/.cache/ganscale"
BESIDE = "."
"""The location of shards in the folder of their manifest."""

SAMPLE_ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: first byte of its image in the tar, the image's bytes, its class (-1: unlabelled)."""

_VERSIONS = (1, VERSION)  # version 1 had no location: the shards are beside it
_SHA256 = re.compile(r"[0-9a-f]{64}|")
_STAT_THREADS = 32


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a data set: its file name, size, SHA-256 in hexadecimal ("" if it is not known),
    and number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """A data set, of which this machine has the manifest at least.

    root: the folder of the two files; of a downloaded manifest, in the cache
    source: what the user knows the data set by: its folder or URL
    location: of the shards: "." for beside the manifest, another folder, a URL, or pipe:COMMAND
    samples: (samples,) SAMPLE_ROW, memory-mapped: offset (bytes), size (bytes), label (-1: none)
    first_sample: (shards + 1,) int64; shard i holds samples first_sample[i] to first_sample[i + 1]
    extensions: those of the images, sorted, without dot
    resolution: (height, width) in pixels when all images have the same, else None
    class_count: 0 without labels; else the number of class names, or the largest label + 1
    class_names: one a class, or empty
    fingerprint: SHA-256 of the shards' names, sizes, checksums and sample rows, in hexadecimal
    """

    root: Path
    source: str
    location: str
    shards: tuple[Shard, ...]
    samples: np.ndarray
    first_sample: np.ndarray
    extensions: tuple[str, ...]
    resolution: tuple[int, int] | None
    class_count: int
    class_names: tuple[str, ...]
    fingerprint: str

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        shards: str = "",
        cache: Path | str = DEFAULT_CACHE,
        retry_seconds: float = 300.0,
    ) -> "Manifest":
        """The manifest of the data set at `path`: its folder or the URL of one, or the
        manifest.json in it.

        shards: the user's own word on where they lie, in place of the manifest's
        cache: a manifest that lies elsewhere is copied there, anew when it changed
        Raises UserError when there is none, or it is damaged, of another version, or points to
        where it must not, and UnavailableError as `remote.open_stream`.
        """
        if not objects.is_remote(str(path)):
            root = Path(str(path).removeprefix("file://")).expanduser()
            if not root.exists():
                raise UserError(f"no data set at {root}: there is no such folder")
            if root.name == JSON_NAME:
                root = root.parent
            return cls._read(root, str(root), shards)
        source = str(path).removesuffix(JSON_NAME).rstrip("/")
        if not objects.is_object_store(source):
            raise UserError(f"no data set at {path}: it is neither a folder nor a URL of one")
        root = _download(source, Path(cache).expanduser() / "manifests", retry_seconds)
        return cls._read(root, source, shards)

    @classmethod
    def _read(cls, root: Path, source: str, shards_at: str) -> "Manifest":
        description = root / JSON_NAME
        place = source if objects.is_remote(source) else str(root)
        if not description.is_file():
            raise UserError(
                f"no {JSON_NAME} in {place}; make one with: ganscale shards index {place}"
            )
        again = f"make it anew with: ganscale shards index {place}"
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
            version = content["version"]
            if version not in _VERSIONS:
                raise UserError(f"{description} has version {version}, not {VERSION}; {again}")
            shards = tuple(_checked(Shard(**shard)) for shard in content["shards"])
            fields = content["fields"]
            resolution = fields["resolution"]
            samples = np.load(root / ROWS_NAME, mmap_mode="r", allow_pickle=False)
            manifest = cls(
                root=root,
                source=source,
                location=shards_at or _location(content.get("location", BESIDE), source),
                shards=shards,
                samples=samples,
                first_sample=np.cumsum([0, *(shard.samples for shard in shards)], dtype=np.int64),
                extensions=tuple(fields["extensions"]),
                resolution=(resolution[0], resolution[1]) if resolution else None,
                class_count=fields["class_count"],
                class_names=tuple(fields["class_names"]),
                fingerprint=content["fingerprint"],
            )
        except FileNotFoundError as error:
            raise UserError(f"{description} lacks its {ROWS_NAME}; {again}") from error
        except OSError as error:
            raise UserError(f"the manifest in {place} cannot be read: {error}") from error
        except (
            ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            raise UserError(f"the manifest in {place} is damaged ({error!r}); {again}") from error
        if samples.dtype != SAMPLE_ROW or samples.shape != (manifest.first_sample[-1],):
            raise UserError(
                f"{root / ROWS_NAME} holds {samples.shape} rows of {samples.dtype}, but "
                f"{JSON_NAME} counts {manifest.first_sample[-1]:,} samples; {again}"
            )
        return manifest

    def __reduce__(self):
        # A process that is handed a manifest maps the file itself: else all rows would be copied.
        return _read_again, (self.root, self.source, self.location, self.fingerprint)

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be fetched before they can be read."""
        return objects.is_remote(self.location)

    def address(self, shard: int) -> str:
        """The path of a shard, or its URL or pipe:COMMAND."""
        name = self.shards[shard].name
        if self.is_remote:
            return objects.join(self.location, name)
        return str(self.root / Path(self.location.removeprefix("file://")).expanduser() / name)

    def shard_of(self, sample: int) -> int:
        """The index of the shard that holds `sample`."""
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1


def update_fingerprint(digest: Any, shard: Shard, rows: np.ndarray) -> None:
    """Adds the next shard, with its SAMPLE_ROW rows, to the SHA-256 `digest` of a data set."""
    digest.update(json.dumps([shard.name, shard.bytes, shard.sha256]).encode())
    digest.update(rows.tobytes())


def check_shards(manifest: Manifest, retry_seconds: float = 300.0) -> None:
    """Raises UserError for the first shard that is missing or whose size is not the recorded one.

    On disk, one `stat` a shard; contents are not read. Of shards that lie elsewhere, only the first
    one is asked for, to find a wrong address or credential early; a command is not run.
    """
    if not manifest.shards:
        return
    address, shard = manifest.address(0), manifest.shards[0]
    if not manifest.is_remote:
        with ThreadPoolExecutor(min(_STAT_THREADS, 1 + len(manifest.shards) // 64)) as pool:
            # On a parallel file system a stat is a message and its answer: many at a time.
            for mistake in pool.map(partial(_mistake, manifest), range(len(manifest.shards))):
                if mistake:
                    pool.shutdown(cancel_futures=True)
                    raise UserError(mistake)
    elif not manifest.location.startswith(objects.PIPE):
        with objects.RemoteObject(address, retry_seconds) as source:
            if source.size not in (None, shard.bytes):
                raise UserError(_other_size(manifest, objects.shown(address), source.size, shard))


def _mistake(manifest: Manifest, index: int) -> str:
    path, shard = Path(manifest.address(index)), manifest.shards[index]
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"the shard {path} of the manifest is missing"
    except OSError as error:
        return f"the shard {path} cannot be read: {error.strerror}"
    return "" if size == shard.bytes else _other_size(manifest, str(path), size, shard)


def _other_size(manifest: Manifest, address: str, size: int | None, shard: Shard) -> str:
    return (
        f"the shard {address} has {size:,} bytes, but {shard.bytes:,} when it was indexed; "
        f"if that is intended: ganscale shards index {manifest.source}"
    )


def _checked(shard: Shard) -> Shard:
    """Raises ValueError for what would not name a file below the location, or a copy of it."""
    if not all(type(each) is str for each in (shard.name, shard.sha256)):
        raise ValueError(f"name and checksum of {shard} are no text")
    if not all(type(each) is int and 0 <= each < 2**62 for each in (shard.bytes, shard.samples)):
        raise ValueError(f"bytes and samples of {shard.name!r} are no counts")
    if {"", ".", ".."} & set(shard.name.split("/")) or "\0" in shard.name:
        raise ValueError(f"{shard.name!r} is no name of a shard")
    if not _SHA256.fullmatch(shard.sha256):
        raise ValueError(f"the checksum of {shard.name!r} is no SHA-256")
    return shard


def _location(recorded: Any, source: str) -> str:
    """Where a manifest's shards lie by its own account; raises UserError for what it must not say.

    source: where the manifest itself comes from
    """
    if type(recorded) is not str:
        raise ValueError("the location is no text")
    if objects.is_object_store(recorded):
        return recorded
    is_here = not objects.is_remote(source)
    is_path = not objects.is_remote(recorded) and not recorded.startswith("file://")
    if is_path and is_here:
        return recorded or BESIDE
    parts = recorded.split("/")
    if is_path and not recorded.startswith(("/", "~")) and ".." not in parts:
        below = "/".join(part for part in parts if part not in ("", BESIDE))
        return objects.join(source, below) if below else source
    raise UserError(
        f"the manifest in {objects.shown(source)} says that its shards are at {recorded!r}, which "
        "is not taken from a manifest; if you trust it, say so yourself: data.shards=..."
    )


def _download(source: str, folder: Path, retry_seconds: float) -> Path:
    """The folder with a copy of a manifest that lies elsewhere, fetched once for all processes.

    It is named by the contents: another version of the manifest gets another folder, and a process
    that maps the first one is not disturbed.
    """
    place = hashlib.sha256(source.encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{place}.lock")
    except OSError as error:
        raise UserError(f"data.cache={folder.parent} cannot be written: {error}") from error
    with lock:
        lock.acquire(math.inf, poll_seconds=0.1)
        known = folder / f"{place}.json"
        with objects.RemoteObject(objects.join(source, JSON_NAME), retry_seconds) as description:
            copy = _remembered(known, description.identity)
            if copy is not None:
                return copy
            content = description.readall()
            identity = description.identity
        copy = folder / hashlib.sha256(content).hexdigest()[:32]
        if not copy.exists():
            partial = folder / f"{place}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / JSON_NAME).write_bytes(content)
            with (
                objects.open_stream(objects.join(source, ROWS_NAME), retry_seconds) as rows,
                atomic_write(partial / ROWS_NAME) as file,
            ):
                shutil.copyfileobj(rows, file, 1 << 20)
            _verify(Manifest._read(partial, source, BESIDE))
            partial.rename(copy)
        write_text(known, json.dumps({"identity": identity, "folder": copy.name}))
        return copy


def _remembered(known: Path, identity: str) -> Path | None:
    """The copy that was made of the very same manifest before."""
    try:
        memory = json.loads(known.read_text())
    except (FileNotFoundError, ValueError):
        return None
    copy = known.parent / memory["folder"]
    is_same = bool(identity) and memory["identity"] == identity
    return copy if is_same and (copy / JSON_NAME).is_file() else None


def _verify(manifest: Manifest) -> None:
    """Raises UserError when the rows are not those that the manifest's fingerprint was taken of."""
    digest = hashlib.sha256()
    for shard, first in zip(manifest.shards, manifest.first_sample.tolist(), strict=False):
        update_fingerprint(digest, shard, manifest.samples[first : first + shard.samples])
    if digest.hexdigest() != manifest.fingerprint:
        raise UserError(
            f"{JSON_NAME} and {ROWS_NAME} in {objects.shown(manifest.source)} do not go together: "
            "another fingerprint; was it being replaced just now?"
        )


def _read_again(root: Path, source: str, location: str, fingerprint: str) -> Manifest:
    manifest = Manifest._read(root, source, location)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"the data set in {source} has just been changed")
    return manifest
