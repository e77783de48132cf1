"""`metrics.jsonl`: one JSON object per logged row, the record of truth of a run."""

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
"""The name that every row carries: the time of the run, in images."""

Value = float | int | str | dict[str, Any]
"""A number (numpy's, too), a text, a picture's path in the run folder (under `samples/`), or a
histogram: {"counts": n numbers, "edges": n + 1 numbers}."""

# JSON has no such numbers, and the literal NaN that Python writes by default breaks other readers.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_NAMED = re.compile(rb'"%s": (-?\d+)[,}]' % IMAGES_SEEN.encode())
_BLOCK_BYTES = 1 << 20

# About a day of rows at one every ten seconds, and some tens of MB.
_MAX_PENDING_ROWS = 10_000

logger = logging.getLogger(__name__)


class Record:
    """Appends rows to a JSONL file, each handed to the operating system at once.

    A row therefore survives the death of the process. A disk that is full, or a file system that
    is away, never raises: rows wait in memory, in order, and are written once there is room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost_rows = 0
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._has_warned = False

    @property
    def pending_rows(self) -> int:
        """The rows that wait in memory for room on the disk."""
        return len(self._waiting)

    def append(self, row: Mapping[str, Value]) -> None:
        """Writes one row with its names sorted; values may be numpy scalars.

        Raises ValueError for a row without an integer `progress/images_seen`, TypeError for a value
        that is neither number, text, list nor dict.
        """
        if not isinstance(row.get(IMAGES_SEEN), int):
            raise ValueError(f"a row needs an integer {IMAGES_SEEN}, got {row.get(IMAGES_SEEN)!r}")
        line = json.dumps(_to_json(row), sort_keys=True, allow_nan=False)
        if len(self._waiting) < _MAX_PENDING_ROWS:
            self._waiting.append(line.encode() + b"\n")
        else:
            self.lost_rows += 1
        self._write_waiting()

    def rewind(self, images_seen: int) -> int:
        """Drops the rows after `images_seen`, and returns how many lines that were.

        Rows are in order of `images_seen`, so that dropping is one cut of the file: it takes no
        space, and a crash leaves the old file or the new one. A last line that a crash left half
        written is dropped, too, and reported.
        """
        if not self.path.exists():
            return 0
        dropped_lines = 0
        with self.path.open("rb+") as file:
            kept_bytes = file.seek(0, os.SEEK_END)
            for line in _lines_backwards(file):
                seen = images_seen_of(line)
                if seen is None:
                    logger.warning("%s: passed over %d damaged bytes", self.path, len(line))
                elif seen <= images_seen:
                    break
                kept_bytes -= len(line)
                dropped_lines += 1
            if dropped_lines:
                file.truncate(kept_bytes)
                os.fsync(file.fileno())
        return dropped_lines

    def close(self) -> None:
        """Tries once more to write what waits, warns of what could not be written, and closes."""
        self._write_waiting()
        if unwritten := self.lost_rows + self.pending_rows:
            logger.warning("%s lacks %d rows: no room on the disk", self.path, unwritten)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write_waiting(self) -> None:
        try:
            if self._descriptor is None and self._waiting:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            while self._waiting and self._descriptor is not None:
                # A disk with little room takes the first part of a line. The rest stays at the
                # head of the queue, so that the line is whole when there is room again.
                written = os.write(self._descriptor, self._waiting[0])
                self._waiting[0] = self._waiting[0][written:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s cannot be written (%s); rows wait in memory", self.path, error)
                self._has_warned = True


def read_rows(path: Path) -> Iterator[dict[str, Value]]:
    """The rows of a record, in order; damaged lines are passed over with a warning."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (row := parse_row(line)) is not None:
                yield row
            else:
                logger.warning("%s: line %d is damaged", path, number)


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None where the line is not whole."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get(IMAGES_SEEN), int):
        return None
    return {name: _from_json(value) for name, value in row.items()}


def images_seen_of(line: bytes) -> int | None:
    """That of `parse_row`, in a hundredth of its time where nothing looks unusual."""
    whole = line.startswith(b"{") and line.endswith(b"}\n")
    # Half a line before a whole one shows in its brackets, or has the name twice.
    if whole and line.count(b"{") == line.count(b"}") and len(found := _NAMED.findall(line)) == 1:
        return int(found[0])
    row = parse_row(line)
    return None if row is None else row[IMAGES_SEEN]


def _lines_backwards(file: BinaryIO) -> Iterator[bytes]:
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(position, _BLOCK_BYTES)
        position = file.seek(position - size)
        rest, *lines = io.BytesIO(file.read(size) + rest).readlines()
        yield from reversed(lines)
    if rest:
        yield rest


def _to_json(value: Any) -> Any:
    """`value` without numpy's types and, at any depth, numbers that JSON has not."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _to_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _from_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    return value
