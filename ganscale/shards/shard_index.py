"""The contents of one shard: the location of each image, and its label.

A shard is a tar in WebDataset's format. A member's name up to the first dot of its base name is the
key of its sample, and the rest is its extension: `key.png` is the image of the sample `key`,
`key.cls` its label. Where WebDataset would silently lose or mix samples (a cut tar, a repeated key,
an image apart from its label), indexing raises.
"""

import re
import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ganscale.data.images.decoding import MAX_PIXELS, DecodeError, image_size
from ganscale.data.labels import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, parse_label
from ganscale.data.manifest import SAMPLE_ROW, Shard
from ganscale.data.shard_reader import LARGEST_IMAGE_BYTES
from ganscale.errors import UserError
from ganscale.shards.interop import IdxReader
from ganscale.shards.tar_reader import Member, TarReader

try:
    import simplejpeg
except ImportError:  # as in decoding
    simplejpeg = None

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_PNG_HEADER = _PNG + b"\0\0\0\rIHDR"
_MAGIC_BYTES = 12  # enough of a file to recognize its format
_MAX_LABEL_BYTES = 16 << 20
_METADATA = re.compile(r"__[^/]*__(/|$)")  # skipped by WebDataset too, such as __MACOSX/

MemberReader = TarReader | IdxReader


@dataclass(frozen=True)
class ShardIndex:
    """A shard's contents.

    rows: (samples,) SAMPLE_ROW, in the tar's order
    extensions: of the images, sorted
    image_sizes: up to two different (height, width), enough to see whether all are the same, from
        images with a readable header; None: sizes were not read
    excluded: how many samples were found and left out on request
    bad: (key, reason) of the samples that cannot be used and have no row
    """

    shard: Shard
    rows: np.ndarray
    extensions: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...] | None
    excluded: int = 0
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Sample:
    key: str
    offset: int = -1
    size: int = 0
    extension: str = ""
    problem: str = ""
    members: dict[str, bytes] = field(default_factory=dict)
    """By extension; only labels have their contents here."""


def read_index(reader: MemberReader, name: str, excluded_keys: Collection[str] = ()) -> ShardIndex:
    """The contents of the shard `name`, read once.

    Raises UserError for a tar whose samples cannot be told apart; bad samples are listed instead.
    """
    samples: list[_Sample] = []
    bad: list[tuple[str, str]] = []
    # With an .idx, images are not read whole, as their sizes would need.
    sizes: set[tuple[int, int]] | None = set() if isinstance(reader, TarReader) else None
    excluded = 0
    for sample in _samples(reader, sizes):
        if sample.key in excluded_keys:
            excluded += 1
        elif sample.problem:
            bad.append((sample.key, sample.problem))
        elif sample.offset < 0:
            problem = (
                f"sample '{sample.key}' has no image, only {', '.join(sorted(sample.members))} "
                f"(images are: {', '.join(IMAGE_EXTENSIONS)})"
            )
            bad.append((sample.key, problem))
        else:
            samples.append(sample)
    if not (samples or bad or excluded):
        raise UserError(f"{reader.name}: the tar is empty")
    labels, unlabelled = _labels(samples)
    rows = np.empty(len(samples), SAMPLE_ROW)
    rows["offset"] = [sample.offset for sample in samples]
    rows["size"] = [sample.size for sample in samples]
    rows["label"] = labels
    if unlabelled:  # then all others have a class
        rows = rows[rows["label"] >= 0]
    return ShardIndex(
        Shard(name, reader.bytes, reader.sha256, len(rows)),
        rows,
        tuple(sorted({sample.extension for sample in samples})),
        None if sizes is None else tuple(sorted(sizes)),
        excluded,
        (*bad, *unlabelled),
    )


def _samples(reader: MemberReader, sizes: set[tuple[int, int]] | None) -> Iterator[_Sample]:
    """The samples of a tar in order; up to two different image sizes are added to `sizes`."""
    seen: set[str] = set()
    sample: _Sample | None = None
    for member in reader:
        name = member[0]
        base = name.rfind("/") + 1
        if name.startswith(".", base) or (name.startswith("__") and _METADATA.match(name)):
            continue
        dot = name.find(".", base)
        if dot < 0 or dot + 1 == len(name):
            raise UserError(
                f"{reader.name}: member '{name}' has no extension, so it belongs to no sample"
            )
        key, extension = name[:dot], name[dot + 1 :].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UserError(
                    f"{reader.name}: sample '{key}' occurs twice (at member '{name}'); the members "
                    "of a sample must follow each other, and its key must be unique"
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
            sample.extension, sample.offset, sample.size = extension, *member[1:]
            sample.problem = sample.problem or _read_image(member, reader, sizes)
        elif extension in LABEL_EXTENSIONS:
            if member[2] > _MAX_LABEL_BYTES:
                sample.problem = f"member '{name}' has {member[2]:,} bytes, too many for a label"
            else:
                sample.members[extension] = reader.data()
    if sample is not None:
        yield sample


def _read_image(member: Member, reader: MemberReader, sizes: set[tuple[int, int]] | None) -> str:
    """Adds the current member's pixel size to `sizes`; returns what is wrong with it, or ""."""
    name, _, size = member
    if size > LARGEST_IMAGE_BYTES:
        return f"member '{name}' has {size:,} bytes, more than the limit of {LARGEST_IMAGE_BYTES:,}"
    is_whole = sizes is not None and len(sizes) < 2
    data = reader.data(None if is_whole else _MAGIC_BYTES)
    if not is_image(data):
        begin = data[:_MAGIC_BYTES]
        return f"member '{name}' is not a JPEG, PNG, WebP or .npy: it begins with {begin!r}"
    if sizes is not None and is_whole and (pixels := pixel_size(data)) is not None:
        sizes.add(pixels)
    return ""


def _labels(samples: list[_Sample]) -> tuple[list[int], list[tuple[str, str]]]:
    """The class of each sample, from the first extension that holds classes; else -1 for all.

    The second value is (key, reason) of the samples whose class is missing or cannot be used.
    """
    for extension in LABEL_EXTENSIONS:
        if not any(extension in sample.members for sample in samples):
            continue
        labels: list[int] = []
        bad: list[tuple[str, str]] = []
        has_label = False
        for sample in samples:
            text = sample.members.get(extension)
            label = parse_label(text, extension)
            has_label |= label is not None
            if label is not None and 0 <= label < 1 << 31:
                labels.append(label)
                continue
            labels.append(-1)
            if label is not None:
                reason = f"the label of '{sample.key}.{extension}' is {label}, not a class"
            elif text is not None and extension == "cls":
                reason = f"the label in '{sample.key}.cls' is not an integer: {text[:40]!r}"
            else:
                reason = (
                    f"sample '{sample.key}' has no label, but others have (.{extension}): "
                    "label all samples or none"
                )
            bad.append((sample.key, reason))
        # If some texts are numbers and others words, they are captions, unless a .cls or a JSON
        # label says that they are classes.
        if not bad or extension == "cls" or (extension == "json" and has_label):
            return labels, bad
    return [-1] * len(samples), []


def is_image(head: bytes) -> bool:
    """Whether `head`, the first _MAGIC_BYTES of a file, belongs to a format that `decoding.decode`
    reads."""
    return head.startswith((_JPEG, _PNG, _NPY)) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def pixel_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of a whole image file once decoded; None if its header is bad.

    As `decoding.image_size`, but that uses Pillow, which takes 20 to 60 us.
    """
    size = None
    if data.startswith(_PNG_HEADER):
        size = _png_size(data)
    elif data.startswith(_NPY) and data[6:8] == b"\x01\0":
        return _cached_size(data[: 10 + int.from_bytes(data[8:10], "little")])
    elif data.startswith(_JPEG) and simplejpeg is not None and b"Exif\0" not in data[:65_536]:
        with suppress(ValueError):
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            size = (int(height), int(width))
    if size is not None and 0 < size[0] * size[1] <= MAX_PIXELS:
        return size
    return _decoder_size(data)


def _decoder_size(data: bytes) -> tuple[int, int] | None:
    try:
        return image_size(data)
    except DecodeError:
        return None


# Arrays of a data set mostly have the same header.
_cached_size = lru_cache(maxsize=64)(_decoder_size)


def _png_size(data: bytes) -> tuple[int, int] | None:
    # Exif can rotate the image; older files have Exif in a text chunk.
    if b"eXIf" in data or b"EXIF" in data or len(data) < 33:
        return None
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width
