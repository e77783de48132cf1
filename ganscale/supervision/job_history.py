"""What a batch script is told: lines in a file that it names, since launchers keep exit codes to
themselves, and a run that is requeued has a history."""

import os
from pathlib import Path

JOB_HISTORY_FILE = "GANSCALE_JOB_HISTORY_FILE"

_lost_lines: list[str] = []


def has_job_history() -> bool:
    """Whether a batch script is told, which has the run come again."""
    return JOB_HISTORY_FILE in os.environ


def is_job_history_complete() -> bool:
    """Whether the batch script has every line that it was to be told."""
    return has_job_history() and not _lost_lines


def note_started(images_seen: int) -> None:
    """`started IMAGES`: the run has its state and begins to train. On one rank."""
    _append(f"started {images_seen}")


def note_ended(exit_code: int, sentence: str) -> None:
    """`ended CODE SENTENCE`: this attempt is over. On one rank."""
    _append(f"ended {exit_code} {' '.join(sentence.split())}")


def _append(line: str) -> None:
    if path := os.environ.get(JOB_HISTORY_FILE):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:  # a full disk is told elsewhere; the script then goes by the exit code
            _lost_lines.append(line)
