"""`metrics.jsonl`: one JSON object per logged row, the record of truth of a run."""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

IMAGES_SEEN = "progress/images_seen"
"""The name that every row carries: the time of the run, in images."""

Value = float | int | str | dict[str, Any]
"""A number (numpy's, too), a text, a picture's path in the run folder (under `samples/`), or a
histogram: {"counts": n numbers, "edges": n + 1 numbers}."""

# JSON has no such numbers, and the literal NaN that Python writes by default breaks other readers.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

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

        Raises ValueError for a row without an integer `progress/images_seen`.
        """
        if not isinstance(row.get(IMAGES_SEEN), int):
            raise ValueError(f"a row needs an integer {IMAGES_SEEN}, got {row.get(IMAGES_SEEN)!r}")
        line = json.dumps({name: _to_json(value) for name, value in row.items()}, sort_keys=True)
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
        position, kept_bytes, dropped_lines = 0, 0, 0
        for line in self._lines():
            position += len(line)
            dropped_lines += 1
            row = _parse(line)
            if row is None:
                logger.warning("%s: passed over %d damaged bytes", self.path, len(line))
            elif row[IMAGES_SEEN] <= images_seen:
                kept_bytes, dropped_lines = position, 0
        if dropped_lines:
            with self.path.open("rb+") as file:
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

    def _lines(self) -> Iterator[bytes]:
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from file

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
    row = _parse(line)
    return None if row is None else {name: _from_json(value) for name, value in row.items()}


def _parse(line: bytes) -> dict[str, Any] | None:
    """`parse_row` with values as JSON has them."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get(IMAGES_SEEN), int) else None


def _to_json(value: Any) -> Value:
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Value) -> Value:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
