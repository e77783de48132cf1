"""Makes a data set: the images of a source, shuffled, encoded, and split into shards.

The shards are a function of the images and the options: any number of processes and interruptions
gives the same bytes (with the same version of Pillow). A journal beside the shards lists those that
are complete, so the same command, run again, continues where it stopped.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ganscale.data.images.decoding import DecodeError
from ganscale.data.manifest import CLASSES_NAME, JSON_NAME, Manifest
from ganscale.errors import UserError
from ganscale.files import atomic_write, write_text
from ganscale.resolution import Resolution
from ganscale.shards.class_labels import MemberChoice
from ganscale.shards.encoding import Encoded, Encoding
from ganscale.shards.indexing import build_manifest
from ganscale.shards.parallel import explain_full_disk, run_all
from ganscale.shards.sources import (
    JOURNAL_NAME,
    Source,
    SourceImage,
    image_reader,
    list_images,
)
from ganscale.shards.tar_reader import BLOCK_BYTES

_PROBED_IMAGES = 64
_MAX_FILE_BYTES = 1 << 30  # a zip of a few kilobytes can contain a "file" of many gigabytes
_MAX_NAMED = 5


BadImages = list[tuple[str, str]]
"""(name, reason) of images that cannot be decoded and are left out."""


class WriteResult(NamedTuple):
    """The result of `write_shards`.

    kept_shards: written by an earlier run of the same command
    ignored: how many files of the source are not used, by extension or reason
    notes: sentences about what a user may not expect
    """

    manifest: Manifest
    kept_shards: int
    bad_images: BadImages
    ignored: dict[str, int]
    notes: list[str]


class _ShardTask(NamedTuple):
    path: Path
    kind: str
    source_path: str
    first_key: int
    images: list[SourceImage]
    encoding: Encoding


class _Journal:
    """The settings of a command, then a line for each complete shard in the folder `root`.

    Continues the journal of an earlier run with the same `settings`. Raises UserError if the folder
    holds other shards, and as soon as more than a share of `max_bad` of the images are bad.
    Attributes: `shards`, the bad images of each complete one; `bad_count`, their number; `notes`,
    the number of images by note.
    """

    def __init__(self, root: Path, settings: dict[str, Any], max_bad: float):
        self.shards: dict[str, BadImages] = {}
        self.notes: Counter[str] = Counter()
        self.bad_count = 0
        self._path = root / JOURNAL_NAME
        self._image_count, self._max_bad = settings["images"], max_bad
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".*.partial"):  # of a run that was killed
            leftover.unlink()
        if not self._path.exists():
            if any(root.glob("*.tar")):
                raise UserError(f"{root} already contains shards; write into another folder")
            write_text(self._path, json.dumps(settings) + "\n")
            return
        first, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        earlier = json.loads(first)
        if changed := [name for name in settings if settings[name] != earlier.get(name)]:
            raise UserError(
                f"{root} contains the shards of another `ganscale shards write`, with a different "
                f"{changed[0]}; write into another folder, or delete it first"
            )
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the machine stopped while writing it; the shard is written again
            write_text(self._path, "".join([first, *lines]))
        latest = {line[0]: line for line in map(json.loads, lines)}
        for name, size, bad_images, *notes in latest.values():
            path = root / name
            if size == 0 or (path.exists() and path.stat().st_size == size):
                self.shards[name] = [(image, reason) for image, reason in bad_images]
                self.bad_count += len(bad_images)
                self.notes.update(*notes)  # a journal of an earlier version has none
        self._refuse_too_many_bad()

    def add(self, name: str, size: int, bad_images: BadImages, notes: dict[str, int]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, size, bad_images, notes]) + "\n")
        self.shards[name] = bad_images
        self.notes.update(notes)
        self.bad_count += len(bad_images)
        self._refuse_too_many_bad()

    @property
    def bad_images(self) -> BadImages:
        """All bad images, sorted."""
        return sorted(chain.from_iterable(self.shards.values()))

    def _refuse_too_many_bad(self) -> None:
        if self.bad_count > self._max_bad * self._image_count:
            raise UserError(
                f"{self.bad_count} of {self._image_count} images are bad, more than the allowed "
                f"share of {self._max_bad:g} (--max-bad): {describe_bad_images(self.bad_images)}"
            )


def write_shards(
    source: str,
    output: Path | str,
    *,
    resolution: Resolution | None = None,
    channels: int | None = None,
    image_format: str | None = None,
    quality: int | None = None,
    image: str = "",
    classes: str = "",
    class_key: str = "",
    splits: Sequence[str] = (),
    zip_encoding: str = "",
    shard_samples: int | None = None,
    shard_bytes: int = 128 << 20,
    seed: int = 0,
    workers: int = 1,
    max_bad: float = 0.01,
) -> WriteResult:
    """Writes the images of `source` (see `sources.list_images`) as shards into the folder `output`.

    resolution, channels, image_format, quality: see Encoding. By default, files are kept as they
        are if no resolution is given, else stored as PNG; channels are 3, or those of a bundled set
    image: the extension of the images; by default, all formats that can be read
    classes, class_key: folder, json, cls, txt or none, see `source_classes.find_classes`
    splits: folders of the source, to which it is limited
    zip_encoding: of a zip's names that are not marked as UTF-8, see `zip_names.member_names`
    shard_samples: images per shard; by default about `shard_bytes` bytes, estimated from 64 images
    seed: of the order of the images. They are shuffled before they are split, since training only
        shuffles within windows of neighbours: with one class per shard, a batch has few classes
    workers: processes, each with one shard at a time; they do not change the result
    max_bad: share of bad images above which UserError is raised
    """
    root = Path(output)
    if root.resolve() == Path(source).resolve():
        raise UserError(f"the shards need another folder than that of the images, {source}")
    listing = list_images(source, MemberChoice(image, classes, class_key), splits, zip_encoding)
    encoding = Encoding.choose(listing, resolution, channels, image_format, quality)
    order = sorted(listing.images, key=lambda image: _shuffle_key(seed, image.name))
    shard_samples = shard_samples or _shard_samples(listing, order, encoding, shard_bytes)
    settings = {  # each before those that may follow from it
        "source": listing.digest(),
        **asdict(encoding),
        "classes": listing.class_names,
        "images": len(order),
        "seed": seed,
        "shard_samples": shard_samples,
    }
    with explain_full_disk(root):
        journal = _Journal(root, settings, max_bad)
        tasks = _plan_shards(root, listing, order, encoding, shard_samples)
        todo = [task for task in tasks if task.path.name not in journal.shards]
        if todo or not (root / JSON_NAME).exists():
            (root / JSON_NAME).unlink(missing_ok=True)  # an incomplete data set has no manifest
            _write_all(todo, journal, workers, len(order))
            if listing.class_names:
                write_text(root / CLASSES_NAME, json.dumps(listing.class_names) + "\n")
            manifest = build_manifest(root, workers)
        else:
            manifest = Manifest.load(root)
    notes = [*listing.notes, *(f"{text}: {n:,}" for text, n in sorted(journal.notes.items()))]
    return WriteResult(manifest, len(tasks) - len(todo), journal.bad_images, listing.ignored, notes)


def describe_bad_images(bad_images: BadImages) -> str:
    """The first few bad images with their reasons, for a message."""
    named = [f"{name} {reason}" for name, reason in bad_images[:_MAX_NAMED]]
    more = len(bad_images) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def _shuffle_key(seed: int, name: str) -> bytes:
    # A hash, not a generator: the same order with every version of NumPy, and an image added later
    # leaves the others in their order.
    text = f"{seed}:{name}".encode("utf-8", "surrogateescape")  # a name need not be UTF-8
    return hashlib.blake2b(text, digest_size=16).digest()


def _shard_samples(
    source: Source, order: list[SourceImage], encoding: Encoding, shard_bytes: int
) -> int:
    """About how many images make `shard_bytes`."""
    read = image_reader(source.kind, source.path)
    probed = order[:_PROBED_IMAGES]
    sizes = []
    reason = ""
    for image in probed:
        try:
            # A member is a header of one block, and whole blocks of data.
            blocks = 1 - (-len(_encode(read, image, encoding).data) // BLOCK_BYTES)
            sizes.append((blocks + 2 * (image.label >= 0)) * BLOCK_BYTES)
        except DecodeError as error:
            reason = f"{image.name} {error}"
    if not sizes:
        raise UserError(f"the first {len(probed)} images cannot be decoded; the last: {reason}")
    return max(1, shard_bytes * len(sizes) // sum(sizes))


def _plan_shards(
    root: Path, source: Source, order: list[SourceImage], encoding: Encoding, shard_samples: int
) -> list[_ShardTask]:
    return [
        _ShardTask(
            root / f"shard-{first // shard_samples:06d}.tar",
            source.kind,
            source.path,
            first,
            order[first : first + shard_samples],
            encoding,
        )
        for first in range(0, len(order), shard_samples)
    ]


def _write_all(todo: list[_ShardTask], journal: _Journal, workers: int, image_count: int) -> None:
    """Writes the shards `todo`, and adds each to the journal as it is complete."""
    # disable=None: only on a terminal
    with tqdm(total=image_count, unit=" images", disable=None) as progress:
        progress.update(image_count - sum(len(task.images) for task in todo))
        for task, result in run_all(_write_shard, todo, workers):
            journal.add(task.path.name, *result)
            progress.update(len(task.images))
    if journal.bad_count == image_count:
        raise UserError(f"no image can be decoded: {describe_bad_images(journal.bad_images)}")


def _write_shard(task: _ShardTask) -> tuple[int, BadImages, dict[str, int]]:
    """The shard's bytes, bad images, and how many images have a note; without a good image, it has
    0 bytes and no file."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    read = image_reader(task.kind, task.source_path)
    bad_images = []
    notes: Counter[str] = Counter()
    with (
        atomic_write(task.path) as file,
        TarWriter(file, encoder=False, mtime=0, user="ganscale", group="ganscale") as tar,
    ):
        for position, image in enumerate(task.images, task.first_key):
            try:
                extension, data, image_notes = _encode(read, image, task.encoding)
            except DecodeError as error:
                bad_images.append((image.name, str(error)))
                continue
            notes.update(image_notes)
            sample = {"__key__": f"{position:09d}", extension: data}
            if image.label >= 0:
                # TarWriter sorts by extension: the label comes first, so a reader of a cut tar
                # cannot take the image for an unlabelled one.
                sample["cls"] = str(image.label).encode()
            tar.write(sample)
    if len(bad_images) == len(task.images):
        task.path.unlink()
        return 0, bad_images, {}
    return task.path.stat().st_size, bad_images, dict(notes)


def _encode(
    read: Callable[[SourceImage], bytes], image: SourceImage, encoding: Encoding
) -> Encoded:
    if image.size > _MAX_FILE_BYTES:
        raise DecodeError(f"has {image.size:,} bytes, more than the limit of {_MAX_FILE_BYTES:,}")
    try:
        data = read(image)
    except OSError as error:
        raise UserError(
            f"cannot read the image {image.name}: {error}; run the same command to continue"
        ) from error
    return encoding.encode(data)
