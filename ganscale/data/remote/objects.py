"""Remote objects (http, s3, gs, hf, ..., or the output of a command), read from start to end.

A location is a folder on disk, a URL that fsspec knows, or `pipe:COMMAND {}`, a shell command that
prints the object whose quoted name replaces the {}. Commands may come from the user's config and
command line only, never from a manifest.
"""

import glob
import io
import os
import re
import shlex
import threading
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import braceexpand

from ganscale.data.backoff import Backoff
from ganscale.data.remote import connections
from ganscale.data.remote.connections import PIPE, WEB, Connection
from ganscale.errors import UserError
from ganscale.secrets import without_secrets

STALL_SECONDS = 30.0
"""A connection that is silent for so long is given up."""

_BUFFER_BYTES = 1 << 20
_STORES = re.compile(r"(https?|s3a?|gc?s|hf|az|abfss?|adl|oci|oss)://(?!.*::)")


class ObjectChanged(UserError):
    """An object has changed since it was indexed, or while it was read."""


def is_remote(location: str) -> bool:
    """Whether the location is a URL or a command rather than a path on disk."""
    is_url = "://" in location and not location.startswith("file://")
    return is_url or location.startswith(PIPE)


def is_object_store(location: str) -> bool:
    """Whether the location is a URL that a downloaded manifest may point to."""
    return _STORES.match(location) is not None


def join(base: str, name: str) -> str:
    """The address of the object `name` in `base`. Raises UserError for a command without {}."""
    if base.startswith(PIPE):
        if "{}" not in base:
            raise UserError(f"{base!r} needs a {{}}, which the shard's name replaces")
        return base.replace("{}", shlex.quote(name))
    if base.startswith(WEB):
        # Question and per cent signs in a name are escaped; the URL's own query stays at the end.
        parts = urlsplit(base)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{base.rstrip('/')}/{name}"


def shown(address: str) -> str:
    """The address for messages, without password, signature and the arguments of a command."""
    return without_secrets(address)


def expand_braces(pattern: str) -> list[str]:
    """The strings that `pattern` stands for: {000..099} and {a,b}, in order. Raises UserError for
    braces that are not closed."""
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"the braces of {pattern} do not match: {error}") from error


def expand(pattern: str, retry_seconds: float = 0.0) -> list[str]:
    """The addresses that `pattern` stands for: braces in order, wildcards sorted.

    Raises UserError for a missing local file, for wildcards that match nothing and for braces that
    are not closed, and UnavailableError for a store that could not be listed for `retry_seconds`.
    A single remote object is not looked up.
    """
    addresses: list[str] = []
    for expanded in expand_braces(pattern):
        matches = _matches(expanded, retry_seconds)
        if not matches:
            source = "" if expanded == pattern else f", from {pattern}"
            raise UserError(f"no file matches {shown(expanded)}{source}")
        addresses += matches
    return addresses


def _matches(pattern: str, retry_seconds: float) -> list[str]:
    if not is_remote(pattern):
        return _local_matches(pattern.removeprefix("file://"))
    # A question mark in a web address begins its query.
    wildcards = "*" if pattern.startswith(WEB) else "*?["
    if pattern.startswith(PIPE) or not any(mark in pattern for mark in wildcards):
        return [pattern]
    problem = f"{shown(pattern)} cannot be listed"
    backoff = Backoff(retry_seconds)
    while True:
        try:
            return connections.matching(pattern, STALL_SECONDS)
        except UserError:
            raise
        except Exception as error:
            if reason := connections.permanent_reason(error):
                raise UserError(f"{problem}: {reason}") from error
            backoff.wait(error, problem)


def _local_matches(pattern: str) -> list[str]:
    folder, slash, _ = pattern.rpartition("/")
    for parent in _local_matches(folder) if glob.has_magic(folder) else [folder or slash or "."]:
        check_can_list(parent)
    return sorted(glob.glob(pattern))  # noqa: PTH207


def check_can_list(folder: str) -> None:
    """Raises UserError for a local folder that cannot be listed: a glob takes it for an empty one.
    What is not a folder passes."""
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error


def open_stream(url: str, retry_seconds: float, **options: Any) -> io.BufferedReader:
    """A sequential reader of an object; `read(n)` is complete. options: of `RemoteObject`

    Opening and reading raise UserError where trying again is useless (a missing object, no access,
    an object that changes), and UnavailableError for what failed for longer than `retry_seconds`.
    """
    return io.BufferedReader(RemoteObject(url, retry_seconds, **options), _BUFFER_BYTES)


class RemoteObject(io.RawIOBase):
    """A reader that continues where a connection was cut: by range where the server can, else from
    the start, skipping what was read.

    start: the first byte to read
    expected_size: of the whole object in bytes, for servers that do not state it
    stopped: set by another thread, it ends commands and waits; reading then raises any exception
    Attributes: `size` and `identity`, as in `Connection`.
    """

    def __init__(
        self,
        url: str,
        retry_seconds: float,
        *,
        start: int = 0,
        expected_size: int | None = None,
        stall_seconds: float = STALL_SECONDS,
        stopped: threading.Event | None = None,
    ) -> None:
        super().__init__()
        self.url, self.position = url, start
        self.size: int | None = None
        self.identity = ""
        self._expected_size = expected_size
        self._stall_seconds = stall_seconds
        self._stopped = stopped or threading.Event()
        self._backoff = Backoff(retry_seconds, self._stopped)
        self._connection: Connection | None = None
        self._ended_at = -1
        self._connect()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            connection = self._connect()
            try:
                data = connection.read(min(len(view), connections.PIECE_BYTES))
                if not data:
                    self._check_end()
            except Exception as error:
                self._handle_failure(error)
                continue
            if data:
                self._backoff.reset()
            view[: len(data)] = data
            self.position += len(data)
            return len(data)

    def readall(self) -> bytes:
        pieces = []  # io's own asks for 8 KiB at a time
        while data := self.read(connections.PIECE_BYTES):
            pieces.append(data)
        return b"".join(pieces)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _connect(self) -> Connection:
        """The connection; if there is none, a new one at the present position."""
        while self._connection is None:
            try:
                self._connection = connections.connect(
                    self.url, self.position, self._stall_seconds, self._stopped
                )
                self._continue_on(self._connection)
            except Exception as error:
                self._handle_failure(error)
        return self._connection

    def _continue_on(self, connection: Connection) -> None:
        """Skips what was read already. Raises ObjectChanged when another object is there now."""
        before, now = (self.size, self.identity), (connection.size, connection.identity)
        if any(b and n and b != n for b, n in zip(before, now, strict=True)):
            raise ObjectChanged(f"{shown(self.url)} changed while it was read")
        self.size, self.identity = now
        count = self.position - connection.start
        while count:
            data = connection.read(min(count, connections.PIECE_BYTES))
            if not data:
                raise ConnectionError(f"ended {count:,} bytes before the earlier cut")
            count -= len(data)

    def _check_end(self) -> None:
        """Raises ConnectionError when bytes are missing, as after a cut that HTTP cannot show."""
        size = self.size if self.size is not None else self._expected_size
        if size is None or self.position >= size:
            return
        if self._ended_at == self.position:  # twice at the same byte is not by chance
            raise ObjectChanged(
                f"{shown(self.url)} has {self.position:,} bytes, not the expected {size:,}"
            )
        self._ended_at = self.position
        raise ConnectionError(f"ended after {self.position:,} of {size:,} bytes")

    def _handle_failure(self, error: Exception) -> None:
        """Waits until the next try is due, or raises the error that ends the run."""
        self._disconnect()
        if isinstance(error, UserError):
            raise error
        if connections.is_past_end(error) and self.position:
            raise ObjectChanged(
                f"{shown(self.url)} is shorter than it was: it has no byte {self.position:,}"
            ) from error
        if reason := connections.permanent_reason(error):
            raise UserError(f"{shown(self.url)}: {reason}") from error
        self._backoff.wait(error, f"{shown(self.url)} cannot be read")
        if self._stopped.is_set():
            raise error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
