"""The contents of one shard: the location of each image, and its label.

A shard is a tar in WebDataset's format. A member's name up to the first dot of its base name is the
key of its sample, and the rest is its extension: `key.png` is the image of the sample `key`,
`key.cls` its label. Where WebDataset would silently lose or mix samples (a cut tar, a repeated key,
an image apart from its label), indexing raises.
"""

import re
import shlex
import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ganscale.data.images.decoding import MAX_PIXELS, DecodeError, image_size, may_have_exif
from ganscale.data.labels import CONVERTED_EXTENSIONS, IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from ganscale.data.manifest import SAMPLE_ROW, Shard
from ganscale.data.shard_reader import LARGEST_IMAGE_BYTES
from ganscale.errors import UserError
from ganscale.shards.class_labels import USUAL_MEMBERS, MemberChoice, find_labels
from ganscale.shards.interop import IdxReader
from ganscale.shards.tar_reader import Member, TarReader

try:
    import simplejpeg
except ImportError:  # as in decoding
    simplejpeg = None

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_PNG_HEADER = _PNG + b"\0\0\0\rIHDR"
_MAGIC_BYTES = 12  # enough of a file to recognize its format
_ARRAY_HEADER_BYTES = 4096
_MAX_LABEL_BYTES = 16 << 20
_METADATA = re.compile(r"__[^/]*__(/|$)")  # skipped by WebDataset too, such as __MACOSX/

MemberReader = TarReader | IdxReader


@dataclass(frozen=True)
class ShardIndex:
    """A shard's contents.

    rows: (samples,) SAMPLE_ROW, in the tar's order
    class_names: of the numbers in `rows`, where the shard has names as labels; else empty
    extensions: of the images, sorted
    image_sizes: up to two different (height, width), enough to see whether all are the same, from
        images with a readable header; None: sizes were not read
    json_keys: what JSON of a sample has, where no class was found
    excluded: how many samples were found and left out on request
    bad: (key, reason) of the samples that cannot be used and have no row
    """

    shard: Shard
    rows: np.ndarray
    extensions: tuple[str, ...]
    image_sizes: tuple[tuple[int, int], ...] | None
    class_names: tuple[str, ...] = ()
    json_keys: tuple[str, ...] = ()
    excluded: int = 0
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Sample:
    key: str
    offset: int = -1
    size: int = 0
    extension: str = ""
    problem: str = ""
    array_problem: str = ""
    """Why its .npy is not an image; a problem only where it has no other image."""
    members: dict[str, bytes] = field(default_factory=dict)
    """By extension; only labels have their contents here."""


def read_index(
    reader: MemberReader,
    name: str,
    excluded_keys: Collection[str] = (),
    choice: MemberChoice = USUAL_MEMBERS,
) -> ShardIndex:
    """The contents of the shard `name`, read once.

    Raises UserError for a tar whose samples cannot be told apart; bad samples are listed instead.
    """
    samples: list[_Sample] = []
    bad: list[tuple[str, str]] = []
    # With an .idx, images are not read whole, as their sizes would need.
    sizes: set[tuple[int, int]] | None = set() if isinstance(reader, TarReader) else None
    excluded = 0
    for sample in _samples(reader, sizes, choice):
        if sample.key in excluded_keys:
            excluded += 1
        elif sample.problem:
            bad.append((sample.key, sample.problem))
        elif sample.offset < 0:
            bad.append((sample.key, sample.array_problem or _no_image(sample, choice)))
        else:
            samples.append(sample)
    if not (samples or bad or excluded):
        raise UserError(f"{reader.name}: the tar is empty")
    labels = find_labels([(sample.key, sample.members) for sample in samples], choice)
    rows = np.empty(len(samples), SAMPLE_ROW)
    rows["offset"] = [sample.offset for sample in samples]
    rows["size"] = [sample.size for sample in samples]
    rows["label"] = labels.numbers
    if labels.bad:  # then all others have a class
        rows = rows[rows["label"] >= 0]
    return ShardIndex(
        Shard(name, reader.bytes, reader.sha256, len(rows)),
        rows,
        tuple(sorted({sample.extension for sample in samples})),
        None if sizes is None else tuple(sorted(sizes)),
        tuple(labels.names),
        labels.json_keys,
        excluded,
        (*bad, *labels.bad),
    )


def _samples(
    reader: MemberReader, sizes: set[tuple[int, int]] | None, choice: MemberChoice
) -> Iterator[_Sample]:
    """The samples of a tar in order; up to two different image sizes are added to `sizes`."""
    image_extensions = (choice.image,) if choice.image else IMAGE_EXTENSIONS
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
        if extension in image_extensions:
            if extension == "npy" and (problem := _array_problem(member, reader)):
                sample.array_problem = problem
                continue
            if sample.offset >= 0:
                sample.problem = (
                    f"sample '{key}' has two images, .{sample.extension} and .{extension}: choose "
                    f"with `--image {sample.extension}`"
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


def _array_problem(member: Member, reader: MemberReader) -> str:
    """Why a .npy cannot be an image: an embedding, say. "" for one that can, or is not an array."""
    head = reader.data(_ARRAY_HEADER_BYTES)
    if not head.startswith(_NPY) or pixel_size(head) is not None:
        return ""
    try:
        image_size(head)
    except DecodeError as error:
        return f"member '{member[0]}' {error}"
    return ""


def _no_image(sample: _Sample, choice: MemberChoice) -> str:
    found = ", ".join(sorted(sample.members))
    if choice.image:
        return f"sample '{sample.key}' has no .{choice.image}, only {found}"
    others = sorted(name for name in sample.members if name.split(".")[-1] in IMAGE_EXTENSIONS)
    hint = f"; `--image {shlex.quote(others[0])}` takes these as the images" if others else ""
    if others and (
        " " in others[0] or others[0][0].isdigit()
    ):  # part of a name, as in `v2.0 b.jpg`
        hint = "; the name of a sample ends at its first dot: rename the files"
    if converted := sorted(sample.members.keys() & set(CONVERTED_EXTENSIONS)):
        hint = f"; `ganscale shards write` makes shards of .{converted[0]} files, also from tars"
    expected = ", ".join(IMAGE_EXTENSIONS)
    return f"sample '{sample.key}' has no image, only {found} (images are: {expected}{hint})"


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
    if may_have_exif(data) or len(data) < 33:  # Exif can rotate the image
        return None
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width
