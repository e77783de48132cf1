"""Where the images of a new data set come from: a folder, zip, tar, or a bundled set."""

import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ganscale.data.images.decoding import DecodeError
from ganscale.data.labels import IMAGE_EXTENSIONS
from ganscale.errors import UserError
from ganscale.shards import bundled
from ganscale.shards.tar_reader import TarReader

_BUNDLED = "bundled:"


class SourceImage(NamedTuple):
    """One image file of a source.

    name: unique within the source, with / between folders, the same on every machine
    size: of the file, in bytes
    position: its first byte in a tar, its index in a bundled set; else 0
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
    class_names: empty for unlabelled images
    ignored: how many files are not images, by extension
    """

    kind: str
    path: str
    images: list[SourceImage]
    class_names: list[str]
    ignored: dict[str, int]

    def digest(self) -> str:
        """SHA-256 of names, sizes and labels, to notice whether the source has changed."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(repr((image.name, image.size, image.label)).encode())
        return digest.hexdigest()


def list_images(source: str, classes: str = "none") -> Source:
    """All images of `source`: `bundled:NAME`, or the path of a folder, a .zip or a .tar.

    With `classes` "folder", the class of an image is the first folder of its name in which the
    images differ: `photos/cat/1.jpg` and `photos/dog/2.jpg` have the classes cat and dog. Bundled
    images always have their classes. Raises UserError for a source that is missing, not an archive,
    or without images, and for images outside class folders.
    """
    if source.startswith(_BUNDLED):
        name = source.removeprefix(_BUNDLED)
        _, labels, class_names = bundled.load(name)
        size = len(_read_bundled(name, 0))
        images = [SourceImage(f"{i:06d}", size, i, int(label)) for i, label in enumerate(labels)]
        return Source("bundled", name, images, class_names, {})
    path = Path(source)
    if path.is_dir():
        kind, files = "folder", _walk(path)
    elif not path.exists():
        raise UserError(f"no folder, zip or tar at {path}")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        kind, files = "zip", [SourceImage(item.filename, item.file_size, 0) for item in members]
    elif tarfile.is_tarfile(path):
        with path.open("rb") as file:
            members = list(TarReader(file, str(path)))
        kind = "tar"
        files = [SourceImage(name.removeprefix("./"), size, first) for name, first, size in members]
    else:
        raise UserError(f"{path} is not a folder, zip or uncompressed tar of images")
    images, ignored = _only_images(files)
    if not images:
        raise UserError(f"no images in {source} (looked for: {', '.join(IMAGE_EXTENSIONS)})")
    class_names: list[str] = []
    if classes == "folder":
        images, class_names = _with_folder_classes(images, source)
    return Source(kind, str(path), images, class_names, ignored)


@lru_cache(maxsize=1)
def image_reader(kind: str, path: str) -> Callable[[SourceImage], bytes]:
    """A function that reads an image of the source, as the bytes of its file.

    It raises OSError, and DecodeError for a damaged member of an archive. The last reader is
    cached, since opening a large zip takes seconds.
    """
    if kind == "bundled":
        return lambda image: _read_bundled(path, image.position)
    if kind == "folder":
        return lambda image: Path(path, image.name).read_bytes()
    if kind == "tar":
        return lambda image: np.fromfile(path, "B", image.size, offset=image.position).tobytes()
    archive = zipfile.ZipFile(path)

    def read_member(image: SourceImage) -> bytes:
        try:
            return archive.read(image.name)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise DecodeError(f"cannot be unpacked: {error}") from error

    return read_member


def _read_bundled(name: str, index: int) -> bytes:
    stream = io.BytesIO()
    np.save(stream, bundled.load(name).images[index])
    return stream.getvalue()


def _walk(root: Path) -> Iterator[SourceImage]:
    for folder, subfolders, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            yield SourceImage(path.relative_to(root).as_posix(), path.stat().st_size, 0)
        for name in subfolders:
            if Path(folder, name).is_symlink():  # not entered by os.walk, since it may form a loop
                raise UserError(f"{Path(folder, name)} is a link to a folder; give its target")


def _only_images(files: Iterable[SourceImage]) -> tuple[list[SourceImage], dict[str, int]]:
    """The images, sorted by name, and the number of other files by extension."""
    images: list[SourceImage] = []
    ignored: Counter[str] = Counter()
    for file in files:
        parts = file.name.split("/")
        extension = parts[-1].rpartition(".")[2].lower() if "." in parts[-1] else "(none)"
        if any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in parts):
            ignored["(hidden)"] += 1
        elif extension in IMAGE_EXTENSIONS:
            images.append(file)
        else:
            ignored[extension] += 1
    return sorted(images), dict(sorted(ignored.items()))


def _with_folder_classes(
    images: list[SourceImage], source: str
) -> tuple[list[SourceImage], list[str]]:
    folders = [image.name.split("/")[:-1] for image in images]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 (compares folders, not characters)
    for image, parts in zip(images, folders, strict=True):
        if len(parts) <= depth:
            raise UserError(
                f"{source}: the image {image.name} is not in a class folder; with "
                "`--classes folder`, each class needs its own folder"
            )
    class_names = sorted({parts[depth] for parts in folders})
    labels = {name: label for label, name in enumerate(class_names)}
    return [
        image._replace(label=labels[parts[depth]])
        for image, parts in zip(images, folders, strict=True)
    ], class_names
