"""Objects that lie elsewhere (http, s3, gs, hf, ..., or what a command prints), read in order.

A location is a folder on disk, a URL that fsspec knows, or `pipe:COMMAND {}`, a shell command that
prints the object whose quoted name takes the place of {}. Commands are run as they are written, so
they may come from the user's config and command line only, never from a manifest.
"""

import glob
import io
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

import braceexpand

from ganscale.data.remote import connections
from ganscale.data.remote.connections import Connection
from ganscale.data.backoff import Backoff
from ganscale.errors import UserError
from ganscale.secrets import without_secrets

PIPE = "pipe:"
STALL_SECONDS = 30.0
"""A connection that is silent so long counts as broken."""

_BUFFER_BYTES = 1 << 20
_WEB = ("http://", "https://")
_STORES = re.compile(r"(https?|s3a?|gc?s|hf|az|abfss?|adl|oci|oss)://(?!.*::)")


class ObjectChanged(UserError):
    """An object is not, or no longer, the one that was indexed or begun."""


def is_remote(location: str) -> bool:
    """Whether the location is a URL or a command rather than a path on disk."""
    if location.startswith("file://"):
        return False
    return location.startswith(PIPE) or "://" in location


def is_object_store(location: str) -> bool:
    """Whether the location is a URL that a file from elsewhere may point to: no command, nothing
    on this machine's disks."""
    return _STORES.match(location) is not None


def join(base: str, name: str) -> str:
    """The address of the object `name` in `base`.

    Raises UserError for a command without {}.
    """
    if base.startswith(PIPE):
        if "{}" not in base:
            raise UserError(f"{base!r} has no {{}} where a shard's name would stand")
        return base.replace("{}", shlex.quote(name))
    if base.startswith(_WEB):
        # A question mark or per cent sign in a name is not the URL's own; a token comes last.
        parts = urlsplit(base)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{base.rstrip('/')}/{name}"


def shown(address: str) -> str:
    """The address as messages have it: without password and signature. Commands stay whole, for
    only the shard's name tells them apart."""
    return address if address.startswith(PIPE) else without_secrets(address)


def expand(pattern: str, retry_seconds: float = 0.0) -> list[str]:
    """The addresses that `pattern` stands for: {000..099} and {a,b} in order, * and ? sorted.

    Raises UserError for a local file that is not there and wildcards that nothing matches, and
    UnavailableError for a store that could not be listed for `retry_seconds`; whether a single
    remote object is there shows when it is opened.
    """
    try:
        patterns = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"the braces of {pattern} do not pair: {error}") from error
    return [address for each in patterns for address in _matches(each, pattern, retry_seconds)]


def _matches(pattern: str, given: str, retry_seconds: float) -> list[str]:
    if pattern.startswith(PIPE):
        return [pattern]
    if not is_remote(pattern):
        found = sorted(glob.glob(pattern.removeprefix("file://")))  # noqa: PTH207
    # A question mark in a web address begins its query.
    elif any(each in pattern for each in ("*" if pattern.startswith(_WEB) else "*?[")):
        found = _listed(pattern, Backoff(retry_seconds))
    else:
        return [pattern]
    if not found:
        within = "" if pattern == given else f", which {given} stands for"
        raise UserError(f"no file matches {shown(pattern)}{within}")
    return found


def _listed(pattern: str, patience: Backoff) -> list[str]:
    problem = f"{shown(pattern)} cannot be listed"
    while True:
        try:
            return connections.matching(pattern, STALL_SECONDS)
        except UserError:
            raise
        except Exception as error:
            if reason := connections.permanent_reason(error):
                raise UserError(f"{problem}: {reason}") from error
            patience.wait(error, problem)


def read_bytes(url: str, retry_seconds: float) -> bytes:
    """A whole small object. Raises as `open_stream`."""
    with open_stream(url, retry_seconds) as stream:
        return stream.read()


@contextmanager
def open_stream(
    url: str,
    retry_seconds: float,
    *,
    stall_seconds: float = STALL_SECONDS,
    stopped: threading.Event | None = None,
) -> Iterator[BinaryIO]:
    """A sequential reader of an object from its first to its last byte; `read(n)` is complete.

    Opening and reading raise UserError for what trying again cannot mend (no such object, no
    access, an object that changes meanwhile), and UnavailableError for what failed for longer than
    `retry_seconds`. `stopped` as in `RemoteObject`.
    """
    source = RemoteObject(url, retry_seconds, stall_seconds=stall_seconds, stopped=stopped)
    with io.BufferedReader(source, _BUFFER_BYTES) as stream:
        yield stream


class RemoteObject(io.RawIOBase):
    """A reader that takes up a broken connection where it was cut: by range where the server can,
    else from the start, skipping what was read.

    start: the first byte to read
    expected_size: of the whole object, in bytes: what tells a short body from a complete one where
        the server does not say
    stopped: set by another thread, it ends commands and waits; reading then raises any exception
    Attributes: `size`, of the whole object as its server says, or None; `identity`, what changes
    when the object does (an ETag), or "".
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
        self.url = url
        self.position = start
        self.size: int | None = None
        self.identity = ""
        self._expected_size = expected_size
        self._stall_seconds = stall_seconds
        self._stopped = stopped or threading.Event()
        self._patience = Backoff(retry_seconds, self._stopped)
        self._connection: Connection | None = None
        self._ended_at = -1
        self._has_begun = False
        self._connected()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            connection = self._connected()
            try:
                data = connection.read(min(len(view), connections.PIECE_BYTES))
                if not data:
                    self._check_end()
            except Exception as error:
                self._failed(error)
                continue
            view[: len(data)] = data
            self.position += len(data)
            if data:
                self._patience.succeeded()
            return len(data)

    def readall(self) -> bytes:
        pieces = []  # io's own asks for 8 KiB at a time
        while data := self.read(connections.PIECE_BYTES):
            pieces.append(data)
        return b"".join(pieces)

    def close(self) -> None:
        if not self.closed:
            self._disconnect()
        super().close()

    def _connected(self) -> Connection:
        """The connection, anew at the present position if there is none."""
        while self._connection is None:
            try:
                self._connection = connections.connect(
                    self.url, self.position, self._stall_seconds, self._stopped
                )
                self._compare(self._connection)
                self._skip(self._connection, self.position - self._connection.start)
            except Exception as error:
                self._failed(error)
        return self._connection

    def _compare(self, connection: Connection) -> None:
        """Raises ObjectChanged when this is not the object that was begun."""
        if self._has_begun:
            before, now = (self.size, self.identity), (connection.size, connection.identity)
            if any(b and n and b != n for b, n in zip(before, now, strict=True)):
                raise ObjectChanged(f"{shown(self.url)} changed while it was read")
        self._has_begun = True
        self.size, self.identity = connection.size, connection.identity

    @staticmethod
    def _skip(connection: Connection, count: int) -> None:
        while count:
            data = connection.read(min(count, connections.PIECE_BYTES))
            if not data:
                raise ConnectionError(f"ended {count:,} bytes before where it was cut")
            count -= len(data)

    def _check_end(self) -> None:
        """Raises ConnectionError when bytes are missing, as after a cut that HTTP cannot show."""
        size = self.size if self.size is not None else self._expected_size
        if size is None or self.position >= size:
            return
        if self._ended_at == self.position:  # twice at the same byte is no accident
            raise ObjectChanged(
                f"{shown(self.url)} has {self.position:,} bytes, not the expected {size:,}"
            )
        self._ended_at = self.position
        raise ConnectionError(f"ended after {self.position:,} of {size:,} bytes")

    def _failed(self, error: Exception) -> None:
        """Waits until the next try is due, or raises what the run is to end with."""
        self._disconnect()
        if isinstance(error, UserError):
            raise error
        if connections.is_past_end(error) and self.position:
            raise ObjectChanged(
                f"{shown(self.url)} is shorter than it was: it has no byte {self.position:,}"
            ) from error
        reason = connections.permanent_reason(error)
        if reason:
            raise UserError(f"{shown(self.url)}: {reason}") from error
        self._patience.wait(error, f"{shown(self.url)} cannot be read")
        if self._stopped.is_set():
            raise error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
