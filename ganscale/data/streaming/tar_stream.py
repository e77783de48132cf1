"""The samples of tars that are read from their beginning, on disk or elsewhere."""

import glob
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import braceexpand
from webdataset import utils
from webdataset.tariterators import group_by_keys

from ganscale.data.remote import objects
from ganscale.data.bad_samples import BadSample
from ganscale.data.labels import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from ganscale.data.shard_reader import LARGEST_IMAGE_BYTES
from ganscale.errors import UnavailableError, UserError
from ganscale.randomness import derived_seed

_END_BYTES = 2 * tarfile.BLOCKSIZE
_LARGEST_NAME_BYTES = 1 << 20  # of a header that holds a long name; tarfile would read any
_READS_AT_END = 16  # are many: who asks more often follows a size that the tar does not have
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


def is_streamed(path: str) -> bool:
    """Whether `data.path` names tars rather than a data set with a manifest."""
    if path.startswith("pipe:") or path.endswith(".tar"):
        return True
    return ".tar" in path and any(character in path for character in "{*?[")


def stream_urls(path: str, retry_seconds: float = 0.0) -> list[str]:
    """The shards that `path` names, in parts with :: between them: braces and wildcards, on disk
    and in a store that can be listed.

    Raises UserError for wildcards that nothing matches, for braces that do not pair, and for
    commands that WDS_SECURE forbids; UnavailableError as `remote.expand`.
    """
    urls: list[str] = []
    for part in path.split("::"):
        if not objects.is_remote(part):
            part = str(Path(part.removeprefix("file://").removeprefix("file:")).expanduser())
            if not glob.has_magic(part):  # nor are they looked for: there are many, on each rank
                urls.extend(_braces(part))
                continue
        urls.extend(objects.expand(part, retry_seconds))
    if utils.enforce_security and any(  # pyright: ignore[reportAttributeAccessIssue]
        url.startswith(objects.PIPE) for url in urls
    ):
        raise UserError(f"WDS_SECURE=1 in the environment forbids the command data.path={path}")
    return urls


def check_urls(urls: list[str]) -> None:
    """Raises UserError for the first local shard that is not there."""
    for url in urls:
        if not objects.is_remote(url) and not Path(url).is_file():
            raise UserError(f"there is no shard {url}, which data.path names")


def stream_identity(urls: list[str]) -> str:
    """What a stream has in place of a data set's fingerprint: it tells sets of names apart."""
    return f"streamed {derived_seed(0, chr(10).join(map(shard_name, urls))):016x}"


class StreamedTars:
    """Reads one tar after the other, for one thread; any other may `stop` it.

    retry_seconds: how long a store or command may fail
    Attributes: `url`, the tar being read; `heard_at`, when bytes last came, in monotonic seconds;
    `broken`, the tars that were found damaged, emptied by the caller; `damage`, what is wrong with
    the last tar, if anything.
    """

    def __init__(self, retry_seconds: float) -> None:
        self.url, self.damage = "", ""
        self.heard_at = time.monotonic()
        self.bad_samples: list[BadSample] = []
        self._retry_seconds = retry_seconds
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the iteration, and a command that is being read, in a moment."""
        self._stopped.set()

    def samples(self, url: str) -> Iterator[dict[str, Any]]:
        """WebDataset's samples of the tar at `url`: dicts of bytes by extension, and __key__. In
        place of a member of more than LARGEST_IMAGE_BYTES stands its size, an int.

        A tar that cannot be opened or is damaged ends early, and is noted in `broken`. Raises
        UnavailableError for a store or command that failed for too long.
        """
        self.url, self.damage = url, ""
        mistake: Exception | None = None

        def note(error: Exception) -> bool:
            """One a tar: what a disk or server says, else what was found first."""
            nonlocal mistake
            self._check_stopped()
            if isinstance(error, UnavailableError):
                raise error
            if mistake is None or isinstance(error, (OSError, UserError)):
                mistake = error
            return True

        try:
            with self._opened(url) as stream:
                tar = _Tail(stream, self._heard)
                yield from group_by_keys(_members(tar, url, note), handler=note)
                while rest := tar.read(1 << 20):  # only at the end is a command's status known
                    if rest.strip(b"\0") and not tar.is_compressed:
                        note(ValueError("a header is, or there is more behind the archive's end"))
                if not tar.has_ended_well:
                    note(tarfile.ReadError("unexpected end of data"))
        except (OSError, ValueError, tarfile.TarError, UserError, UnavailableError) as error:
            note(error)
        if mistake is not None:
            self.bad_samples.append(_damage(url, mistake))
            self.damage = self.bad_samples[-1].detail

    def _opened(self, url: str) -> AbstractContextManager[Any]:
        self._check_stopped()
        if not objects.is_remote(url):
            return open(url, "rb")  # noqa: PTH123
        seconds, stall = self._retry_seconds, objects.STALL_SECONDS
        return objects.open_stream(url, seconds, stall_seconds=stall, stopped=self._stopped)

    def _heard(self, data: bytes) -> None:
        if data:
            self.heard_at = time.monotonic()
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise _Closed


class _Closed(BaseException):
    """Ends a thread whose samples nobody waits for; no handler takes it for a bad sample."""


class _Tail:
    """A stream that knows whether it ended as a tar does: two blocks of zeros."""

    def __init__(self, stream: Any, heard: Callable[[bytes], None]) -> None:
        self._stream = stream
        self._heard = heard
        self._last = b""
        self._reads_at_end = 0
        self.is_compressed = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._heard(data)
        if not data:
            self._reads_at_end += 1
            if self._reads_at_end > _READS_AT_END:  # tarfile would, for a petabyte's every 10 KiB
                raise tarfile.ReadError("unexpected end of data")
        if not self._last:
            self.is_compressed = data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        self._last = (self._last + data[-_END_BYTES:])[-_END_BYTES:]
        return data

    @property
    def has_ended_well(self) -> bool:
        return self.is_compressed or self._last == bytes(_END_BYTES)


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _LONG_HEADERS and header.size > _LARGEST_NAME_BYTES:
            raise ValueError(f"a header says that it has {header.size:,} bytes")
        return header


def _members(tar: _Tail, url: str, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """Images and labels, as webdataset's `tar_file_expander` gives them; that one asks for names
    only, and reads into memory whatever size a header states."""
    try:
        with tarfile.open(fileobj=tar, mode="r|*", tarinfo=_Header) as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # it keeps them all
                if not member.isreg() or not _is_wanted(member.name):
                    continue
                data: bytes | int = member.size
                if member.size <= LARGEST_IMAGE_BYTES:
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                yield {"fname": member.name, "data": data, "__url__": url}
    except Exception as error:
        note(error)


def _braces(path: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise UserError(f"the braces of {path} do not pair: {error}") from error


def _damage(url: str, error: Exception) -> BadSample:
    """What was wrong with a tar, in a few words and a sentence."""
    detail = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, OSError):
        detail = error.strerror or detail
    if isinstance(error, (tarfile.TarError, EOFError)):
        reason = "cut" if "unexpected end" in detail or "EOF" in detail else "no tar"
    else:
        reason = "cannot be read" if isinstance(error, (OSError, UserError)) else "damaged"
    detail = detail.removeprefix(f"{objects.shown(url)}: ")
    return BadSample(shard_name(url), reason, "", f"{_SENTENCES[reason]}: {detail[:200]}")


_SENTENCES = {
    "cut": "is cut",
    "no tar": "is no tar",
    "damaged": "is damaged",
    "cannot be read": "cannot be read",
}


def _is_wanted(name: str) -> bool:
    """Nothing else is read into memory; names in __x__ are WebDataset's own."""
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    is_data = extension in IMAGE_EXTENSIONS or extension in LABEL_EXTENSIONS
    return is_data and re.match(r"__[^/]*__/", name) is None


def shard_name(url: str) -> str:
    """A shard's name for logs: without its folder, and without what may be a password."""
    return url if url.startswith(objects.PIPE) else url.partition("?")[0].rpartition("/")[2]
