"""Single connections to objects that lie elsewhere: the sole place that knows fsspec.

Its settings are the user's (`~/.config/fsspec`, `FSSPEC_...`), and credentials come from where each
store's own tools take them.
"""

import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import fsspec.asyn
import fsspec.config

from ganscale.errors import UserError

PIECE_BYTES = 8 << 20
"""The largest piece that is asked of a store at once."""

_PIPE = "pipe:"
_IN_EXTRA = ("http", "https", "s3", "s3a", "gs", "gcs")
_WEB_BUFFER_BYTES = 256 << 10  # twice as much is lost when a connection is cut
_TEMPORARY_STATUS = (408, 421, 425, 429)  # of those from 400 to 499
_COMMAND_NOT_FOUND = (126, 127)
_IDENTITIES = ("ETag", "etag", "md5Hash", "blob_id", "generation", "LastModified", "mtime")
_USERS = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError,
    TypeError, NotImplementedError,
)  # fmt: skip
_LOOK_SECONDS = 0.2  # how often a silent command is left to see whether it is still wanted
_lock = threading.Lock()


@dataclass(frozen=True)
class Connection:
    """An open object.

    start: its first byte that `read` gives: what was asked for, or 0 where that cannot be
    size: of the whole object in bytes; None where the server does not say
    identity: changes when the object does; "" where the server does not say
    read: up to so many bytes; none at the end
    """

    start: int
    size: int | None
    identity: str
    read: Callable[[int], bytes]
    close: Callable[[], None]


def connect(
    url: str, start: int, stall_seconds: float, stopped: threading.Event | None = None
) -> Connection:
    """A connection to the object from byte `start` on; raises whatever its library does, and
    UserError for an address that none understands. `stopped` ends the wait for a command."""
    if url.startswith(_PIPE):
        return _run(url.removeprefix(_PIPE), stall_seconds, stopped or threading.Event())
    if url.startswith(("http://", "https://")):
        return _request(url, start, stall_seconds)
    return _open(url, start, stall_seconds)


def matching(pattern: str, stall_seconds: float) -> list[str]:
    """The URLs that match a pattern with wildcards, sorted; raises as `connect`."""
    filesystem = _filesystem(pattern, stall_seconds)
    filesystem.invalidate_cache()
    found = filesystem.glob(pattern)
    return sorted(filesystem.unstrip_protocol(path) for path in map(str, found))


def permanent_reason(error: BaseException) -> str:
    """What is wrong, if trying again cannot mend it; else nothing."""
    status, name = _status(error), type(error).__name__
    said = str(error) or name
    if status:
        is_permanent = 400 <= status < 500 and status not in _TEMPORARY_STATUS
        return f"HTTP status {status}" if is_permanent else ""
    if isinstance(error, FileNotFoundError):
        return "there is no such object"
    if isinstance(error, PermissionError):
        return f"no access ({said})"
    if "Credentials" in name:
        return f"no valid credentials ({said})"
    if "Certificate" in name:
        return f"its certificate is not trusted ({said})"
    # Among asyncio's and aiohttp's own errors are ValueErrors of theirs: addresses.
    return f"{name}: {said}" if isinstance(error, _USERS) else ""


def is_past_end(error: BaseException) -> bool:
    """Whether the object has no byte at the position that was asked for."""
    return _status(error) == 416 or "InvalidRange" in str(error)


def _status(error: BaseException) -> int:
    """The HTTP status that the error tells of, or 0."""
    status = getattr(error, "status", None)  # aiohttp's
    if status is None:
        status = getattr(error, "code", None)  # gcsfs's
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)  # httpx's
    return status if isinstance(status, int) and 400 <= status < 600 else 0


def _filesystem(url: str, stall_seconds: float) -> Any:
    protocol = url.partition("://")[0]
    try:
        filesystem = fsspec.get_filesystem_class(protocol)
        options = filesystem._get_kwargs_from_urls(url)
        # One for all threads, unlike fsspec's own cache: connections are shared and closed once.
        with _lock:
            return _made(filesystem, protocol, stall_seconds, tuple(sorted(options.items())))
    except ImportError as error:
        problem = f"{protocol}:// needs a package that is not installed ({error})"
        if protocol in _IN_EXTRA:
            problem += "; pip install 'ganscale[remote]' brings it"
        raise UserError(problem) from error
    except ValueError as error:
        raise UserError(f"nothing can read {protocol}:// addresses: {error}") from error


@lru_cache(maxsize=16)
def _made(filesystem: Any, protocol: str, stall_seconds: float, options: tuple) -> Any:
    settings: dict[str, Any] = {"skip_instance_cache": True, **dict(options)}
    configured = fsspec.config.conf.get(protocol, {})
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=stall_seconds, sock_read=stall_seconds
        )
        ours = {"timeout": timeout, "trust_env": True, "read_bufsize": _WEB_BUFFER_BYTES}
        settings["client_kwargs"] = ours | configured.get("client_kwargs", {})
    elif protocol in ("s3", "s3a"):
        ours = {
            "connect_timeout": stall_seconds,
            "read_timeout": stall_seconds,
            "retries": {"max_attempts": 0},  # they are ours
        }
        settings["config_kwargs"] = ours | configured.get("config_kwargs", {})
    elif protocol in ("gs", "gcs"):
        settings["requests_timeout"] = max(stall_seconds, 60.0)  # for a whole piece, not a silence
    made = filesystem(**settings)
    if protocol in ("s3", "s3a"):
        made.retries = 1  # tries, not tries again
    return made


def _request(url: str, start: int, stall_seconds: float) -> Connection:
    """One GET for all the rest of the object."""
    filesystem = _filesystem(url, stall_seconds)
    headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # A size, any, keeps it from asking for one.
    file = filesystem.open(url, "rb", block_size=0, size=1, headers=headers)
    response = file.r
    size, begin = response.content_length, 0
    if response.status == 206:
        stated, _, total = response.headers.get("Content-Range", "").rpartition("/")
        begin = int(stated.removeprefix("bytes ").partition("-")[0] or start)
        size = int(total) if total.isdigit() else None if size is None else begin + size
        if begin > start:
            file.close()
            raise ConnectionError(f"asked for byte {start:,} and got byte {begin:,}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        size = None  # that of the compressed body
    identity = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return Connection(begin, size, identity, file.read, file.close)


def _open(url: str, start: int, stall_seconds: float) -> Connection:
    """A request for each piece, after one for the object's size."""
    filesystem = _filesystem(url, stall_seconds)
    filesystem.invalidate_cache()
    file = filesystem.open(url, "rb", block_size=PIECE_BYTES, cache_type="none")
    details = getattr(file, "details", None) or {}
    identity = next((str(details[key]) for key in _IDENTITIES if details.get(key)), "")
    size = getattr(file, "size", None)
    if start and size is not None and start > size:
        file.close()
        raise _PastEnd
    file.seek(start)
    piece = memoryview(b"")

    def read(at_most: int) -> bytes:
        nonlocal piece
        if not piece:  # a request has a price: small reads are served from large pieces
            piece = memoryview(file.read(PIECE_BYTES))
        data, piece = bytes(piece[:at_most]), piece[at_most:]
        return data

    return Connection(start, size, identity, read, file.close)


class _PastEnd(Exception):
    status = 416


def _run(command: str, stall_seconds: float, stopped: threading.Event) -> Connection:
    """What a shell command prints."""
    complaints = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the connection)
    process = subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=complaints,
        start_new_session=True,  # so that all of a pipeline can be ended
    )
    assert process.stdout is not None
    output = process.stdout.fileno()
    selector = selectors.DefaultSelector()
    selector.register(output, selectors.EVENT_READ)

    def read(at_most: int) -> bytes:
        deadline = time.monotonic() + stall_seconds
        while not selector.select(min(_LOOK_SECONDS, stall_seconds)):
            if stopped.is_set():
                raise ConnectionAbortedError("no longer wanted")
            if time.monotonic() >= deadline:
                raise TimeoutError(f"printed nothing for {stall_seconds:g} s")
        data = os.read(output, min(at_most, 1 << 20))
        if not data and (code := process.wait()):
            complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 300))
            said = complaints.read().decode(errors="replace").strip()
            mistake = f"the command failed with exit code {code}: {said or 'it said nothing'}"
            raise ValueError(mistake) if code in _COMMAND_NOT_FOUND else ConnectionError(mistake)
        return data

    def close() -> None:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        selector.close()
        process.stdout.close()  # type: ignore[union-attr]
        complaints.close()

    return Connection(0, None, "", read, close)
