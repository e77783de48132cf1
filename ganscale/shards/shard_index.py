"""What is inside one shard: where each image lies, and its label.

A shard is a tar in WebDataset's format. Members whose names agree up to the first dot of the base
name are one sample, and the rest of the name says what a member is: `key.png` is the image of the
sample `key`, `key.cls` its label. Where WebDataset loses or mixes samples without a word (a cut
tar, a repeated key, an image apart from its label), indexing stops with a sentence.
"""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ganscale.data.labels import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, parse_label
from ganscale.data.manifest import SAMPLE_ROW, Shard
from ganscale.data.shard_reader import LARGEST_IMAGE_BYTES
from ganscale.errors import UserError
from ganscale.shards.image_headers import MAGIC_BYTES, is_image, pixel_size
from ganscale.shards.tar_reader import Member, Reader, TarReader

_MAX_LABEL_BYTES = 16 << 20
_METADATA = re.compile(r"__[^/]*__(/|$)")  # what WebDataset sets aside, such as __MACOSX/


@runtime_checkable
class MemberReader(Protocol):
    """The members of a shard in order, and the bytes of the one that was reached last."""

    @property
    def name(self) -> str: ...

    def __iter__(self) -> Iterator[Member]: ...

    def data(self, limit: int | None = None) -> bytes: ...


@dataclass(frozen=True)
class ShardIndex:
    """A shard's contents.

    rows: (samples,) SAMPLE_ROW, in the tar's order
    extensions: those of the images, sorted
    image_sizes: up to two different (height, width), enough to tell whether all are the same;
        images without a readable header are left out; None: nobody looked
    left_out: samples that were to be left out, and were found
    bad: (key, sentence) of the samples that cannot be used and have no row
    """

    shard: Shard
    rows: np.ndarray
    extensions: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...] | None
    left_out: int = 0
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Sample:
    key: str
    offset: int = -1
    size: int = 0
    extension: str = ""
    problem: str = ""
    members: dict[str, bytes] = field(default_factory=dict)
    """Of every extension; the contents of labels only."""


def index_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """The shard at `path` and its samples, (samples,) SAMPLE_ROW.

    Raises UserError, naming shard and member, for a file that is no tar, is cut, is empty, or whose
    members do not form samples of one image each, all of them labelled or none.
    """
    with path.open("rb") as file:
        index = read_index(file, path.name, str(path))
    if index.bad:
        raise UserError(describe_bad(str(path), index.bad))
    return index.shard, index.rows


def describe_bad(label: str, bad: Collection[tuple[str, str]]) -> str:
    """The first of a shard's bad samples, for a message."""
    more = f" (and {len(bad) - 1} more bad samples)" if len(bad) > 1 else ""
    return f"{label}: {next(iter(bad))[1]}{more}"


def read_index(file: Reader, name: str, label: str, left_out: Collection[str] = ()) -> ShardIndex:
    """The contents of a tar that is read to its end, once, from where `file` stands.

    name, label: the shard's in the manifest, and in messages
    left_out: keys of samples to pass over

    Raises UserError for a tar whose samples cannot be told apart; bad samples are listed instead.
    """
    digest = hashlib.sha256()
    reader = TarReader(file, label, digest)
    index = index_members(reader, left_out)
    shard = Shard(name, reader.bytes, digest.hexdigest(), len(index.rows))
    return ShardIndex(
        shard, index.rows, index.extensions, index.image_sizes, index.left_out, index.bad
    )


def index_members(
    reader: MemberReader, left_out: Collection[str] = (), looks_at_sizes: bool = True
) -> ShardIndex:
    """The samples that the members form; the index's shard has neither name nor size yet.

    `looks_at_sizes` reads images whole until two sizes are known. Raises as `read_index`.
    """
    rows: list[tuple[int, int]] = []
    texts: list[dict[str, bytes]] = []
    keys: list[str] = []
    bad: list[tuple[str, str]] = []
    extensions: set[str] = set()
    sizes: set[tuple[int, int]] = set()
    found = 0
    for sample in _samples(reader, sizes if looks_at_sizes else None):
        found += 1
        if sample.key in left_out:
            continue
        if not sample.problem and sample.offset < 0:
            sample.problem = (
                f"sample '{sample.key}' has no image, only {', '.join(sorted(sample.members))} "
                f"(images are: {', '.join(IMAGE_EXTENSIONS)})"
            )
        if sample.problem:
            bad.append((sample.key, sample.problem))
            continue
        rows.append((sample.offset, sample.size))
        texts.append(sample.members)
        keys.append(sample.key)
        extensions.add(sample.extension)
    if not found:
        raise UserError(f"{reader.name}: the tar is empty")
    table = np.empty(len(rows), SAMPLE_ROW)
    if rows:
        table["offset"], table["size"] = np.array(rows, np.uint64).T
    labels, unlabelled = _labels(keys, texts)
    table["label"] = labels
    return ShardIndex(
        Shard("", 0, "", len(rows)),
        table,
        tuple(sorted(extensions)),
        tuple(sorted(sizes)) if looks_at_sizes else None,
        found - len(rows) - len(bad),
        (*bad, *unlabelled),
    )


def _samples(reader: MemberReader, sizes: set[tuple[int, int]] | None) -> Iterator[_Sample]:
    """The samples of a tar in order; `sizes` is given up to two different sizes of images."""
    seen: set[str] = set()
    sample: _Sample | None = None
    for member in reader:
        name, offset, size = member
        base = name.rfind("/") + 1
        if name.startswith(".", base) or (name.startswith("__") and _METADATA.match(name)):
            continue
        dot = name.find(".", base)
        if dot < 0 or dot + 1 == len(name):
            raise UserError(
                f"{reader.name}: member '{name}' has no extension and so belongs to no sample"
            )
        key, extension = name[:dot], name[dot + 1 :].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UserError(
                    f"{reader.name}: sample '{key}' occurs twice (at member '{name}'); "
                    "the members of a sample must follow each other, with a key of their own"
                )
            seen.add(key)
            sample = _Sample(key)
        if extension in sample.members:
            sample.problem = f"member '{name}' occurs twice"
            continue
        sample.members[extension] = b""
        if extension in IMAGE_EXTENSIONS:
            if sample.offset >= 0:
                sample.problem = (
                    f"sample '{key}' has two images, .{sample.extension} and .{extension}"
                )
            sample.offset, sample.size, sample.extension = offset, size, extension
            if size > LARGEST_IMAGE_BYTES:
                sample.problem = (
                    f"member '{name}' has {size:,} bytes, more than the limit of "
                    f"{LARGEST_IMAGE_BYTES:,}"
                )
                continue
            wanted = sizes if sizes is not None and len(sizes) < 2 else None
            data = reader.data(MAGIC_BYTES if wanted is None else None)
            if not is_image(data):
                sample.problem = sample.problem or (
                    f"member '{name}' is no JPEG, PNG, WebP or .npy: it begins with "
                    f"{data[:MAGIC_BYTES]!r}"
                )
            elif wanted is not None and (pixels := pixel_size(data)) is not None:
                wanted.add(pixels)
        elif extension in LABEL_EXTENSIONS:
            if size > _MAX_LABEL_BYTES:
                sample.problem = f"member '{name}' has {size:,} bytes, too many for a label"
            else:
                sample.members[extension] = reader.data()
    if sample is not None:
        yield sample


def _labels(
    keys: list[str], texts: list[dict[str, bytes]]
) -> tuple[list[int], list[tuple[str, str]]]:
    """The class of each sample, from the first kind of member that holds classes; else all -1.

    And (key, sentence) of the samples that have no class though others do, or none that can be.
    """
    for extension in LABEL_EXTENSIONS:
        if not any(extension in members for members in texts):
            continue
        labels: list[int] = []
        bad: list[tuple[str, str]] = []
        has_label = False
        for key, members in zip(keys, texts, strict=True):
            text = members.get(extension)
            label = parse_label(text, extension)
            if label is None:
                if text is not None and extension == "cls":
                    sentence = f"the label in '{key}.cls' is no integer: {text[:40]!r}"
                else:
                    sentence = (
                        f"sample '{key}' has no label, but others have (.{extension}): "
                        "label all samples or none"
                    )
                bad.append((key, sentence))
            else:
                has_label = True
                if not 0 <= label < 1 << 31:
                    bad.append((key, f"the label of '{key}.{extension}' is {label}, no class"))
                    label = None
            labels.append(-1 if label is None else label)
        if not bad:
            return labels, []
        # A text that is a number in one sample and words in another is a caption.
        if extension == "cls" or (extension == "json" and has_label):
            return labels, bad
    return [-1] * len(keys), []
