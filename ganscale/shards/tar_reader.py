"""A fast, strict reader of tars, from front to back.

It is five times as fast as the standard library's tarfile, and stricter: tarfile takes a damaged
header or a missing end for the end of the archive; this raises. Formats: V7, ustar, GNU (long
names, sizes in base 256) and pax (path, size), see POSIX.1-2017 (pax) and the GNU tar manual.
"""

import hashlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from ganscale.errors import UserError

BLOCK_BYTES = 512

_CHUNK_BYTES = 1 << 20
_MAX_EXTENSION_BYTES = 1 << 20  # long names and pax headers: a wrong size must not fill memory
_FILE_TYPES = (b"0", b"\0", b"7")
_DATALESS_TYPES = (b"3", b"4", b"5", b"6")  # devices, folders, pipes
_EXTENSION_TYPES = (b"x", b"X", b"g", b"L", b"K")  # pax, Solaris, pax defaults, GNU long names
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
class Reader(Protocol):
    """A file or stream of bytes. A short read is not the end; an empty one is."""

    def read(self, size: int, /) -> bytes: ...


class TarReader:
    """Iterates over the plain files of a tar; at the end, the tar is known to be complete.

    file: positioned at the tar's first byte; it need not be seekable
    name: the tar's name in messages
    with_sha256: reads every byte; otherwise a seekable file is not read between headers

    Attributes, known after the last member: `bytes`, the tar's size, and `sha256`.
    """

    def __init__(self, file: Reader, name: str, with_sha256: bool = False):
        self.name = name
        self.bytes = 0
        self._file = file
        self._digest = hashlib.sha256() if with_sha256 else None
        self._may_seek = not with_sha256 and getattr(file, "seekable", bool)()
        self._buffer, self._start = b"", 0  # the tar's bytes from _start on
        self._member: Member = ("", 0, 0)

    @property
    def sha256(self) -> str:
        """The SHA-256 in hexadecimal; "" without `with_sha256`."""
        return self._digest.hexdigest() if self._digest else ""

    def __iter__(self) -> Iterator[Member]:
        """Every plain file in order. Raises UserError, and what the file's `read` raises."""
        offset = 0
        extensions: dict[str, str] = {}  # from extra headers, for the next member
        defaults: dict[str, str] = {}  # from extra headers, for all further members
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
                    raise ValueError("the checksum does not match")
                size, kind = _number(header[124:136]), header[156:157]
                if kind in _EXTENSION_TYPES:
                    content = self._at(offset + BLOCK_BYTES, min(size, _MAX_EXTENSION_BYTES))
                    if len(content) < size:
                        raise ValueError("the extra header is cut or too long")
                    _add_extension(kind, content, extensions, defaults)
                    offset += BLOCK_BYTES + _whole_blocks(size)
                    continue
                name, size, kind = _member(header, size, kind, defaults | extensions)
                extensions = {}
            except ValueError as error:
                raise self._damaged(offset, header) from error
            offset += BLOCK_BYTES
            if kind in _FILE_TYPES:
                self._member = (name, offset, size)
                # In tars older than POSIX, a folder is a file whose name ends with a slash.
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
                raise UserError(f"{self.name}: member '{name}' has the unknown type {kind!r}")
            offset += _whole_blocks(size)
        self._check_end(offset)

    def data(self, limit: int | None = None) -> bytes:
        """The current member's bytes, or the first `limit` of them."""
        _, offset, size = self._member
        count = size if limit is None else min(limit, size)
        data = self._at(offset, count)
        if len(data) < count:
            raise self._damaged(offset + count, b"")
        return data

    def _at(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`, fewer at the end; `offset` never goes back."""
        first = offset - self._start
        if first + count > len(self._buffer):
            self._advance(offset, count)
            first = 0
        return self._buffer[first : first + count]

    def _advance(self, offset: int, count: int) -> None:
        """Makes the buffer begin at `offset`, with `count` bytes or all there are."""
        buffer_end = self._start + len(self._buffer)
        if self._may_seek and offset > buffer_end:
            self._file.seek(offset - buffer_end, 1)  # type: ignore[attr-defined]
            self._buffer, self._start = b"", offset
        while self._start + len(self._buffer) < offset:
            self._start += len(self._buffer)
            self._buffer = self._read(_CHUNK_BYTES)
            if not self._buffer:
                return
        pieces = [self._buffer[offset - self._start :]]
        missing = count - len(pieces[0])
        while missing > 0 and (piece := self._read(max(missing, _CHUNK_BYTES))):
            pieces.append(piece)
            missing -= len(piece)
        self._buffer, self._start = b"".join(pieces), offset

    def _read(self, count: int) -> bytes:
        # In pieces, so that a wrong size in a damaged header cannot fill memory.
        data = self._file.read(min(count, 64 * _CHUNK_BYTES))
        if self._digest is not None:
            self._digest.update(data)
        return data

    def _check_end(self, offset: int) -> None:
        end = self._at(offset, 2 * BLOCK_BYTES)
        if len(end) < 2 * BLOCK_BYTES or end.strip(b"\0"):
            raise self._damaged(offset, end)
        end_of_archive = offset
        while chunk := self._at(offset, _CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise UserError(
                    f"{self.name}: there is more data after the end of the archive (byte "
                    f"{end_of_archive:,}); join tars with `tar --concatenate`, not with cat"
                )
            offset += len(chunk)
        self.bytes = offset

    def _damaged(self, offset: int, block: bytes) -> UserError:
        """The error for a `block` at `offset` that should be a header."""
        name, first, size = self._member
        if offset == 0:
            reason = "it does not begin with a tar header" if block else "the file is empty"
            for magic, kind in _COMPRESSIONS.items():
                if block.startswith(magic):
                    reason = f"it is compressed ({kind}); shards must not be: unpack it first"
            return UserError(f"{self.name}: not a readable tar: {reason}")
        if len(block) < BLOCK_BYTES:
            if self._may_seek:
                self._start, self._buffer = self._file.seek(0, 2), b""  # type: ignore[attr-defined]
            file_bytes = self._start + len(self._buffer)
            if first + size > file_bytes:
                return UserError(
                    f"{self.name}: the tar is cut: member '{name}' should end at byte "
                    f"{first + size:,}, but the file has {file_bytes:,}"
                )
        return UserError(
            f"{self.name}: the tar is cut or damaged at byte {offset:,}: neither a member nor the "
            "end of the archive is there"
        )


def _add_extension(
    kind: bytes, content: bytes, extensions: dict[str, str], defaults: dict[str, str]
) -> None:
    """Adds what an extra header states about the next member (kind g: about all further ones)."""
    if kind == b"g":
        defaults |= _pax_records(content)
    elif kind == b"L":
        extensions.setdefault("path", _text(content))
    elif kind != b"K":  # K: the long target of a link
        extensions |= _pax_records(content)


def _member(
    header: bytes, size: int, kind: bytes, records: dict[str, str]
) -> tuple[str, int, bytes]:
    """A member's name, size and type; `records` of extra headers replace the header's own."""
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        name = f"{_text(header[345:500])}/{name}"
    if not records:
        return name, size, kind
    if "size" in records:
        digits = records["size"]
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 19:
            raise ValueError(f"'{digits}' is not a size")
        size = int(digits)
    if any(key.startswith("GNU.sparse.") for key in records):
        kind = b"S"
    return records.get("path", name), size, kind


def header_size(block: bytes) -> int | None:
    """The size in a member's 512-byte header, which a pax header may override; None if it is not a
    header."""
    try:
        checksum = sum(block)
        return _number(block[124:136]) if checksum and _is_checksum(block, checksum) else None
    except ValueError:
        return None


def _is_checksum(header: bytes, byte_sum: int) -> bool:
    """Whether the checksum fits: all bytes summed, its own field as spaces. Some old writers
    summed signed bytes."""
    field = header[148:156]
    excess = byte_sum - sum(field) + 8 * 32 - _number(field)
    return not excess or excess == 256 * sum(byte >= 128 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for larger numbers. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(content: bytes) -> dict[str, str]:
    """Lines of `LENGTH KEY=VALUE`, where LENGTH counts the line; keys not used here are dropped.
    Raises ValueError."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position]:
        digits, space, _ = content[position : position + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise ValueError(f"no length at byte {position}")
        end = position + int(digits)
        key, equals, value = content[position + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise ValueError(f"no pax record at byte {position}")
        if key == b"path":
            records["path"] = value.decode("utf-8", "surrogateescape").rstrip("/")
        elif key == b"size" or key.startswith(b"GNU.sparse."):
            records[_text(key)] = _text(value)
        position = end
    return records


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
