"""Makes a data set: images of a source, shuffled, encoded, and cut into shards.

The shards are a function of the source's images and the options alone: any number of processes, and
any number of interruptions, give the same bytes (with the same version of Pillow). What was asked
for and which shards are finished stands in `writing.jsonl` beside them, so the same command, run
again, goes on where it was stopped.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ganscale.data.images.decoding import DecodeError
from ganscale.data.manifest import CLASSES_NAME, JSON_NAME, Manifest
from ganscale.errors import UserError
from ganscale.files import atomic_write
from ganscale.shards import sources
from ganscale.shards.encoding import Encoding
from ganscale.shards.indexing import build_manifest
from ganscale.shards.parallel import run_all, saying_when_full
from ganscale.shards.sources import Source, SourceImage

DEFAULT_SHARD_BYTES = 128 << 20
JOURNAL_NAME = "writing.jsonl"

_PROBED_IMAGES = 64
_MAX_FILE_BYTES = 1 << 30  # a zip of some kilobytes can hold a "file" of many gigabytes
_TAR_BLOCK_BYTES = 512  # a member is a block of header, and whole blocks of data
_NAMED_BROKEN = 5


class Report(NamedTuple):
    """What `write_shards` did.

    kept_shards: finished by an earlier run of the same command
    broken: (name, reason) of the images that could not be decoded and were left out
    ignored: how many files of the source were no images, by extension
    """

    manifest: Manifest
    kept_shards: int
    bad_samples: list[tuple[str, str]]
    ignored: dict[str, int]


class _ShardTask(NamedTuple):
    path: Path
    kind: str
    source_path: str
    first_key: int
    images: list[SourceImage]
    encoding: Encoding


class _Finished(NamedTuple):
    """A line of the journal: a shard that is complete, and what was left out of it."""

    shard: str
    bytes: int
    bad_samples: list[tuple[str, str]]


def write_shards(
    source: str,
    output: Path | str,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    image_format: str | None = None,
    quality: int | None = None,
    classes: str = "none",
    shard_samples: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    workers: int = 1,
    max_bad: float = 0.01,
) -> Report:
    """Writes the images of `source` (see `sources.list_images`) as shards into the folder `output`.

    resolution, channels, image_format, quality: see Encoding. By default files are kept as they are
        if no resolution is asked for, else PNG; channels are 3, or the bundled set's own
    classes: "folder" or "none", see `sources.list_images`
    shard_samples: images a shard; by default so many that a shard has about `shard_bytes` bytes,
        judged by encoding 64 of them
    seed: of the order of the images. They are shuffled before they are cut into shards, since a
        training run shuffles only within windows of neighbours: with a class a shard, a batch would
        hold few classes
    workers: processes, each with a shard at a time; they do not change the result
    max_bad: share of images that may be broken before that is an error

    Raises UserError.
    """
    listing = sources.list_images(source, classes)
    encoding = _choose_encoding(listing, resolution, channels, image_format, quality)
    order = sorted(listing.images, key=lambda image: _shuffle_key(seed, image.name))
    if shard_samples is None:
        shard_samples = _estimate_shard_samples(listing, order, encoding, shard_bytes)
    root = Path(output)
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*.partial"):  # of a run that was killed
        leftover.unlink()
    command = {
        **asdict(encoding),
        "shard_samples": shard_samples,
        "seed": seed,
        "classes": listing.class_names,
        "images": len(order),
        "source": listing.digest(),
    }
    with saying_when_full(root):
        finished = _open_journal(root, command)
    tasks = [
        _ShardTask(
            root / f"shard-{first // shard_samples:06d}.tar",
            listing.kind,
            listing.path,
            first,
            order[first : first + shard_samples],
            encoding,
        )
        for first in range(0, len(order), shard_samples)
    ]
    todo = [task for task in tasks if task.path.name not in finished]
    bad_samples = [image for shard in finished.values() for image in shard.bad_samples]
    _refuse_too_many_bad(bad_samples, len(order), max_bad)
    if not todo and (root / JSON_NAME).exists():
        return Report(Manifest.load(root), len(tasks), sorted(bad_samples), listing.ignored)
    (root / JSON_NAME).unlink(missing_ok=True)  # until all is written, this is no data set
    progress = tqdm(total=len(order), unit=" images", disable=None)  # None: on a terminal only
    journal_path = root / JOURNAL_NAME
    with saying_when_full(root), progress, journal_path.open("a", encoding="utf-8") as journal:
        progress.update(len(order) - sum(len(task.images) for task in todo))
        for task, shard in run_all(_write_shard, todo, workers):
            journal.write(json.dumps(shard) + "\n")
            journal.flush()
            progress.update(len(task.images))
            bad_samples += shard.bad_samples
            _refuse_too_many_bad(bad_samples, len(order), max_bad)
    if len(bad_samples) == len(order):
        raise UserError(f"no image of {source} can be decoded: {describe_bad_images(bad_samples)}")
    if listing.class_names:
        with saying_when_full(root), atomic_write(root / CLASSES_NAME) as file:
            file.write((json.dumps(listing.class_names) + "\n").encode())
    manifest = build_manifest(root, workers)
    return Report(manifest, len(tasks) - len(todo), sorted(bad_samples), listing.ignored)


def describe_bad_images(bad_samples: list[tuple[str, str]]) -> str:
    """The first few bad images with their reasons, for a message."""
    named = [f"{name} {reason}" for name, reason in sorted(bad_samples)[:_NAMED_BROKEN]]
    more = len(bad_samples) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def _refuse_too_many_bad(bad_samples: list[tuple[str, str]], images: int, max_bad: float) -> None:
    if len(bad_samples) > max_bad * images:
        raise UserError(
            f"{len(bad_samples)} of {images} images are broken, more than the allowed share of "
            f"{max_bad:g} (--max-bad): {describe_bad_images(bad_samples)}"
        )


def _choose_encoding(
    source: Source,
    resolution: int | None,
    channels: int | None,
    image_format: str | None,
    quality: int | None,
) -> Encoding:
    is_bundled = source.kind == "bundled"
    if image_format is None:
        is_kept = resolution is None and channels is None and not is_bundled
        image_format = "keep" if is_kept else "png"
    if image_format == "keep" and (resolution is not None or channels is not None):
        raise UserError("the format keep stores files as they are: no resolution, no channels")
    if channels is None:
        channels = 1 if is_bundled and source.path == "mnist" else 3
    return Encoding(resolution, channels, image_format, quality)


def _shuffle_key(seed: int, name: str) -> bytes:
    # A hash, not a generator: the same order with every version of NumPy, and an image added later
    # leaves the others in their order.
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()


def _estimate_shard_samples(
    source: Source, order: list[SourceImage], encoding: Encoding, shard_bytes: int
) -> int:
    read = sources.reader(source.kind, source.path)
    sizes = []
    reason = ""
    for image in order[:_PROBED_IMAGES]:
        try:
            blocks = 1 - (-len(_encode(read, image, encoding)[1]) // _TAR_BLOCK_BYTES)
            sizes.append((blocks + 2 * (image.label >= 0)) * _TAR_BLOCK_BYTES)
        except DecodeError as error:
            reason = f"{image.name} {error}"
    if not sizes:
        raise UserError(
            f"none of {len(order[:_PROBED_IMAGES])} images can be decoded, the last: {reason}"
        )
    return max(1, shard_bytes * len(sizes) // sum(sizes))


def _open_journal(root: Path, command: dict[str, object]) -> dict[str, _Finished]:
    """The finished shards of an earlier run of the same command, by name.

    Begins the journal when there is none. Raises UserError if the folder holds other shards.
    """
    path = root / JOURNAL_NAME
    if not path.exists():
        if any(root.glob("*.tar")):
            raise UserError(f"{root} holds shards already; write into another folder")
        with atomic_write(path) as file:
            file.write((json.dumps(command) + "\n").encode())
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    earlier = json.loads(lines[0])
    changed = [name for name in command if command[name] != earlier.get(name)]
    if changed:
        raise UserError(
            f"{root} holds the shards of another `ganscale shards write`, with other "
            f"{', '.join(changed)}; write into another folder, or delete it first"
        )
    finished = {}
    for line in lines[1:]:
        if not line.endswith("\n"):
            break  # the machine stopped while writing it; the shard is made again
        name, size, bad_samples = json.loads(line)
        shard = _Finished(name, size, [(image, reason) for image, reason in bad_samples])
        # A shard without a single good image has no file.
        is_there = (root / name).exists() and (root / name).stat().st_size == size
        if is_there or size == 0:
            finished[name] = shard
        else:
            finished.pop(name, None)
    if lines[1:] and not lines[-1].endswith("\n"):
        with atomic_write(path) as file:
            file.write("".join(lines[:-1]).encode())
    return finished


def _write_shard(task: _ShardTask) -> _Finished:
    # Here, since webdataset imports torch, which takes seconds that reading no shard needs.
    from webdataset.writer import TarWriter

    read = sources.reader(task.kind, task.source_path)
    bad_samples = []
    with (
        atomic_write(task.path) as file,
        TarWriter(file, encoder=False, mtime=0, user="ganscale", group="ganscale") as tar,
    ):
        for position, image in enumerate(task.images, task.first_key):
            try:
                extension, data = _encode(read, image, task.encoding)
            except DecodeError as error:
                bad_samples.append((image.name, str(error)))
                continue
            sample = {"__key__": f"{position:09d}", extension: data}
            if image.label >= 0:
                # TarWriter sorts by extension: the label comes first, so no reader of a cut tar
                # can take the image for an unlabelled one.
                sample["cls"] = str(image.label).encode()
            tar.write(sample)
    if len(bad_samples) == len(task.images):
        task.path.unlink()
        return _Finished(task.path.name, 0, bad_samples)
    return _Finished(task.path.name, task.path.stat().st_size, bad_samples)


def _encode(
    read: Callable[[SourceImage], bytes], image: SourceImage, encoding: Encoding
) -> tuple[str, bytes]:
    if image.size > _MAX_FILE_BYTES:
        raise DecodeError(f"has {image.size:,} bytes, more than the limit of {_MAX_FILE_BYTES:,}")
    try:
        data = read(image)
    except OSError as error:
        raise UserError(
            f"cannot read the image {image.name}: {error}; the same command goes on from here"
        ) from error
    return encoding.encode(data)
