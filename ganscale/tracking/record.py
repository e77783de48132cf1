"""`metrics.jsonl`, the record of a run: one JSON object for each row, written, cut and followed."""

import contextlib
import io
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

IMAGES_SEEN = "progress/images_seen"
"""Every row has this name: the run's time, counted in images."""

Value = float | int | str | dict[str, Any]
"""A number (also numpy's), a text, the path of a sample grid in the run folder (under `samples/`),
or a histogram: {"counts": n numbers, "edges": n + 1 numbers}."""

# JSON has no such numbers and other readers fail on Python's NaN, so they are written as texts.
_NON_FINITE = re.compile(rb'(?<!\\)"(nan|-?inf)"(?!:)')  # but for names and ends of longer texts
_LITERALS = {b"nan": b"NaN", b"inf": b"Infinity", b"-inf": b"-Infinity"}

_IMAGES_SEEN = re.compile(rb'"%s": (\d{1,15})[,}]' % IMAGES_SEEN.encode())
_MAX_IMAGES = 2**53  # beyond it, neither JavaScript nor a float counts by ones
_BLOCK_BYTES = 1 << 20
_MAX_PENDING_ROWS = 10_000  # about a day at one every ten seconds; a few tens of MB

logger = logging.getLogger(__name__)


class Record:
    """Appends rows to a JSONL file and hands each to the operating system at once, so a row
    survives the death of the process. While the disk is full or unreachable, rows wait in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost_rows = 0
        self.pending_rows: deque[bytes] = deque()  # wait in memory for room on the disk
        self._descriptor: int | None = None
        self._has_warned = False

    def append(self, row: Mapping[str, Value]) -> None:
        """Writes one row with its names sorted; values may be numpy scalars.

        Raises ValueError for a row without an integer `progress/images_seen`, TypeError for a value
        that is not a number, text, list or dict.
        """
        if not isinstance(row.get(IMAGES_SEEN), int):
            raise ValueError(f"a row needs an integer {IMAGES_SEEN}, got {row.get(IMAGES_SEEN)!r}")
        line = json.dumps(to_json(row), sort_keys=True, allow_nan=False)
        if len(self.pending_rows) < _MAX_PENDING_ROWS:
            self.pending_rows.append(line.encode() + b"\n")
        else:
            self.lost_rows += 1
        self._write_pending()

    def rewind(self, images_seen: int) -> int:
        """Drops the rows after `images_seen`, and returns how many lines those were.

        Rows are in order of `images_seen`, so one truncation drops them: it needs no disk space
        and is atomic. A half-written last line, left by a crash, is dropped too, with a warning.
        """
        if not self.path.exists():
            return 0
        dropped_lines = 0
        with self.path.open("rb+") as file:
            kept_bytes = file.seek(0, os.SEEK_END)
            for line in _lines_backwards(file):
                seen = images_seen_of(line)
                if seen is None:
                    logger.warning("%s: skipped %d damaged bytes", self.path, len(line))
                elif seen <= images_seen:
                    break
                kept_bytes -= len(line)
                dropped_lines += 1
            if dropped_lines:
                file.truncate(kept_bytes)
                os.fsync(file.fileno())
        return dropped_lines

    def has(self, name: str, images_seen: int | None = None) -> bool:
        """Whether a row, or one at `images_seen`, holds a value with this name."""
        key = json.dumps(name).encode() + b": "
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            return any(
                images_seen is None or images_seen_of(line) == images_seen
                for line in file
                if key in line
            )
        return False

    def close(self) -> None:
        """Tries once more to write the pending rows, and warns of those it cannot write."""
        self._write_pending()
        if unwritten := self.lost_rows + len(self.pending_rows):
            logger.warning("%s lacks %d rows: no room on the disk", self.path, unwritten)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_pending(self) -> None:
        try:
            if self._descriptor is None and self.pending_rows:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            while self.pending_rows and self._descriptor is not None:
                # A nearly full disk takes only the start of a line: the rest stays in the queue.
                written = os.write(self._descriptor, self.pending_rows[0])
                self.pending_rows[0] = self.pending_rows[0][written:]
                if not self.pending_rows[0]:
                    self.pending_rows.popleft()
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s cannot be written (%s); rows wait in memory", self.path, error)
                self._has_warned = True


class RecordTail:
    """The rows of a record that may still be growing.

    W&B keeps one row for each value of its own step and drops later ones with the same step, while
    a run may log several rows at one moment: metrics, samples, scores. So W&B's step is
    `images_seen`, or one more than the last row's step if that is taken. It depends on the record
    alone: any process gives a row the same step at any time. Charts use `progress/images_seen`,
    which is exact, as their axis.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0  # bytes read so far
        self._last_step = -1
        self.count = 0  # rows read so far

    def read(self, first_step: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """(W&B's step, row) of the new rows from `first_step` on; an incomplete last line is left
        for the next call.

        Raises OSError if the file cannot be read; a later call continues without loss.
        """
        for _, step, line in self.lines():
            # Parsing takes most of the time, so rows before `first_step` are not parsed.
            if step >= first_step and (row := parse_row(line)) is not None:
                yield step, row

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(images seen, W&B's step, line) of the new rows, as for `read`."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if (images_seen := images_seen_of(line)) is not None:
                    self.count += 1
                    self._last_step = max(images_seen, self._last_step + 1)
                    yield images_seen, self._last_step, line


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if the line is damaged or incomplete."""
    try:
        literal = _NON_FINITE.sub(lambda match: _LITERALS[match[1]], line)
        row = json.loads(literal) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    images_seen = row.get(IMAGES_SEEN) if isinstance(row, dict) else None
    return row if type(images_seen) is int and 0 <= images_seen < _MAX_IMAGES else None


def images_seen_of(line: bytes) -> int | None:
    """The images seen of `parse_row`'s row, in a hundredth of its time for an ordinary line."""
    is_object = line.startswith(b"{") and line.endswith(b"}\n")
    # Half a line before a complete one unbalances the brackets, or has the name twice.
    if is_object and line.count(b"{") == line.count(b"}"):
        counts = _IMAGES_SEEN.findall(line)
        if len(counts) == 1:
            return int(counts[0])
    row = parse_row(line)
    return None if row is None else row[IMAGES_SEEN]


def newest_images_seen(path: Path) -> int:
    """The images seen of a record's last whole row; 0 without one."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        counts = (images_seen_of(line) for line in _lines_backwards(file))
        return next((count for count in counts if count is not None), 0)
    return 0


def _lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(position, _BLOCK_BYTES)
        position = file.seek(position - size)
        rest, *lines = io.BytesIO(file.read(size) + rest).readlines()
        yield from reversed(lines)
    if rest:
        yield rest


def to_json(value: Any) -> Any:
    """`value` with numpy's types as Python's and, at any depth, non-finite numbers as text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value
