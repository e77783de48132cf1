"""What the batch script reads of a training: a file of lines, because launchers do not pass on exit
codes and the script counts how often a job is requeued without progress."""

import os
from pathlib import Path

JOB_HISTORY_FILE = "GANSCALE_JOB_HISTORY_FILE"

_lost_lines: list[str] = []


def has_job_history() -> bool:
    """Whether a batch script reads along, which requeues the job."""
    return JOB_HISTORY_FILE in os.environ


def is_job_history_complete() -> bool:
    """Whether every line for the batch script could be written."""
    return has_job_history() and not _lost_lines


def note_started(images_seen: int) -> None:
    """`started IMAGES`: the state is loaded and training begins. On one rank."""
    _append(f"started {images_seen}")


def note_bad_host(host: str) -> None:
    """`bad HOST`: the next attempt had better avoid this machine. On one rank."""
    _append(f"bad {host}")


def note_ended(exit_code: int, message: str) -> None:
    """`ended CODE MESSAGE`: this attempt is over. On one rank."""
    _append(f"ended {exit_code} {' '.join(message.split())}")


def _append(line: str) -> None:
    if path := os.environ.get(JOB_HISTORY_FILE):
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:  # such as a full disk: the script then uses the exit code
            _lost_lines.append(line)
