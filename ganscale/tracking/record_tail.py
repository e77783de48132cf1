"""Follows a record as it grows, and gives each row its step in W&B."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ganscale.tracking.record import images_seen_of, parse_row


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
