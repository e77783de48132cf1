"""Where the images of a new data set come from: a folder, zip, tar, or a bundled set.

Nothing is left out without being counted: a folder that cannot be listed is an error.
"""

import errno
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ganscale.data.images.decoding import DecodeError
from ganscale.data.labels import CONVERTED_EXTENSIONS, IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from ganscale.data.manifest import JSON_NAME, ROWS_NAME
from ganscale.errors import UserError
from ganscale.shards import bundled
from ganscale.shards.class_labels import USUAL_MEMBERS, MemberChoice
from ganscale.shards.source_classes import find_classes
from ganscale.shards.tar_reader import TarReader
from ganscale.shards.zip_names import member_names

JOURNAL_NAME = "writing.jsonl"
"""Beside the shards of a data set that is being written."""

_BUNDLED = "bundled:"
_EXTENSIONS = (*IMAGE_EXTENSIONS, *CONVERTED_EXTENSIONS)
_ZIP_MAGIC = b"PK\x03\x04"
_MAGIC, _MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8"), 8
"""How the images begin that are found under other names."""
_ZIP_ERRORS = zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError
_ZIP_ENCRYPTED = 1  # a flag of a member
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}


class SourceImage(NamedTuple):
    """One image file of a source.

    name: with / between folders, the same on every machine; only archives may repeat one
    size: of the file, in bytes
    position: its first byte in a tar, its index in a zip or a bundled set; else 0
    label: its class, -1 if unlabelled
    """

    name: str
    size: int
    position: int
    label: int = -1


@dataclass(frozen=True)
class Source:
    """A list of images, which `image_reader` reads.

    kind: folder, zip, tar or bundled
    path: the folder, the archive, or the bundled set's name
    images: sorted by name
    class_names: empty where classes are numbers, and for unlabelled images
    ignored: how many files are not used, by extension or reason
    notes: sentences about what a user may not expect
    """

    kind: str
    path: str
    images: list[SourceImage]
    class_names: list[str]
    ignored: dict[str, int]
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of names, sizes and labels, to notice whether the source has changed."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr((image.name, image.size, image.label)).encode())
        return digest.hexdigest()


def list_images(
    source: str,
    choice: MemberChoice = USUAL_MEMBERS,
    splits: Sequence[str] = (),
    zip_encoding: str = "",
) -> Source:
    """All images of `source`: `bundled:NAME`, or the path of a folder, a .zip or a .tar.

    choice: the extension of the images, and where their classes are, see `find_classes`
    splits: folders within the source, to which it is limited
    zip_encoding: see `zip_names.member_names`

    Raises UserError for a source that is missing, not an archive, or without images, and as
    `find_classes`.
    """
    if source.startswith(_BUNDLED):
        if splits or choice not in (USUAL_MEMBERS, MemberChoice(classes="none")):
            raise UserError(
                "a bundled set has its own images and classes: drop the options for them"
            )
        name = source.removeprefix(_BUNDLED)
        _, labels, class_names = bundled.load(name)
        size = len(_read_bundled(name, 0))
        if choice.classes == "none":
            labels, class_names = np.full_like(labels, -1), []
        images = [SourceImage(f"{i:06d}", size, i, int(label)) for i, label in enumerate(labels)]
        return Source("bundled", name, images, class_names, {})
    splits = [split.strip("/") for split in splits]
    ignored: Counter[str] = Counter()
    kind, files, name_notes = _list_files(Path(source), zip_encoding, ignored)
    is_misnamed = partial(_is_misnamed, kind, source)
    images, others = _sorted_out(files, choice.image, splits, is_misnamed, ignored)
    if not images:
        below = f" below {' or '.join(splits)}" if splits else ""
        expected = choice.image or ", ".join(_EXTENSIONS)
        raise UserError(f"no images in {source}{below} (looked for: {expected})")
    file_of = {file.name: file for file in others}

    def read(name: str) -> bytes:
        ignored[_extension(name.rpartition("/")[2])] -= 1  # it holds a label
        try:
            return image_reader(kind, source)(file_of[name])
        except (OSError, DecodeError) as error:
            raise UserError(f"cannot read {name} of {source}: {error}") from error

    names = [image.name for image in images]
    numbers, class_names, notes = find_classes(source, names, list(file_of), read, choice, splits)
    labelled = [image._replace(label=number) for image, number in zip(images, numbers, strict=True)]
    counts = {reason: count for reason, count in sorted(ignored.items()) if count > 0}
    return Source(
        kind, source, labelled, class_names, counts, (*name_notes, *_repeated(images), *notes)
    )


def _list_files(
    path: Path, zip_encoding: str, ignored: Counter[str]
) -> tuple[str, Iterable[SourceImage], list[str]]:
    """The kind of the source; its files, also folders, whose names end with a slash; and notes.
    What is neither is counted in `ignored`."""
    if path.is_dir():
        return "folder", _walk(path, ignored), []
    if not path.exists():
        raise UserError(f"no folder, zip or tar at {path}")
    if not path.is_file():  # to open a named pipe would block
        raise UserError(f"{path} is not a folder, zip or tar, but a pipe or device")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4" or zipfile.is_zipfile(path)
    notes: list[str] = []
    if is_zip:
        listed = _zip_members(path)
        names, notes = member_names(listed, zip_encoding)
        members = zip(names, range(len(names)), [m.file_size for m in listed], strict=True)
        kind = "zip"
    elif tarfile.is_tarfile(path):
        with path.open("rb") as file:
            members = list(TarReader(file, str(path)))
        kind = "tar"
    else:
        with path.open("rb") as file:
            if file.read(4) == _ZIP_MAGIC:
                raise UserError(f"{path} is a zip whose end is missing, as after a broken download")
        raise UserError(f"{path} is not a folder, zip or uncompressed tar of images")
    images = (
        SourceImage(name.removeprefix("./"), size, position) for name, position, size in members
    )
    return kind, images, notes


def _zip_members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is a damaged zip, perhaps cut short: {error}") from error
    if any(member.header_offset < 0 for member in members):
        raise UserError(f"{path} is a damaged zip: its beginning is missing")
    if any(member.flag_bits & _ZIP_ENCRYPTED for member in members):
        raise UserError(f"{path} is encrypted: unpack it, and give the folder")
    methods = {member.compress_type for member in members} - _ZIP_METHODS
    if methods:
        raise UserError(
            f"{path} is compressed by a method that Python does not read (number {min(methods)}; 9 "
            "is Deflate64, of Windows for large files): unpack it, and give the folder"
        )
    return members


@lru_cache(maxsize=1)
def image_reader(kind: str, path: str) -> Callable[..., bytes]:
    """A function of a SourceImage that reads the bytes of its file, or as many as a `limit`.

    It raises OSError, and DecodeError for a damaged member of an archive. The last reader is
    cached, since opening a large zip takes seconds.
    """

    def read_file(image: SourceImage, limit: int = -1) -> bytes:
        with Path(path, image.name).open("rb") as file:
            return file.read(limit)

    def read_tar(image: SourceImage, limit: int = -1) -> bytes:
        count = image.size if limit < 0 else min(limit, image.size)
        return np.fromfile(path, "B", count, offset=image.position).tobytes()

    if kind == "bundled":
        return lambda image: _read_bundled(path, image.position)
    if kind != "zip":
        return read_file if kind == "folder" else read_tar
    archive = zipfile.ZipFile(path)
    members = archive.infolist()

    def read_member(image: SourceImage, limit: int = -1) -> bytes:
        try:
            with archive.open(members[image.position]) as file:
                return file.read(limit)
        except _ZIP_ERRORS as error:
            raise DecodeError(f"cannot be unpacked: {error}") from error

    return read_member


def _read_bundled(name: str, index: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, bundled.load(name).images[index])
    return stream.getvalue()


def _walk(root: Path, ignored: Counter[str]) -> Iterator[SourceImage]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    read = [root.resolve()]
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        if Path(folder) != root and (JOURNAL_NAME in names or {JSON_NAME, ROWS_NAME} <= {*names}):
            ignored["(folder of a data set)"] += 1
            subfolders.clear()
            continue
        shown = [name for name in subfolders if not _is_hidden(name)]
        if len(shown) < len(subfolders):
            ignored["(hidden)"] += len(subfolders) - len(shown)
        subfolders[:] = shown
        if not names and Path(folder) != root:
            yield SourceImage(f"{Path(folder).relative_to(root).as_posix()}/", 0, 0)
        for name in names:
            path = Path(folder, name)
            try:
                status = path.stat()
            except OSError as error:
                is_broken_link = error.errno in (errno.ENOENT, errno.ELOOP)
                if is_broken_link and _extension(name) not in _EXTENSIONS:
                    ignored["(broken link)"] += 1
                    continue
                reason = f"{error.strerror}{' (a broken link)' if is_broken_link else ''}"
                raise UserError(f"cannot read {path}: {reason}") from error
            if stat.S_ISREG(status.st_mode):
                yield SourceImage(path.relative_to(root).as_posix(), status.st_size, 0)
            else:  # to open a named pipe would block
                ignored["(pipe, socket or device)"] += 1
        for link in (Path(folder, name) for name in subfolders):
            if link.is_symlink():
                target = link.resolve()
                if any(target.is_relative_to(p) or p.is_relative_to(target) for p in read):
                    raise UserError(
                        f"{link} is a link to a folder whose images are read anyway, or to one "
                        "above it: remove the link"
                    )
                read.append(target)


def _sorted_out(
    files: Iterable[SourceImage],
    extension: str,
    splits: Sequence[str],
    is_misnamed: Callable[[SourceImage], bool],
    ignored: Counter[str],
) -> tuple[list[SourceImage], list[SourceImage]]:
    """The images, sorted by name, and the other files, which are counted in `ignored`."""
    images: list[SourceImage] = []
    others: list[SourceImage] = []
    for file in files:
        base = file.name.rpartition("/")[2]
        kind = _extension(base)
        is_image = base.lower().endswith(f".{extension}") if extension else kind in _EXTENSIONS
        if not base:
            others.append(file)
        elif any(map(_is_hidden, file.name.split("/"))):
            ignored["(hidden)"] += 1
        elif splits and not file.name.startswith(tuple(f"{split}/" for split in splits)):
            ignored["(in other folders)"] += 1
            others.append(file)
        elif is_image or (not extension and is_misnamed(file)):
            images.append(file)
        else:
            ignored[kind] += 1
            others.append(file)
    return sorted(images), others


def _is_misnamed(kind: str, path: str, file: SourceImage) -> bool:
    """Whether a file is an image although its name does not say so, such as `a.jpg?w=300`."""
    if _extension(file.name.rpartition("/")[2]) in LABEL_EXTENSIONS:
        return False
    try:
        return image_reader(kind, path)(file, _MAGIC_BYTES).startswith(_MAGIC)
    except (OSError, DecodeError):
        return False  # nobody asked for this file


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "lost+found")


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else "(no extension)"


def _repeated(images: list[SourceImage]) -> Iterator[str]:
    """Notes about images that share a name."""
    names = Counter(image.name for image in images)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        yield f"names of several images, which are all stored: {len(repeated):,}, as {repeated[0]}"
    kinds = {_extension(name.rpartition("/")[2]) for name in names}
    stems = Counter(name.rpartition(".")[0] for name in names) if len(kinds) > 1 else Counter()
    if count := sum(count > 1 for count in stems.values()):
        yield (
            f"images that differ only in their extension ({', '.join(sorted(kinds))}), all stored: "
            f"{count:,}; --image EXT takes one kind"
        )
