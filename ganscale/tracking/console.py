"""What a user sees of a run: a progress bar on a terminal, plain lines in a log."""

import contextlib
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

from tqdm import tqdm

from ganscale.errors import UserCodeError
from ganscale.run_folder import RunFolder
from ganscale.tracking.record import Value

_SHOWN_LOSSES = {"critic": "loss/critic", "generator": "loss/generator"}
_BAR_SECONDS = 1.0
_BAR_COLUMNS = 26  # of `100%|  | 99.9k/99.9k img, `


class Console:
    """Shows the progress of a run, and logs it with date and time to `log.txt`."""

    def __init__(self, total_images: int, log_path: Path) -> None:
        self._total_images = total_images
        self._log_path = log_path
        self._parts: list[str] = []  # of the newest row
        self._drawn_at = -math.inf
        # Rate and time left come from the run: the bar's own start at zero after a resume.
        self._bar = tqdm(
            total=total_images,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}",
            disable=None,  # if stderr is not a terminal
        )

    def update(self, images_seen: int, images_per_second: float, row: Mapping[str, Value]) -> None:
        """Shows one logging interval; `row` gives `loss/critic` and `loss/generator`."""
        losses = [f"{label} {row[k]:.4f}" for label, k in _SHOWN_LOSSES.items() if k in row]
        time_left = "unknown time"
        if images_per_second > 0:
            seconds = max(self._total_images - images_seen, 0) / images_per_second
            time_left = str(timedelta(seconds=round(seconds)))
        parts = [*losses, f"{images_per_second:,.0f} img/s", f"{time_left} left"]
        line = f"{images_seen:,} of {self._total_images:,} images, {', '.join(parts)}"
        if self._bar.disable:
            _print_above_bar(line)
        else:
            self._parts = parts
            self._draw(images_seen)
        append_line(self._log_path, line)

    def advance(self, images_seen: int) -> None:
        """Moves the bar, at most once a second."""
        if not self._bar.disable and time.monotonic() - self._drawn_at >= _BAR_SECONDS:
            self._draw(images_seen)

    def _draw(self, images_seen: int) -> None:
        """On a narrow terminal without the losses, and then without the rate."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            columns = 80
        shown = self._parts
        while len(shown) > 1 and len(", ".join(shown)) > columns - _BAR_COLUMNS:
            shown = shown[1:]
        self._drawn_at = time.monotonic()
        self._bar.n = images_seen
        self._bar.set_postfix_str(", ".join(shown))

    def close(self) -> None:
        """Leaves the bar on the terminal as it is."""
        self._bar.close()


def setup_logging(log_path: Path, rank: int) -> None:
    """Sends `ganscale`'s log messages to the console and the log file on rank 0, and warnings of
    other ranks to stderr. A second call replaces the handlers of the first."""
    ganscale_logger = logging.getLogger("ganscale")
    ganscale_logger.propagate = False
    ganscale_logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if rank == 0:
        handler = _ConsoleAndFile(log_path)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(levelname)s: %(message)s"))
    ganscale_logger.handlers[:] = [handler]


class _ConsoleAndFile(logging.Handler):
    """Logs the bare message; warnings and errors begin with their level."""

    def __init__(self, log_path: Path) -> None:
        super().__init__()
        self._log_path = log_path

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname}: {text}"
        _print_above_bar(text)
        append_line(self._log_path, text)


# A job's stdout is often a file on the disk that holds the run. When that is full, lines are
# dropped: the rows are in the record, and training matters more.


def _print_above_bar(text: str) -> None:
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def log_users_traceback(folder: RunFolder | None, error: Exception) -> None:
    """Appends the traceback of an exception in the user's own code to the log file; its message
    has only the last line."""
    if folder is not None and isinstance(error, UserCodeError) and error.__cause__ is not None:
        with contextlib.suppress(OSError):
            folder.path.mkdir(parents=True, exist_ok=True)
        append_line(folder.log, "".join(traceback.format_exception(error.__cause__)).rstrip())


def append_line(path: Path, text: str) -> None:
    """Appends `text` to a log file, with date and time."""
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
