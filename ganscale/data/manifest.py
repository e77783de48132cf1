"""The list of a data set's shards and of every sample in them.

`manifest.json` describes the shards; `manifest.npy` has one row per sample, in shard order, and is
memory-mapped: ten billion samples cost a reader no more memory than a few. Both are beside the
tars, or apart from them with the place of the tars as `location`.

A manifest may come from anyone: it can name objects in public stores, but not a command and, if it
was downloaded, nothing on this machine's disks.
"""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ganscale.data.missing_manifest import how_to_make_a_data_set
from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from ganscale.files import FileLock, atomic_write, with_home, write_text

VERSION = 2
JSON_NAME, ROWS_NAME = "manifest.json", "manifest.npy"
CLASSES_NAME = "classes.json"
"""An optional list of class names beside the shards; a file of its own survives indexing again."""

BESIDE = "."
"""The location of shards that are in the folder of their manifest."""

SAMPLE_ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: first byte of its image in the tar, the image's bytes, its class (-1: unlabelled)."""

_VERSIONS = (1, VERSION)  # version 1 has no location: the shards are beside it
_SHA256 = re.compile(r"[0-9a-f]{64}|")
_STAT_THREADS = 32


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: its file name, size, SHA-256 in hexadecimal ("" if unknown), number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """A data set, whose shards may be remote.

    root: the folder of the two files; in the cache if they were downloaded
    source: the folder or URL that the user gave
    location: of the shards: "." for beside the manifest, another folder, a URL, or pipe:COMMAND
    samples: (samples,) SAMPLE_ROW, memory-mapped
    first_sample: (shards + 1,) int64; shard i holds samples first_sample[i] to first_sample[i + 1]
    extensions: those of the images, sorted, without dot
    resolution: (height, width) in pixels when all images have the same, else None
    class_count: 0 without labels; else the number of class names, or the largest label + 1
    class_names: one per class, or empty
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
        cache: Path | str = "~/.cache/ganscale",
        retry_seconds: float = 300.0,
    ) -> "Manifest":
        """The manifest of the data set at `path`: a folder, its URL, or the manifest.json in it.

        shards: their location, if it is not to be taken from the manifest
        cache: for a copy of a remote manifest
        Raises UserError for one that is missing, damaged, of another version, or points to where it
        must not, and UnavailableError as `objects.open_stream`.
        """
        if not objects.is_remote(str(path)):
            root = with_home(str(path).removeprefix("file://"))
            if not root.exists():
                raise UserError(f"no data set at {root}: there is no such folder")
            if root.name == JSON_NAME:
                root = root.parent
            return cls._read(root, str(root), shards)
        source = str(path).removesuffix(JSON_NAME).rstrip("/")
        if not objects.is_object_store(source):
            raise UserError(f"no data set at {path}: it is neither a folder nor a URL")
        root = _download(source, with_home(cache) / "manifests", retry_seconds)
        return cls._read(root, source, shards)

    @classmethod
    def _read(cls, root: Path, source: str, shards_at: str) -> "Manifest":
        description = root / JSON_NAME
        where = source if objects.is_remote(source) else str(root)
        if not description.is_file():
            raise UserError(f"no {JSON_NAME} in {where}; {how_to_make_a_data_set(where, root)}")
        again = f"make it again with: ganscale shards index {where}"
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
            raise UserError(f"the manifest in {where} cannot be read: {error}") from error
        except (
            ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            raise UserError(f"the manifest in {where} is damaged ({error!r}); {again}") from error
        if samples.dtype != SAMPLE_ROW or samples.shape != (manifest.first_sample[-1],):
            raise UserError(
                f"{root / ROWS_NAME} holds {samples.shape} rows of {samples.dtype}, but "
                f"{JSON_NAME} counts {manifest.first_sample[-1]:,} samples; {again}"
            )
        return manifest

    def __reduce__(self):
        # A process that receives a manifest maps the file itself: else all rows would be copied.
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
        return str(self.root / with_home(self.location.removeprefix("file://")) / name)

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The index of the shard that holds each sample, both (n,) int64."""
        return np.searchsorted(self.first_sample, samples, side="right") - 1


def update_fingerprint(digest: Any, shard: Shard, rows: np.ndarray) -> None:
    """Adds a data set's next shard, with its SAMPLE_ROW rows, to the SHA-256 `digest`."""
    digest.update(json.dumps([shard.name, shard.bytes, shard.sha256]).encode())
    digest.update(rows.tobytes())


def check_shards(manifest: Manifest, retry_seconds: float = 300.0) -> None:
    """Raises UserError for a shard that is missing or has another size than recorded. Of remote
    shards only the first is opened, to find a wrong address or credential early; a command is not
    run."""
    if not manifest.is_remote:
        with ThreadPoolExecutor(min(_STAT_THREADS, 1 + len(manifest.shards) // 64)) as pool:
            # On a parallel file system each stat waits for the network: many at the same time.
            try:
                list(pool.map(partial(_check_local_shard, manifest), range(len(manifest.shards))))
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise
    elif manifest.shards and not manifest.location.startswith(objects.PIPE):
        with objects.RemoteObject(manifest.address(0), retry_seconds) as source:
            _check_size(manifest, 0, source.size)


def _check_local_shard(manifest: Manifest, index: int) -> None:
    path = Path(manifest.address(index))
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"the shard {path} of the manifest is missing") from error
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read: {error.strerror}") from error
    _check_size(manifest, index, size)


def _check_size(manifest: Manifest, index: int, size: int | None) -> None:
    expected = manifest.shards[index].bytes
    if size not in (None, expected):
        raise UserError(
            f"the shard {objects.shown(manifest.address(index))} has {size:,} bytes, but "
            f"{expected:,} when it was indexed; if that is intended: "
            f"ganscale shards index {manifest.source}"
        )


def _checked(shard: Shard) -> Shard:
    """Raises ValueError unless the name is one of a file below the location, and the rest valid."""
    if not all(type(text) is str for text in (shard.name, shard.sha256)):
        raise ValueError(f"name and checksum of {shard} must be text")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (shard.bytes, shard.samples)):
        raise ValueError(f"bytes and samples of {shard.name!r} must be counts")
    if {"", ".", ".."} & set(shard.name.split("/")) or "\0" in shard.name:
        raise ValueError(f"{shard.name!r} is not a valid name for a shard")
    if not _SHA256.fullmatch(shard.sha256):
        raise ValueError(f"the checksum of {shard.name!r} is not a SHA-256")
    return shard


def _location(recorded: Any, source: str) -> str:
    """The location of the shards, as `recorded` in a manifest from `source`. Raises UserError for
    one that a manifest must not name."""
    if type(recorded) is not str:
        raise ValueError("the location must be text")
    if objects.is_object_store(recorded):
        return recorded
    is_path = not objects.is_remote(recorded) and not recorded.startswith("file://")
    if is_path and not objects.is_remote(source):
        return recorded or BESIDE
    parts = recorded.split("/")
    if is_path and not recorded.startswith(("/", "~")) and ".." not in parts:
        below = "/".join(part for part in parts if part not in ("", BESIDE))
        return objects.join(source, below) if below else source
    raise UserError(
        f"the manifest in {objects.shown(source)} has its shards at {recorded!r}, which a manifest "
        "may not name; if you trust it, set data.shards=..."
    )


def _download(source: str, folder: Path, retry_seconds: float) -> Path:
    """The folder with a copy of a remote manifest, fetched once for all processes.

    It is named by the contents, so processes that have mapped an older version keep it.
    """
    key = hashlib.sha256(source.encode()).hexdigest()[:32]
    seconds = retry_seconds + 2 * objects.STALL_SECONDS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock") as lock:
            if not lock.acquire(seconds, poll_seconds=0.1):  # its process may have been stopped
                raise UnavailableError(
                    f"another process has been fetching the manifest in {objects.shown(source)} "
                    f"for {seconds:.0f} s"
                )
            return _fetch(source, folder, key, retry_seconds)
    except OSError as error:
        raise UserError(f"data.cache={folder.parent} cannot be written: {error}") from error


def _fetch(source: str, folder: Path, key: str, retry_seconds: float) -> Path:
    known = folder / f"{key}.json"  # which copy was made of which version
    with objects.RemoteObject(objects.join(source, JSON_NAME), retry_seconds) as description:
        identity = description.identity
        with suppress(FileNotFoundError, ValueError):
            record = json.loads(known.read_text())
            copy = folder / record["folder"]
            if identity and record["identity"] == identity and (copy / JSON_NAME).is_file():
                return copy
        content = description.readall()
    copy = folder / hashlib.sha256(content).hexdigest()[:32]
    if not copy.exists():
        partial = folder / f"{key}.partial"
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


def _verify(manifest: Manifest) -> None:
    """Raises UserError when the fingerprint is not that of the shards and rows."""
    digest = hashlib.sha256()
    for shard, first in zip(manifest.shards, manifest.first_sample.tolist(), strict=False):
        update_fingerprint(digest, shard, manifest.samples[first : first + shard.samples])
    if digest.hexdigest() != manifest.fingerprint:
        raise UserError(
            f"{JSON_NAME} and {ROWS_NAME} in {objects.shown(manifest.source)} do not belong "
            "together (another fingerprint); try again if they are being replaced"
        )


def _read_again(root: Path, source: str, location: str, fingerprint: str) -> Manifest:
    manifest = Manifest._read(root, source, location)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"the data set in {source} has just been changed")
    return manifest
