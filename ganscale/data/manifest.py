"""The list of a data set's shards and of every sample in them: two files beside the tars.

`manifest.json` describes the shards; `manifest.npy` has one row a sample, in shard order, and is
memory-mapped: a data set of ten billion samples costs a reader no more memory than a small one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ganscale.errors import UserError

VERSION = 1
JSON_NAME, ROWS_NAME = "manifest.json", "manifest.npy"
CLASSES_NAME = "classes.json"
"""A list of class names beside the shards, optional: kept apart so that indexing again keeps it."""


SAMPLE_ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: first byte of its image in the tar, the image's bytes, its class (-1: unlabelled)."""


@dataclass(frozen=True)
class Shard:
    """One tar of a data set: its file name, size, SHA-256 in hexadecimal, and number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


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
