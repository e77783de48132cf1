"""The list of a data set's shards and of every sample in them: two files beside the tars.

`manifest.json` describes the shards; `manifest.npy` has one row a sample, in shard order, and is
memory-mapped: a data set of ten billion samples costs a reader no more memory than a small one.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ganscale.data.indexing import SAMPLE_ROW, Shard, ShardIndex, read_index
from ganscale.errors import UserError

VERSION = 1
JSON_NAME, ROWS_NAME = "manifest.json", "manifest.npy"
CLASSES_NAME = "classes.json"
"""A list of class names beside the shards, optional: kept apart so that indexing again keeps it."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """A data set on this machine's disks.

    root: the folder of the shards
    samples: (samples,) SAMPLE_ROW, memory-mapped: offset (bytes), size (bytes), label (-1: none)
    first_sample: (shards + 1,) int64; shard i holds samples first_sample[i] to first_sample[i + 1]
    extensions: those of the images, sorted, without dot
    resolution: (height, width) in pixels when all images have the same, else None
    class_count: 0 without labels; else the number of class names, or the largest label + 1
    class_names: one a class, or empty
    fingerprint: SHA-256 of the shards' names, sizes, checksums and sample rows, in hexadecimal
    """

    root: Path
    shards: tuple[Shard, ...]
    samples: np.ndarray
    first_sample: np.ndarray
    extensions: tuple[str, ...]
    resolution: tuple[int, int] | None
    class_count: int
    class_names: tuple[str, ...]
    fingerprint: str

    @classmethod
    def load(cls, path: Path | str) -> "Manifest":
        """The manifest of the data set at `path`: its folder, or the manifest.json in it.

        Raises UserError when there is none, or it is damaged or of another version.
        """
        root = Path(path)
        if not root.exists():
            raise UserError(f"no data set at {root}: there is no such folder")
        if root.name == JSON_NAME:
            root = root.parent
        description = root / JSON_NAME
        if not description.is_file():
            raise UserError(
                f"no {JSON_NAME} in {root}; make one with: ganscale shards index {root}"
            )
        again = f"make it anew with: ganscale shards index {root}"
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
            version = content["version"]
            if version != VERSION:
                raise UserError(f"{description} has version {version}, not {VERSION}; {again}")
            shards = tuple(Shard(**shard) for shard in content["shards"])
            fields = content["fields"]
            resolution = fields["resolution"]
            samples = np.load(root / ROWS_NAME, mmap_mode="r", allow_pickle=False)
            manifest = cls(
                root=root,
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
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"the manifest in {root} is damaged ({error!r}); {again}") from error
        if samples.dtype != SAMPLE_ROW or samples.shape != (manifest.first_sample[-1],):
            raise UserError(
                f"{root / ROWS_NAME} holds {samples.shape} rows of {samples.dtype}, but "
                f"{JSON_NAME} counts {manifest.first_sample[-1]:,} samples; {again}"
            )
        return manifest

    def __reduce__(self):
        # A process that is handed a manifest maps the file itself: else all rows would be copied.
        return Manifest.load, (self.root,)

    def shard_of(self, sample: int) -> int:
        """The index of the shard that holds `sample`."""
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1


def check_shards(manifest: Manifest) -> None:
    """Raises UserError for the first shard that is missing or whose size is not the recorded one.

    One `stat` a shard: contents are not read.
    """
    for shard in manifest.shards:
        path = manifest.root / shard.name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"the shard {path} of the manifest is missing") from error
        if size != shard.bytes:
            raise UserError(
                f"the shard {path} has {size:,} bytes, but {shard.bytes:,} when it was indexed; "
                f"if that is intended: ganscale shards index {manifest.root}"
            )


def build_manifest(folder: Path | str, workers: int = 1) -> Manifest:
    """Indexes all *.tar of `folder` with `workers` processes and writes their manifest there.

    Class names are taken from `classes.json` in the folder, a list, if there is one. Raises
    UserError for a folder without tars, a bad shard, and shards that do not go together.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"no folder at {root}")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise UserError(f"no *.tar in {root}")
    shards: list[Shard] = []
    extensions: set[str] = set()
    image_sizes: set[tuple[int, int]] = set()
    class_count = 0
    digest = hashlib.sha256()
    with replacing(root / ROWS_NAME) as file:
        write_header = np.lib.format.write_array_header_1_0
        header = {"descr": SAMPLE_ROW.descr, "fortran_order": False, "shape": (0,)}
        write_header(file, header)
        for index in _read_indices(paths, workers):
            is_labelled = bool(index.rows["label"][0] >= 0)
            if shards and is_labelled != (class_count > 0):
                raise UserError(
                    f"{index.shard.name} is {'' if is_labelled else 'not '}labelled, unlike "
                    f"{shards[0].name}: label all shards of {root} or none"
                )
            class_count = max(class_count, int(index.rows["label"].max()) + 1)
            shards.append(index.shard)
            extensions.update(index.extensions)
            image_sizes.update(index.image_sizes)
            shard = index.shard
            digest.update(json.dumps([shard.name, shard.bytes, shard.sha256]).encode())
            digest.update(index.rows.tobytes())
            file.write(index.rows.tobytes())
        # NumPy leaves room in a header for its first dimension to grow.
        file.seek(0)
        write_header(file, header | {"shape": (sum(shard.samples for shard in shards),)})
        class_names = _class_names(root, class_count)
        # Between the two renames there must be no old description of the new rows.
        (root / JSON_NAME).unlink(missing_ok=True)
    content = {
        "version": VERSION,
        "fingerprint": digest.hexdigest(),
        "fields": {
            "extensions": sorted(extensions),
            "resolution": image_sizes.pop() if len(image_sizes) == 1 else None,
            "class_count": len(class_names) or class_count,
            "class_names": class_names,
        },
        "shards": [asdict(shard) for shard in shards],
    }
    with replacing(root / JSON_NAME) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    return Manifest.load(root)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, on disk and as a whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_indices(paths: Sequence[Path], workers: int) -> Iterator[ShardIndex]:
    if workers <= 1 or len(paths) == 1:
        yield from map(read_index, paths)
        return
    # Not fork: a caller with threads (torch has some) could pass a held lock on to its children.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=spawn) as pool:
        yield from pool.map(read_index, paths)


def _class_names(root: Path, class_count: int) -> list[str]:
    path = root / CLASSES_NAME
    if class_count == 0 or not path.exists():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is no list of class names")
    if len(names) < class_count:
        raise UserError(f"{path} names {len(names)} classes, but labels go up to {class_count - 1}")
    return names
