"""Reading a record for W&B: rows as they come, each with the step that it has there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ganscale.tracking.record import images_seen_of, parse_row


class RecordTail:
    """The rows of a record that may still be growing.

    W&B keeps one row per value of its own step and drops what comes later with the same one, while
    at one moment of a run there may be a row of meters, one of pictures and one of scores. So its
    step is `images_seen`, moved on by one where that is taken: a function of the record alone, so
    that whoever sends a row, and whenever, gives it the same step. Charts have
    `progress/images_seen` as their axis, which is exact.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0  # in bytes: the file before it was read
        self._last_step = -1
        self.count = 0  # of the rows that were read so far

    def read(self, first_step: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """(W&B's step, row) for what is new in the file, without the rows with a step below
        `first_step`; half a line at its end is left for later.

        Raises OSError where the file cannot be read; to ask again loses nothing.
        """
        for _, step, line in self.lines():
            # A row that is not wanted is not parsed, which takes most of the time.
            if step >= first_step and (row := parse_row(line)) is not None:
                yield step, row

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(images seen, W&B's step, line) for what is new in the file, as `read`."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                if (images_seen := images_seen_of(line)) is not None:
                    self.count += 1
                    self._last_step = max(images_seen, self._last_step + 1)
                    yield images_seen, self._last_step, line
