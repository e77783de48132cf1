"""Single connections to remote objects: the only module that uses fsspec.

fsspec finds the user's settings (`~/.config/fsspec`, `FSSPEC_...`) and each store's credentials.
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

PIPE, WEB = "pipe:", ("http://", "https://")
PIECE_BYTES = 8 << 20
"""The most bytes of one request to a store."""

_IN_EXTRA = ("http", "https", "s3", "s3a", "gs", "gcs")
_WEB_BUFFER_BYTES = 256 << 10  # twice as much is lost when a connection is cut
_TEMPORARY_STATUS = (408, 421, 425, 429)  # of those from 400 to 499
_COMMAND_NOT_FOUND = (126, 127)
_IDENTITIES = ("ETag", "etag", "md5Hash", "blob_id", "generation", "LastModified", "mtime")
_USER_ERRORS = (IsADirectoryError, NotADirectoryError, ValueError, TypeError, NotImplementedError)
_POLL_SECONDS = 0.2  # how often the wait for a silent command looks whether it was stopped
_lock = threading.Lock()


class _PastEnd(Exception):
    status = 416  # as of an HTTP answer


@dataclass(frozen=True)
class Connection:
    """An open object.

    start: the first byte that `read` returns: as requested, or 0 where that is not possible
    size: of the whole object in bytes; None where the server does not state it
    identity: changes when the object does; "" where the server does not state one
    read: returns up to the given number of bytes; none at the end
    """

    start: int
    size: int | None
    identity: str
    read: Callable[[int], bytes]
    close: Callable[[], None]


def connect(
    url: str, start: int, stall_seconds: float, stopped: threading.Event | None = None
) -> Connection:
    """A connection to the object from byte `start` on; `stopped` ends the wait for a command.
    Raises what the store's library raises, and UserError for an unknown kind of address."""
    if url.startswith(PIPE):
        return _run(url.removeprefix(PIPE), stall_seconds, stopped or threading.Event())
    if url.startswith(WEB):
        return _request(url, start, stall_seconds)
    return _open(url, start, stall_seconds)


def stat(url: str, stall_seconds: float) -> tuple[int | None, str]:
    """(size, identity) of an object as in `Connection`, without reading it; raises as `connect`."""
    if not url.startswith(WEB):
        connection = _open(url, 0, stall_seconds)  # asks for them, and reads nothing yet
        connection.close()
        return connection.size, connection.identity
    filesystem = _filesystem(url, stall_seconds)

    async def head() -> Any:  # fsspec's own `info` falls back to a GET, for which the shard is sent
        session = await filesystem.set_session()
        options = {**filesystem.kwargs, "headers": _headers(filesystem), "allow_redirects": True}
        async with session.head(filesystem.encode_url(url), **options) as response:
            response.raise_for_status()
            return response

    response: Any = fsspec.asyn.sync(filesystem.loop, head)
    return response.content_length, _identity(response)


def matching(pattern: str, stall_seconds: float) -> list[str]:
    """The URLs that match a pattern with wildcards, sorted; raises as `connect`."""
    filesystem = _filesystem(pattern, stall_seconds)
    filesystem.invalidate_cache()
    return sorted(filesystem.unstrip_protocol(str(path)) for path in filesystem.glob(pattern))


def permanent_reason(error: BaseException) -> str:
    """What is wrong, if trying again is useless; else ""."""
    status, name = _status(error), type(error).__name__
    message = str(error) or name
    if status:
        is_permanent = 400 <= status < 500 and status not in _TEMPORARY_STATUS
        return f"HTTP status {status}" if is_permanent else ""
    if isinstance(error, FileNotFoundError):
        return "there is no such object"
    if isinstance(error, PermissionError):
        return f"no access ({message})"
    if "Credentials" in name:
        return f"no valid credentials ({message})"
    if "Certificate" in name:
        return f"its certificate is not trusted ({message})"
    # aiohttp raises ValueErrors for addresses.
    return f"{name}: {message}" if isinstance(error, _USER_ERRORS) else ""


def is_past_end(error: BaseException) -> bool:
    """Whether the object has no byte at the requested position."""
    response = getattr(error.__cause__, "response", None)  # of botocore's error, behind s3fs's
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else ""
    return _status(error) == 416 or code in ("InvalidRange", "416")


def _status(error: BaseException) -> int:
    """The HTTP status that the error has, or 0."""
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
        options = tuple(sorted(filesystem._get_kwargs_from_urls(url).items()))
        with _lock:  # all threads share one and its connections, unlike in fsspec's own cache
            return _create_filesystem(filesystem, protocol, stall_seconds, options)
    except ImportError as error:
        problem = f"{protocol}:// needs a package that is not installed ({error})"
        if protocol in _IN_EXTRA:
            problem += "; pip install 'ganscale[remote]' installs it"
        raise UserError(problem) from error
    except ValueError as error:
        raise UserError(f"{protocol}:// addresses cannot be read: {error}") from error


@lru_cache(maxsize=16)
def _create_filesystem(filesystem: Any, protocol: str, stall_seconds: float, options: tuple) -> Any:
    settings: dict[str, Any] = {"skip_instance_cache": True, **dict(options)}
    configured, stall = fsspec.config.conf.get(protocol, {}), stall_seconds
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        ours = {"timeout": timeout, "trust_env": True, "read_bufsize": _WEB_BUFFER_BYTES}
        settings["client_kwargs"] = ours | configured.get("client_kwargs", {})
    elif protocol in ("s3", "s3a"):
        no_retries = {"max_attempts": 0}  # we retry
        ours = {"connect_timeout": stall, "read_timeout": stall, "retries": no_retries}
        settings["config_kwargs"] = ours | configured.get("config_kwargs", {})
    elif protocol in ("gs", "gcs"):
        settings["requests_timeout"] = max(stall_seconds, 60.0)  # for a whole piece, not a silence
    created = filesystem(**settings)
    if protocol in ("s3", "s3a"):
        created.retries = 1  # this counts tries
    return created


def _headers(filesystem: Any) -> dict[str, str]:
    return {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}


def _identity(response: Any) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _request(url: str, start: int, stall_seconds: float) -> Connection:
    """One GET for all the rest of the object."""
    filesystem = _filesystem(url, stall_seconds)
    headers = _headers(filesystem)
    if start:
        headers["Range"] = f"bytes={start}-"
    # With any size given, it does not ask for the size first.
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
    return Connection(begin, size, _identity(response), file.read, file.close)


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
        if not piece:  # requests are expensive: small reads are served from large pieces
            piece = memoryview(file.read(PIECE_BYTES))
        data, piece = bytes(piece[:at_most]), piece[at_most:]
        return data

    return Connection(start, size, identity, read, file.close)


def _run(command: str, stall_seconds: float, stopped: threading.Event) -> Connection:
    """The output of a shell command."""
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the connection)
    process = subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,  # so that a whole pipeline can be ended
    )
    assert process.stdout is not None
    output = process.stdout.fileno()
    selector = selectors.DefaultSelector()
    selector.register(output, selectors.EVENT_READ)

    def read(at_most: int) -> bytes:
        deadline = time.monotonic() + stall_seconds
        while not selector.select(min(_POLL_SECONDS, stall_seconds)):
            if stopped.is_set():
                raise ConnectionAbortedError("stopped")
            if time.monotonic() >= deadline:
                raise TimeoutError(f"printed nothing for {stall_seconds:g} s")
        data = os.read(output, min(at_most, 1 << 20))
        if data:
            return data
        # It has closed its output, but may go on.
        while (code := process.poll()) is None:
            if stopped.wait(_POLL_SECONDS):
                raise ConnectionAbortedError("stopped")
            if time.monotonic() >= deadline:
                raise TimeoutError(f"did not end within {stall_seconds:g} s of its last output")
        if code:
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 300))
            end = stderr.read().decode(errors="replace").strip()
            problem = f"the command failed with exit code {code}: {end or 'no output on stderr'}"
            raise ValueError(problem) if code in _COMMAND_NOT_FOUND else ConnectionError(problem)
        return data

    def close() -> None:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        selector.close()
        process.stdout.close()  # type: ignore[union-attr]
        stderr.close()

    return Connection(0, None, "", read, close)
