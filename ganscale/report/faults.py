"""The state of a run, and everything that went wrong in it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ganscale.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RANK_LOST,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
)
from ganscale.report.run_reader import Run
from ganscale.secrets import without_secrets

Level = Literal["error", "warning", "note"]

_KINDS_NAMED = 30  # kinds of lines from the log
_NAMES_NAMED = 8  # metrics that were not finite
_MAX_LINE = 500  # characters of a line that are shown
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:(WARNING|ERROR|CRITICAL): )?(.*)")

_ENDS = {
    EXIT_DONE: ("done", "good"),
    EXIT_FAILED: ("failed", "error"),
    EXIT_USER_ERROR: ("ended by a mistake in its settings or data", "error"),
    EXIT_REQUEUE: ("stopped; the same command continues it", "warning"),
    EXIT_RANK_LOST: ("lost a rank; the same command continues it", "warning"),
}


@dataclass(frozen=True)
class Fault:
    """One entry of the page's list; `times` is how often it happened, `when` where or when."""

    level: Level
    text: str
    times: int = 1
    when: str = ""


@dataclass(frozen=True)
class Log:
    """The warnings and errors in `log.txt` by kind, and the time of its last line ("" if empty)."""

    faults: list[Fault]
    kinds_left_out: int
    last_time: str


def run_state(run: Run) -> tuple[str, str]:
    """The run's state in a few words, and its level: good, note, warning or error."""
    if not run.has_ended:
        return "in progress or killed", "note"
    code = run.summary.get("exit_code")
    return _ENDS.get(code if isinstance(code, int) else -1, (f"ended with code {code}", "error"))


def faults_of(run: Run, log: Log) -> list[Fault]:
    """Everything that went wrong, the worst first."""
    faults = [*_summary_faults(run), *_metric_faults(run), *log.faults]
    if not run.has_ended:
        last = f"its log ends at {log.last_time}" if log.last_time else ""
        faults.append(Fault("note", "there is no summary of how the run ended", when=last))
    if log.kinds_left_out:
        text = f"{log.kinds_left_out:,} more kinds of warnings and errors in log.txt"
        faults.append(Fault("warning", text))
    order = ("error", "warning", "note")
    return sorted(faults, key=lambda fault: order.index(fault.level))


def read_log(path: Path) -> Log:
    """Reads `log.txt`; lines that differ only in numbers are one kind, shown by its first line."""
    kinds: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], int] = {}
    last_time = ""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (match := _LOG_LINE.match(line.rstrip("\n"))) is None:
                    continue
                last_time, level, text = match[1], match[2], without_secrets(match[3])[:_MAX_LINE]
                if level:
                    kind = (level, re.sub(r"\d+", "#", text))
                    kinds.setdefault(kind, [last_time, text])
                    counts[kind] = counts.get(kind, 0) + 1
    faults = [
        Fault("warning" if kind[0] == "WARNING" else "error", text, counts[kind], since)
        for kind, (since, text) in kinds.items()
    ]
    return Log(faults[:_KINDS_NAMED], len(faults[_KINDS_NAMED:]), last_time)


def _summary_faults(run: Run) -> Iterable[Fault]:
    bad_samples = run.summary.get("bad_samples", 0)
    if isinstance(bad_samples, int) and bad_samples > 0:
        yield Fault("warning", f"{bad_samples:,} bad samples, replaced by others")
        for entry in run.summary_entries("bad_samples_by_shard")[:10]:
            shard, reason, count = (entry.get(name) for name in ("shard", "reason", "count"))
            times = count if isinstance(count, int) else 1
            yield Fault("warning", f"bad samples in {shard}: {reason}", times)


def _metric_faults(run: Run) -> Iterable[Fault]:
    metrics = run.metrics
    if not metrics.rows:
        yield Fault("note", "metrics.jsonl has no rows")
    if metrics.damaged_lines:
        text = "damaged lines of metrics.jsonl were skipped"
        yield Fault("warning", text, metrics.damaged_lines)
    if metrics.has_half_line:
        yield Fault("note", "the last line of metrics.jsonl is half written")
    first = {}
    for name, curve in metrics.curves.items():
        if not np.isfinite(curve.y).all():
            first[name] = int(curve.x[~np.isfinite(curve.y)][0])
    for name, images_seen in sorted(first.items(), key=lambda item: item[1])[:_NAMES_NAMED]:
        yield Fault("error", f"{name} was not finite", when=f"at {images_seen:,} images")
    if len(first) > _NAMES_NAMED:
        yield Fault("error", f"{len(first) - _NAMES_NAMED:,} more metrics were not finite")
