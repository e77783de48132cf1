"""The samples of local or remote tars, read from their beginning."""

import glob
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from webdataset import utils
from webdataset.tariterators import group_by_keys

from ganscale.data.bad_samples import BadSample
from ganscale.data.labels import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from ganscale.data.remote import objects
from ganscale.data.shard_reader import LARGEST_IMAGE_BYTES
from ganscale.errors import UnavailableError, UserError
from ganscale.files import with_home
from ganscale.randomness import derived_seed

_END_BYTES = 2 * tarfile.BLOCKSIZE
_LARGEST_NAME_BYTES = 1 << 20  # of a header that holds a long name; tarfile would read any
_READS_AT_END = 16  # more of them come from a size that is larger than the tar
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


def is_streamed(path: str) -> bool:
    """Whether `data.path` names tars rather than a data set with a manifest."""
    is_pattern = ".tar" in path and any(character in path for character in "{*?[")
    return is_pattern or path.startswith(objects.PIPE) or path.endswith(".tar")


def stream_urls(path: str, retry_seconds: float = 0.0) -> list[str]:
    """The shards that `path` names: patterns joined by ::, with braces, and with wildcards on disk
    and in stores that can be listed. Raises as `objects.expand`, and UserError for commands that
    WDS_SECURE forbids."""
    urls: list[str] = []
    for pattern in path.split("::"):
        if not objects.is_remote(pattern):
            local = pattern.removeprefix("file://").removeprefix("file:")
            pattern = str(with_home(local))
            if not glob.has_magic(pattern):  # not looked up: there are many, and on every rank
                urls.extend(objects.expand_braces(pattern))
                continue
        urls.extend(objects.expand(pattern, retry_seconds))
    is_secured = utils.enforce_security  # pyright: ignore[reportAttributeAccessIssue]
    if is_secured and any(url.startswith(objects.PIPE) for url in urls):
        raise UserError(f"WDS_SECURE=1 in the environment forbids the command data.path={path}")
    return urls


def check_urls(urls: Sequence[str]) -> None:
    """Raises UserError for the first local shard that is missing."""
    for url in urls:
        if not objects.is_remote(url) and not Path(url).is_file():
            raise UserError(f"the shard {url} of data.path is missing")


def stream_identity(urls: Sequence[str]) -> str:
    """In place of a data set's fingerprint: a hash of the shards' names."""
    return f"streamed {derived_seed(0, chr(10).join(map(shard_name, urls))):016x}"


class StreamedTars:
    """Reads one tar after the other, in one thread; any other thread may `stop` it.

    report: called with each tar that is damaged
    Attributes: `url`, the tar being read; `last_read_at`, when bytes last came, in monotonic
    seconds; `damage`, what is wrong with the last tar, if anything; `other_images`, extensions such
    as left.jpg, whose members are not read since a sample may have several.
    """

    def __init__(self, retry_seconds: float, report: Callable[[BadSample], object]) -> None:
        self.url, self.damage = "", ""
        self.other_images: set[str] = set()
        self.last_read_at = time.monotonic()
        self._report = report
        self._retry_seconds = retry_seconds
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the iteration, and a command that is being read, in a moment."""
        self._stopped.set()

    def samples(self, url: str) -> Iterator[dict[str, Any]]:
        """WebDataset's samples of the tar at `url`: dicts of bytes by extension, and __key__. A
        member of more than LARGEST_IMAGE_BYTES is replaced by its size, an int. A tar that cannot
        be opened or is damaged ends early and is reported. Raises UnavailableError for a store or
        command that failed for too long."""
        self.url, self.damage = url, ""
        problem: Exception | None = None

        def note(error: Exception) -> bool:
            """Keeps one error of a tar: that of a disk or server, else the first."""
            nonlocal problem
            self._check_stopped()
            if isinstance(error, UnavailableError):
                raise error
            if problem is None or isinstance(error, (OSError, UserError)):
                problem = error
            return True

        try:
            with self._opened(url) as stream:
                tar = _TarBytes(stream, self._on_read)
                yield from group_by_keys(_members(tar, url, note, self.other_images), handler=note)
                while rest := tar.read(1 << 20):  # only at the end is a command's status known
                    if rest.strip(b"\0") and not tar.is_compressed:
                        note(ValueError("a header is, or data follows the archive's end"))
                if not tar.is_complete:
                    note(_CutError("unexpected end of data"))
        except (OSError, ValueError, tarfile.TarError, UserError, UnavailableError) as error:
            note(error)
        if problem is not None:
            damaged_tar = _damaged_tar(url, problem)
            self.damage = damaged_tar.detail
            self._report(damaged_tar)

    def _opened(self, url: str) -> AbstractContextManager[Any]:
        self._check_stopped()
        if objects.is_remote(url):
            return objects.open_stream(url, self._retry_seconds, stopped=self._stopped)
        return Path(url).open("rb")

    def _on_read(self, data: bytes) -> None:
        if data:
            self.last_read_at = time.monotonic()
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


class _Stopped(BaseException):
    """Ends the thread; not an Exception, so that no handler takes it for a bad sample."""


class _CutError(tarfile.ReadError):
    """A tar ends too early."""


class _TarBytes:
    """A stream that counts reads at its end, and knows whether that is the end of a tar: two blocks
    of zeros."""

    def __init__(self, stream: Any, on_read: Callable[[bytes], None]) -> None:
        self._stream, self._on_read = stream, on_read
        self._last = b""
        self.reads_at_end = 0
        self.is_compressed = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._on_read(data)
        self.reads_at_end += not data
        if self.reads_at_end > _READS_AT_END:  # tarfile goes on, 10 KiB at a time
            raise _CutError("unexpected end of data")
        if not self._last:
            self.is_compressed = data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        self._last = (self._last + data[-_END_BYTES:])[-_END_BYTES:]
        return data

    @property
    def is_complete(self) -> bool:
        return self.is_compressed or self._last == bytes(_END_BYTES)


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _LONG_HEADERS and header.size > _LARGEST_NAME_BYTES:
            raise ValueError(f"a header says that it has {header.size:,} bytes")
        return header


def _members(
    tar: _TarBytes, url: str, note: Callable[[Exception], bool], other_images: set[str]
) -> Iterator[dict[str, Any]]:
    """Images and labels, as from webdataset's `tar_file_expander`, which selects by name only and
    reads into memory whatever size a header claims."""
    has_header = False
    try:
        with tarfile.open(fileobj=tar, mode="r|*", tarinfo=_Header) as archive:  # type: ignore[call-overload]
            has_header = True
            while (member := archive.next()) is not None:
                archive.members.clear()  # it keeps them all
                if not member.isreg() or not _is_image_or_label(member.name):
                    other = _extension(member.name)
                    if other.rpartition(".")[2] in IMAGE_EXTENSIONS and len(other_images) < 9:
                        other_images.add(other)
                    continue
                data: bytes | int = member.size
                if member.size <= LARGEST_IMAGE_BYTES:
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                yield {"fname": member.name, "data": data, "__url__": url}
    except Exception as error:
        # tarfile has one error for a cut archive and for a file that is not an archive.
        is_cut = isinstance(error, (tarfile.TarError, EOFError)) and has_header and tar.reads_at_end
        note(_CutError(*error.args) if is_cut else error)


def _damaged_tar(url: str, error: Exception) -> BadSample:
    detail = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, OSError):
        detail = error.strerror or detail
    kinds = (
        (_CutError, "cut", "is cut"),
        ((tarfile.TarError, EOFError), "no tar", "is not a tar"),
        ((OSError, UserError), "cannot be read", "cannot be read"),
        (Exception, "damaged", "is damaged"),
    )
    reason, sentence = next(texts for kind, *texts in kinds if isinstance(error, kind))
    detail = detail.removeprefix(f"{objects.shown(url)}: ")
    return BadSample(shard_name(url), reason, "", f"{sentence}: {detail[:200]}")


def _is_image_or_label(name: str) -> bool:
    """Nothing else is read into memory; names in __x__ are WebDataset's own."""
    extension = _extension(name)
    is_data = extension in IMAGE_EXTENSIONS or extension in LABEL_EXTENSIONS
    return is_data and re.match(r"__[^/]*__/", name) is None


def _extension(name: str) -> str:
    """As WebDataset has it: what follows the first dot of a member's name."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def shard_name(url: str) -> str:
    """A shard's name for logs: without its folder, and without a query that may be a password."""
    return url if url.startswith(objects.PIPE) else url.partition("?")[0].rpartition("/")[2]
