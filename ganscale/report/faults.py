"""How a run fared: where it stands, and everything that went wrong on the way."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
_NAMES_NAMED = 8  # figures that were not finite
_MAX_LINE = 500  # characters of a line that are shown
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:(WARNING|ERROR|CRITICAL): )?(.*)")
_CONTINUES = re.compile(r"continues at ([\d,]+) images")

_ENDS = {
    EXIT_DONE: ("done", "good"),
    EXIT_FAILED: ("failed", "error"),
    EXIT_USER_ERROR: ("ended by a mistake in its settings or data", "error"),
    EXIT_REQUEUE: ("stopped; the same command continues it", "warning"),
    EXIT_RANK_LOST: ("lost a rank; the same command continues it", "warning"),
}


@dataclass(frozen=True)
class Fault:
    """One line of the page's list; `times` is how often it was seen, `when` where or when."""

    level: Level
    text: str
    times: int = 1
    when: str = ""


@dataclass(frozen=True)
class Log:
    """What `log.txt` tells: its warnings and errors by kind, where sessions continued, and the time
    of its last line ("" without any)."""

    faults: list[Fault]
    kinds_left_out: int
    continued_at: list[int]
    last_time: str


def standing(run: Run) -> tuple[str, str]:
    """Where the run stands, in a few words, and whether that is good, a warning, an error or a
    note."""
    if not run.has_ended:
        return "in progress or killed", "note"
    code = run.summary.get("exit_code")
    return _ENDS.get(code if isinstance(code, int) else -1, (f"ended with code {code}", "error"))


def faults_of(run: Run, log: Log) -> list[Fault]:
    """Everything that went wrong, the worst first."""
    faults = [*_summary_faults(run), *_metric_faults(run), *log.faults]
    if not run.has_ended:
        last = f"its log ends at {log.last_time}" if log.last_time else ""
        faults.append(Fault("note", "no summary tells how the run ended", when=last))
    if log.kinds_left_out:
        text = f"{log.kinds_left_out:,} more kinds of warnings and errors in log.txt"
        faults.append(Fault("warning", text))
    order = ("error", "warning", "note")
    return sorted(faults, key=lambda fault: order.index(fault.level))


def read_log(path: Path) -> Log:
    """Reads `log.txt`; lines that differ in numbers only are one kind, shown by its first."""
    kinds: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], int] = {}
    continued_at: list[int] = []
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
                elif (start := _CONTINUES.match(text)) is not None:
                    continued_at.append(int(start[1].replace(",", "")))
    faults = [
        Fault("warning" if kind[0] == "WARNING" else "error", text, counts[kind], since)
        for kind, (since, text) in kinds.items()
    ]
    named, left_out = faults[:_KINDS_NAMED], len(faults[_KINDS_NAMED:])
    return Log(named, left_out, continued_at, last_time)


def _summary_faults(run: Run) -> Iterable[Fault]:
    summary = run.summary
    bad_samples = summary.get("bad_samples", 0)
    if isinstance(bad_samples, int) and bad_samples > 0:
        yield Fault("warning", f"{bad_samples:,} bad samples, replaced by others")
        for place in _listed(summary.get("bad_samples_by_shard"))[:10]:
            shard, reason, count = (place.get(name) for name in ("shard", "reason", "count"))
            yield Fault("warning", f"bad samples in {shard}: {reason}", _count(count))
    lost = summary.get("lost_rows", 0)
    if isinstance(lost, int) and lost > 0:
        yield Fault("error", f"{lost:,} rows of metrics.jsonl were lost: no room on the disk")
    if degraded := summary.get("wandb_degraded") or summary.get("degraded"):
        yield Fault("warning", f"Weights & Biases was switched off: {degraded}"[:_MAX_LINE])


def _metric_faults(run: Run) -> Iterable[Fault]:
    metrics = run.metrics
    if not metrics.rows:
        yield Fault("note", "there are no rows in metrics.jsonl")
    if metrics.damaged_lines:
        text = "damaged lines of metrics.jsonl were passed over"
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
        yield Fault("error", f"{len(first) - _NAMES_NAMED:,} more figures were not finite")


def _listed(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 1
