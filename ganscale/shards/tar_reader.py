"""A tar read once, from front to back, as fast as Python goes and with every mistake noticed.

Five times as fast as the standard library's tarfile, and stricter: where that takes a damaged
header or a missing end for the end of the archive, this raises. Formats: V7, ustar, GNU (long
names, sizes in base 256) and pax (path and size); POSIX.1-2017 (pax) and the manual of GNU tar
describe them.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from ganscale.errors import UserError

BLOCK_BYTES = 512

_CHUNK_BYTES = 1 << 20
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header: a wrong size must not fill memory
_FILE_TYPES = (b"0", b"\0", b"7")
_DATALESS_TYPES = (b"3", b"4", b"5", b"6")  # devices, folders, pipes
_LINK_TYPES = (b"1", b"2", b"S")  # S: GNU sparse
_LABEL_TYPES = (b"V", b"D")  # GNU: the volume's name, a folder's list of files
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}

Member = tuple[str, int, int]
"""A plain file: its name, its first byte in the tar, its size in bytes."""


@runtime_checkable
class Digest(Protocol):
    """A hash as those of hashlib."""

    def update(self, data: bytes, /) -> None: ...


@runtime_checkable
class Reader(Protocol):
    """A file or stream of bytes; fewer than asked for need not mean its end, none do."""

    def read(self, size: int, /) -> bytes: ...


class _BadHeader(Exception):
    pass


class TarReader:
    """The plain files of a tar; after the last, the tar is known to be complete.

    file: read from where it stands, which is the tar's first byte; it need not be seekable
    name: of the tar, for messages
    digest: given every byte in order. Without one, a seekable file is not read between headers.
    """

    def __init__(self, file: Reader, name: str, digest: Digest | None = None):
        self.name = name
        self.bytes = 0
        """The tar's size, known after the last member."""
        self._file, self._digest = file, digest
        self._may_seek = digest is None and getattr(file, "seekable", bool)()
        self._buffer, self._start = b"", 0  # the tar's bytes from _start on
        self._member: Member = ("", 0, 0)

    def __iter__(self) -> Iterator[Member]:
        """Every plain file in order. Raises UserError, and what the file's `read` raises."""
        offset = 0
        extensions: dict[str, str] = {}  # what extra headers say of the next member
        defaults: dict[str, str] = {}  # and of all further members
        while True:
            header = self._at(offset, BLOCK_BYTES)
            # Zeros add nothing, and a header is full of them: summing the rest is 3 times as fast.
            checksum = sum(header.translate(None, b"\0"))
            if len(header) < BLOCK_BYTES or (checksum == 0 and extensions):
                raise self._damaged(offset, header)
            if checksum == 0:
                break
            try:
                if not _is_checksum(header, checksum):
                    raise _BadHeader
                size = _number(header[124:136])
                kind = header[156:157]
                if kind in (b"x", b"X", b"g", b"L", b"K"):
                    content = self._extension(offset + BLOCK_BYTES, size)
                    if kind == b"g":
                        defaults |= _pax_records(content)
                    elif kind == b"L":
                        extensions.setdefault("path", _text(content))
                    elif kind != b"K":  # K: a link's long target
                        extensions |= _pax_records(content)
                    offset += BLOCK_BYTES + _whole_blocks(size)
                    continue
                name = _text(header[:100])
                if header[345] and header[257:263] == b"ustar\0":
                    name = f"{_text(header[345:500])}/{name}"
                if extensions or defaults:
                    fields = defaults | extensions
                    name = fields.get("path", name)
                    size = _decimal(fields["size"]) if "size" in fields else size
                    if any(key.startswith("GNU.sparse.") for key in fields):
                        kind = b"S"
                    extensions = {}
            except _BadHeader as error:
                raise self._damaged(offset, header) from error
            offset += BLOCK_BYTES
            if kind in _FILE_TYPES:
                self._member = (name, offset, size)
                # In tars older than POSIX a folder is a file whose name ends so.
                if kind != b"\0" or not name.endswith("/"):
                    yield self._member
            elif kind in _LINK_TYPES:
                raise UserError(
                    f"{self.name}: member '{name}' is a link or sparse, not a plain file "
                    "(GNU tar writes plain files with --dereference --hard-dereference)"
                )
            elif kind in _DATALESS_TYPES:
                size = 0
            elif kind not in _LABEL_TYPES:
                raise UserError(f"{self.name}: member '{name}' is of the unknown type {kind!r}")
            offset += _whole_blocks(size)
        self._check_end(offset)

    def data(self, limit: int | None = None) -> bytes:
        """The bytes of the member that iteration has reached, or the first `limit` of them."""
        _, offset, size = self._member
        wanted = size if limit is None else min(limit, size)
        data = self._at(offset, wanted)
        if len(data) < wanted:
            raise self._damaged(offset + wanted, b"")
        return data

    def _at(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`, fewer at the end; never before those of an earlier call."""
        first = offset - self._start
        if first + count > len(self._buffer):
            self._advance(offset, count)
            first = 0
        return self._buffer[first : first + count]

    def _advance(self, offset: int, count: int) -> None:
        """Makes the buffer begin at `offset`, with `count` bytes or all there are."""
        behind = self._start + len(self._buffer)
        if self._may_seek and offset > behind:
            self._file.seek(offset - behind, 1)  # type: ignore[attr-defined]
            self._buffer, self._start = b"", offset
        while self._start + len(self._buffer) < offset:
            self._start += len(self._buffer)
            self._buffer = self._read(_CHUNK_BYTES)
            if not self._buffer:
                return
        pieces = [self._buffer[offset - self._start :]]
        missing = count - len(pieces[0])
        while missing > 0:
            piece = self._read(max(missing, _CHUNK_BYTES))
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        self._buffer, self._start = b"".join(pieces), offset

    def _read(self, count: int) -> bytes:
        # In pieces: a size that a damaged header claims must not become one allocation.
        data = self._file.read(min(count, 64 * _CHUNK_BYTES))
        if self._digest is not None:
            self._digest.update(data)
        return data

    def _extension(self, offset: int, size: int) -> bytes:
        if size > _MAX_EXTENSION_BYTES:
            raise _BadHeader
        content = self._at(offset, size)
        if len(content) < size:
            raise _BadHeader
        return content

    def _check_end(self, offset: int) -> None:
        end = self._at(offset, 2 * BLOCK_BYTES)
        if len(end) < 2 * BLOCK_BYTES or end.strip(b"\0"):
            raise self._damaged(offset, end)
        end_of_archive = offset
        while chunk := self._at(offset, _CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise UserError(
                    f"{self.name}: there is more data behind the end of the archive (byte "
                    f"{end_of_archive:,}); tars joined with cat have to be joined with "
                    "`tar --concatenate`"
                )
            offset += len(chunk)
        self.bytes = offset

    def _damaged(self, offset: int, found: bytes) -> UserError:
        """What to say where `found`, at `offset`, is no header."""
        name, first, size = self._member
        if offset == 0:
            for magic, compression in _COMPRESSIONS.items():
                if found.startswith(magic):
                    return UserError(
                        f"{self.name}: not a readable tar: it is compressed ({compression}); "
                        "images in shards must lie in a plain tar, so unpack it first"
                    )
            reason = "no tar header at its beginning" if found else "the file is empty"
            return UserError(f"{self.name}: not a readable tar ({reason})")
        if len(found) < BLOCK_BYTES:
            if self._may_seek:
                self._start, self._buffer = self._file.seek(0, 2), b""  # type: ignore[attr-defined]
            file_bytes = self._start + len(self._buffer)
            if first + size > file_bytes:
                return UserError(
                    f"{self.name}: the tar is cut: member '{name}' ends at byte {first + size:,} "
                    f"of {file_bytes:,}"
                )
        return UserError(
            f"{self.name}: the tar is cut or damaged at byte {offset:,}: no further member and no "
            "end of archive there"
        )


def header_size(block: bytes) -> int | None:
    """The size that a member's header, 512 bytes, states; None if it is no header.

    What a pax header before it says is not known here.
    """
    try:
        checksum = sum(block)
        return _number(block[124:136]) if checksum and _is_checksum(block, checksum) else None
    except _BadHeader:
        return None


def _is_checksum(header: bytes, byte_sum: int) -> bool:
    """The sum of all bytes, its own field counted as spaces; some old writers summed signed."""
    field = header[148:156]
    stored = _number(field)
    unsigned = byte_sum - sum(field) + 8 * 32
    if unsigned == stored:
        return True
    return unsigned - 256 * sum(byte >= 128 for byte in header[:148] + header[156:]) == stored


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for what these cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise _BadHeader from error
    if number < 0:
        raise _BadHeader
    return number


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise _BadHeader
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(content: bytes) -> dict[str, str]:
    """Lines of `LENGTH KEY=VALUE`, LENGTH counting the line; only what matters here is kept."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position]:
        digits, space, _ = content[position : position + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise _BadHeader
        end = position + int(digits)
        key, equals, value = content[position + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise _BadHeader
        if key == b"path":
            records["path"] = value.decode("utf-8", "surrogateescape").rstrip("/")
        elif key == b"size" or key.startswith(b"GNU.sparse."):
            records[_text(key)] = _text(value)
        position = end
    return records


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
