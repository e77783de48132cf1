"""What a batch script is told: lines in a file that it names, since launchers keep exit codes to
themselves, and a run that is requeued has a history."""

import contextlib
import os
from pathlib import Path

ATTEMPTS_FILE = "GANSCALE_ATTEMPTS_FILE"


def has_attempts() -> bool:
    """Whether a batch script is told, which has the run come again."""
    return ATTEMPTS_FILE in os.environ


def note_started(images_seen: int) -> None:
    """`started IMAGES`: the run has its state and begins to train. On one rank."""
    _append(f"started {images_seen}")


def note_ended(exit_code: int, sentence: str) -> None:
    """`ended CODE SENTENCE`: this attempt is over. On one rank."""
    _append(f"ended {exit_code} {' '.join(sentence.split())}")


def _append(line: str) -> None:
    if path := os.environ.get(ATTEMPTS_FILE):
        # A full disk is told elsewhere; without the line, the script goes by the exit code.
        with contextlib.suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
