"""What is inside one shard: where each image lies, and its label.

A shard is a tar in WebDataset's format. Members whose names agree up to the first dot of the base
name are one sample, and the rest of the name says what a member is: `key.png` is the image of the
sample `key`, `key.cls` its label. Where WebDataset loses or mixes samples without a word (a cut
tar, a repeated key, an image apart from its label), indexing stops with a sentence.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ganscale.data.decoding import DecodeError, image_size
from ganscale.data.manifest import SAMPLE_ROW, Shard
from ganscale.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
_LABEL_EXTENSIONS = ("cls", "json", "txt")

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_METADATA = re.compile(r"__[^/]*__(/|$)")  # what WebDataset sets aside, such as __MACOSX/
_BLOCK_BYTES = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardIndex:
    """A shard's contents.

    rows: (samples,) SAMPLE_ROW, in the tar's order
    extensions: those of the images, sorted
    image_sizes: up to two different (height, width), enough to tell whether all are the same;
        images without a readable header are left out
    """

    shard: Shard
    rows: np.ndarray
    extensions: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...]


@dataclass
class _Sample:
    key: str
    image: tarfile.TarInfo | None = None
    extension: str = ""
    extensions: set[str] = field(default_factory=set)
    label_texts: dict[str, bytes] = field(default_factory=dict)


def index_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """The shard at `path` and its samples, (samples,) SAMPLE_ROW.

    Raises UserError, naming shard and member, for a file that is no tar, is cut, is empty, or whose
    members do not form samples of one image each, all of them labelled or none.
    """
    index = read_index(path)
    return index.shard, index.rows


def read_index(path: Path) -> ShardIndex:
    """All that `build_manifest` wants to know of the shard at `path`. Raises as `index_shard`."""
    rows: list[tuple[int, int]] = []
    label_texts: list[dict[str, bytes]] = []
    keys: list[str] = []
    extensions: set[str] = set()
    sizes: set[tuple[int, int]] = set()
    with path.open("rb") as file:
        for sample in _samples(path, file):
            if sample.image is None:
                raise UserError(
                    f"{path}: sample '{sample.key}' has no image, only "
                    f"{', '.join(sorted(sample.extensions))} (images are: "
                    f"{', '.join(IMAGE_EXTENSIONS)})"
                )
            rows.append((sample.image.offset_data, sample.image.size))
            label_texts.append(sample.label_texts)
            keys.append(sample.key)
            extensions.add(sample.extension)
            if len(sizes) < 2:
                file.seek(sample.image.offset_data)
                # The loader counts and replaces broken images: no reason to refuse a shard.
                with suppress(DecodeError):
                    sizes.add(image_size(file.read(sample.image.size)))
        sha256, size = _checksum(file)
    if not rows:
        raise UserError(f"{path}: the tar is empty")
    table = np.empty(len(rows), SAMPLE_ROW)
    table["offset"], table["size"] = np.array(rows, np.uint64).T
    table["label"] = _labels(path, keys, label_texts)
    shard = Shard(path.name, size, sha256, len(rows))
    return ShardIndex(shard, table, tuple(sorted(extensions)), tuple(sorted(sizes)))


def _samples(path: Path, file: BinaryIO) -> Iterator[_Sample]:
    """The samples of a tar in order. What tarfile does not mind but would lose data, raises."""
    seen: set[str] = set()
    sample: _Sample | None = None
    for member in tar_members(path, file):
        if _METADATA.match(member.name) or Path(member.name).name.startswith("."):
            continue
        match = _NAME.fullmatch(member.name)
        if match is None:
            raise UserError(
                f"{path}: member '{member.name}' has no extension and so belongs to no sample"
            )
        key, extension = match[1], match[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UserError(
                    f"{path}: sample '{key}' occurs twice (at member '{member.name}'); "
                    "the members of a sample must follow each other, with a key of their own"
                )
            seen.add(key)
            sample = _Sample(key)
        if extension in sample.extensions:
            raise UserError(f"{path}: member '{member.name}' occurs twice")
        sample.extensions.add(extension)
        if extension in IMAGE_EXTENSIONS:
            if sample.image is not None:
                raise UserError(
                    f"{path}: sample '{key}' has two images, .{sample.extension} and .{extension}"
                )
            if member.size >= 1 << 32:
                raise UserError(f"{path}: member '{member.name}' is larger than 4 GiB")
            sample.image, sample.extension = member, extension
        elif extension in _LABEL_EXTENSIONS:
            file.seek(member.offset_data)
            sample.label_texts[extension] = file.read(member.size)
    if sample is not None:
        yield sample


def tar_members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar, after the last of which the tar is known to be complete.

    `file` is the tar at `path`, open; it may be moved about in between. Raises UserError.
    """
    file_bytes = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > file_bytes:
                    raise UserError(
                        f"{path}: the tar is cut: member '{member.name}' ends at byte "
                        f"{member.offset_data + member.size:,} of {file_bytes:,}"
                    )
                if member.issym() or member.islnk() or member.issparse():
                    raise UserError(
                        f"{path}: member '{member.name}' is a link or sparse, not a plain file "
                        "(GNU tar writes plain files with --dereference --hard-dereference)"
                    )
                if member.isfile():
                    yield member
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header for as long as it is open
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable tar ({error})") from error
    # tarfile takes a missing end, or a header with a wrong checksum, for the end of the archive.
    file.seek(end)
    if file.read(2 * _BLOCK_BYTES) != bytes(2 * _BLOCK_BYTES):
        raise UserError(
            f"{path}: the tar is cut or damaged at byte {end:,}: no further member and no end of "
            "archive there"
        )
    while chunk := file.read(_CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise UserError(
                f"{path}: there is more data behind the end of the archive (byte {end:,}); "
                "tars joined with cat have to be joined with `tar --concatenate`"
            )


def _checksum(file: BinaryIO) -> tuple[str, int]:
    """SHA-256 in hexadecimal and size in bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest(), file.tell()


def _labels(path: Path, keys: list[str], texts: list[dict[str, bytes]]) -> list[int]:
    """The class of each sample, from the first kind of member that holds classes; else all -1."""
    for extension in _LABEL_EXTENSIONS:
        labels = []
        for key, members in zip(keys, texts, strict=True):
            label = _label(members.get(extension), extension)
            if label is not None and not 0 <= label < 1 << 31:
                raise UserError(f"{path}: the label of '{key}.{extension}' is {label}, no class")
            if label is None and extension == "cls" and extension in members:
                raise UserError(
                    f"{path}: the label in '{key}.cls' is no integer: {members['cls'][:40]!r}"
                )
            labels.append(label)
        unlabelled = [key for key, label in zip(keys, labels, strict=True) if label is None]
        if not unlabelled:
            return labels
        # A text that is a number in one sample and words in another is a caption.
        if len(unlabelled) < len(keys) and extension != "txt":
            raise UserError(
                f"{path}: sample '{unlabelled[0]}' has no label, but others have "
                f"(.{extension}): label all samples or none"
            )
    return [-1] * len(keys)


def _label(text: bytes | None, extension: str) -> int | None:
    """The integer in `text`; of a JSON object, that of its "label" or "class". None without one."""
    if text is None:
        return None
    try:
        if extension != "json":
            return int(text.decode("ascii"))
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    label = value.get("label", value.get("class"))
    return label if type(label) is int else None
