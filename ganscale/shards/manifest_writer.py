"""From the indices of single shards to the manifest of the data set."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

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
from ganscale.files import atomic_write
from ganscale.shards.index_cache import IndexCache


def write_manifest(root: Path, location: str, names: list[str], finished: IndexCache) -> int:
    """Puts the indices of all shards together, as the manifest in the folder `root`.

    Returns how many samples were left out. Raises UserError for shards that do not go together.
    """
    shards: list[Shard] = []
    extensions: set[str] = set()
    image_sizes: set[tuple[int, int] | None] = set()
    class_count = left_out = 0
    digest = hashlib.sha256()
    with atomic_write(root / ROWS_NAME) as file:
        write_header = np.lib.format.write_array_header_1_0
        header = {"descr": SAMPLE_ROW.descr, "fortran_order": False, "shape": (0,)}
        write_header(file, header)
        for index in map(finished.load, names):
            left_out += index.left_out
            if not len(index.rows):
                continue
            is_labelled = bool(index.rows["label"][0] >= 0)
            if shards and is_labelled != (class_count > 0):
                raise UserError(
                    f"{index.shard.name} is {'' if is_labelled else 'not '}labelled, unlike "
                    f"{shards[0].name}: label all shards of {root} or none"
                )
            class_count = max(class_count, int(index.rows["label"].max()) + 1)
            shards.append(index.shard)
            extensions.update(index.extensions)
            # None counts as a size of its own: then it is not known that all are the same.
            image_sizes.update((None,) if index.image_sizes is None else index.image_sizes)
            shard = index.shard
            update_fingerprint(digest, shard, index.rows)
            file.write(index.rows.tobytes())
        if not shards:
            raise UserError(f"no sample is left for the manifest in {root}")
        # NumPy leaves room in a header for its first dimension to grow.
        file.seek(0)
        write_header(file, header | {"shape": (sum(shard.samples for shard in shards),)})
        class_names = _class_names(root, class_count)
        # Between the two renames there must be no old description of the new rows.
        (root / JSON_NAME).unlink(missing_ok=True)
    content = {
        "version": VERSION,
        "fingerprint": digest.hexdigest(),
        "location": location,
        "fields": {
            "extensions": sorted(extensions),
            "resolution": image_sizes.pop() if len(image_sizes) == 1 else None,
            "class_count": len(class_names) or class_count,
            "class_names": class_names,
        },
        "shards": [asdict(shard) for shard in shards],
    }
    with atomic_write(root / JSON_NAME) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    finished.summarize(root, content["fingerprint"], [shard.name for shard in shards])
    return left_out


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
