"""The samples of tars that are read from their beginning, from wherever WebDataset opens them."""

import contextlib
import glob
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset import utils
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from ganscale.data.broken import Broken
from ganscale.data.labels import IMAGE_EXTENSIONS, LABEL_EXTENSIONS
from ganscale.errors import UserError
from ganscale.randomness import derived_seed

_END_BYTES = 2 * tarfile.BLOCKSIZE


def is_streamed(path: str) -> bool:
    """Whether `data.path` names tars rather than a data set with a manifest."""
    if path.startswith("pipe:") or path.endswith(".tar"):
        return True
    return ".tar" in path and any(character in path for character in "{*?[")


def stream_urls(path: str) -> list[str]:
    """The shards that `path` names: braces as WebDataset expands them, wildcards among files.

    Raises UserError for a wildcard without files, and for commands that WDS_SECURE forbids.
    """
    urls: list[str] = []
    for url in expand_urls(path):
        if not _is_local(url):
            urls.append(url)
            continue
        file = str(Path(url.removeprefix("file://").removeprefix("file:")).expanduser())
        urls.extend(sorted(glob.glob(file)) if glob.has_magic(file) else [file])  # noqa: PTH207
    if not urls:
        raise UserError(f"no shards at {path}: no file has such a name")
    if utils.enforce_security and any(  # pyright: ignore[reportAttributeAccessIssue]
        url.startswith("pipe:") for url in urls
    ):
        raise UserError(f"WDS_SECURE=1 in the environment forbids the command data.path={path}")
    return urls


def check_urls(urls: list[str]) -> None:
    """Raises UserError for the first local shard that is not there."""
    for url in urls:
        if _is_local(url) and not Path(url).is_file():
            raise UserError(f"there is no shard {url}, which data.path names")


def stream_identity(urls: list[str]) -> str:
    """What a stream has in place of a data set's fingerprint: it tells sets of names apart."""
    return f"streamed {derived_seed(0, chr(10).join(map(shard_name, urls))):016x}"


class TarReader:
    """Reads one tar after the other, for one thread; any other may `stop` it.

    Attributes: `url`, the tar being read; `heard_at`, when the last member came, in monotonic
    seconds; `broken`, the tars that were found damaged, emptied by the caller; `damage`, what is
    wrong with the last tar, if anything.
    """

    def __init__(self) -> None:
        self.url, self.damage = "", ""
        self.heard_at = time.monotonic()
        self.broken: list[Broken] = []
        self._is_stopped = False
        self._open: Any = None

    def stop(self) -> None:
        """Ends the command that is being read, if it is one, and the iteration."""
        self._is_stopped = True
        _kill(self._open)

    def samples(self, url: str) -> Iterator[dict[str, Any]]:
        """WebDataset's samples of the tar at `url`: dicts of bytes by extension, and __key__.

        A tar that cannot be opened or is damaged ends early, and is noted in `broken`.
        """
        self.url, self.damage = url, ""
        mistake: Exception | None = None

        def note(error: Exception) -> bool:
            """One a tar: what the system says, else what was found first."""
            nonlocal mistake
            self._check_stopped()
            if mistake is None or isinstance(error, OSError):
                mistake = error
            return True

        stream = None
        try:
            stream = self._open = _opened(url)
            tar = _Tail(stream)
            members = tar_file_expander(
                [{"url": url, "stream": tar}], handler=note, select_files=_is_wanted
            )
            yield from group_by_keys(self._heard(members), handler=note)
            while rest := tar.read(1 << 20):  # only at the end is a command's status known
                self._check_stopped()
                if rest.strip(b"\0") and not tar.is_compressed:
                    note(ValueError("a header is, or there is more behind the end of the archive"))
            stream.close()
            if not tar.has_ended_well:
                note(tarfile.ReadError("unexpected end of data"))
        except (OSError, ValueError) as error:
            note(error)
        finally:
            _kill(stream)
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
        if mistake is not None:
            self.broken.append(_damage(url, mistake))
            self.damage = self.broken[-1].detail

    def _heard(self, members: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for member in members:
            self.heard_at = time.monotonic()
            self._check_stopped()
            yield member

    def _check_stopped(self) -> None:
        if self._is_stopped:
            raise _Closed


class _Closed(BaseException):
    """Ends a thread whose samples nobody waits for; no handler takes it for a broken sample."""


class _Tail:
    """A stream that knows whether it ended as a tar does: two blocks of zeros."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._last = b""
        self.is_compressed = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not self._last:
            self.is_compressed = data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        self._last = (self._last + data[-_END_BYTES:])[-_END_BYTES:]
        return data

    @property
    def has_ended_well(self) -> bool:
        return self.is_compressed or self._last == bytes(_END_BYTES)


def _damage(url: str, error: Exception) -> Broken:
    """What was wrong with a tar, as webdataset's exceptions say it."""
    detail = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
    if isinstance(error, OSError):
        status = re.search(
            r"exit (-?\d+) \(read\)", detail
        )  # the rest is the command, with its keys
        detail = f"its command ended with {status[1]}" if status else error.strerror or detail
    if isinstance(error, (tarfile.TarError, EOFError)):
        reason = "cut" if "unexpected end" in detail or "EOF" in detail else "no tar"
    else:
        reason = "cannot be read" if isinstance(error, OSError) else "damaged"
    return Broken(shard_name(url), reason, "", f"{_SENTENCES[reason]}: {detail[:200]}")


_SENTENCES = {
    "cut": "is cut",
    "no tar": "is no tar",
    "damaged": "is damaged",
    "cannot be read": "cannot be read",
}


def _is_wanted(name: str) -> bool:
    """Nothing else is read into memory."""
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    return extension in IMAGE_EXTENSIONS or extension in LABEL_EXTENSIONS


def _opened(url: str) -> Any:
    return open(url, "rb") if _is_local(url) else gopen(url)  # noqa: PTH123


def _is_local(url: str) -> bool:
    return url.startswith("file:") or re.match(r"[a-z0-9+.-]+:", url) is None


def shard_name(url: str) -> str:
    """A shard's name for logs: without its folder, and without what may be a password."""
    return url if url.startswith("pipe:") else url.partition("?")[0].rpartition("/")[2]


def _kill(stream: Any) -> None:
    """Ends a command of which no more is wanted; a file is left alone."""
    process = getattr(stream, "proc", None)
    if process is not None:
        process.kill()
