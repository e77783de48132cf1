"""The manifest of a folder of shards: what `indexing` finds in each, put together."""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ganscale.data.manifest import (
    CLASSES_NAME,
    JSON_NAME,
    ROWS_NAME,
    SAMPLE_ROW,
    VERSION,
    Manifest,
    Shard,
)
from ganscale.errors import UserError
from ganscale.files import replacing
from ganscale.shards.indexing import ShardIndex, read_index


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
