"""Combines the indices of single shards into the manifest of the data set."""

import hashlib
import json
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
    Shard,
    update_fingerprint,
)
from ganscale.errors import UserError
from ganscale.files import atomic_write, write_text
from ganscale.shards.index_cache import IndexCache
from ganscale.shards.shard_index import ShardIndex


class _Description:
    """What manifest.json states, collected shard by shard."""

    def __init__(self, root: Path):
        self.shards: list[Shard] = []
        self._root = root
        self._extensions: set[str] = set()
        self._image_sizes: set[tuple[int, int] | None] = set()
        self._class_count = 0
        self._digest = hashlib.sha256()

    def add(self, index: ShardIndex) -> None:
        """Adds a shard that has samples. Raises UserError if only some shards are labelled."""
        is_labelled = bool(index.rows["label"][0] >= 0)
        if self.shards and is_labelled != (self._class_count > 0):
            raise UserError(
                f"{index.shard.name} is {'' if is_labelled else 'not '}labelled, unlike "
                f"{self.shards[0].name}: label all shards of {self._root} or none"
            )
        self.shards.append(index.shard)
        self._class_count = max(self._class_count, int(index.rows["label"].max()) + 1)
        self._extensions.update(index.extensions)
        # None counts as another size: then the sizes may differ.
        self._image_sizes.update((None,) if index.image_sizes is None else index.image_sizes)
        update_fingerprint(self._digest, index.shard, index.rows)

    def content(self, location: str) -> dict[str, Any]:
        """Raises UserError for a bad list of class names."""
        sizes = self._image_sizes
        class_names = _class_names(self._root, self._class_count)
        return {
            "version": VERSION,
            "fingerprint": self._digest.hexdigest(),
            "location": location,
            "fields": {
                "extensions": sorted(self._extensions),
                "resolution": next(iter(sizes)) if len(sizes) == 1 else None,
                "class_count": len(class_names) or self._class_count,
                "class_names": class_names,
            },
            "shards": [asdict(shard) for shard in self.shards],
        }


def write_manifest(root: Path, location: str, names: list[str], cache: IndexCache) -> int:
    """Combines the indices of the shards `names` into the manifest in the folder `root`.

    Returns how many samples were left out. Raises UserError for shards that do not go together.
    """
    description = _Description(root)
    excluded = 0
    with atomic_write(root / ROWS_NAME) as file:
        write_header = np.lib.format.write_array_header_1_0
        header = {"descr": SAMPLE_ROW.descr, "fortran_order": False, "shape": (0,)}
        write_header(file, header)
        for index in map(cache.load, names):
            excluded += index.excluded
            if len(index.rows):
                description.add(index)
                file.write(index.rows.tobytes())
        if not description.shards:
            raise UserError(f"no sample is left for the manifest in {root}")
        # NumPy leaves room in a header for its first dimension to grow.
        file.seek(0)
        write_header(file, header | {"shape": (sum(s.samples for s in description.shards),)})
        content = description.content(location)
        # An old description must never be beside new rows.
        (root / JSON_NAME).unlink(missing_ok=True)
    write_text(root / JSON_NAME, json.dumps(content, indent=1) + "\n")
    cache.compact(content["fingerprint"], [shard.name for shard in description.shards])
    return excluded


def _class_names(root: Path, class_count: int) -> list[str]:
    path = root / CLASSES_NAME
    if class_count == 0 or not path.exists():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of class names")
    if len(names) < class_count:
        raise UserError(f"{path} names {len(names)} classes, but labels go up to {class_count - 1}")
    return names
