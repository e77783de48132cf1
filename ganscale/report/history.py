"""The history of a run: its state, its sessions, and everything that went wrong."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ganscale import errors
from ganscale.report.run_reader import Run
from ganscale.secrets import without_secrets

_KINDS_NAMED = 30  # kinds of lines from the log
_NAMES_NAMED = 8  # metrics that were not finite
_MAX_LINE = 500  # characters of a line that are shown
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:(WARNING|ERROR|CRITICAL): )?(.*)")

_ENDS = {
    errors.EXIT_DONE: ("done", "good"),
    errors.EXIT_FAILED: ("failed", "error"),
    errors.EXIT_USER_ERROR: ("ended by a mistake in its settings or data", "error"),
    errors.EXIT_REQUEUE: ("stopped; the same command continues it", "note"),
    errors.EXIT_RANK_LOST: ("lost a rank; the same command continues it", "warning"),
}


@dataclass
class Fault:
    """One entry of the page's list; `times` is how often it happened, `when` where or when."""

    level: Literal["error", "warning", "note"]
    text: str
    times: int = 1
    when: str = ""


def run_state(run: Run) -> tuple[str, str]:
    """The run's state in a few words, and its level: good, note, warning or error."""
    if not run.has_ended:
        return "in progress or killed", "note"
    code = run.summary.get("exit_code")
    return _ENDS.get(code if isinstance(code, int) else -1, (f"ended with code {code}", "error"))


def faults_of(run: Run) -> list[Fault]:
    """Everything that went wrong, the worst first."""
    logged, last_time = read_log(run.folder.log)
    faults = [*_recorded_faults(run), *logged]
    if not run.has_ended:
        last = f"its log ends at {last_time}" if last_time else ""
        faults.append(Fault("note", "there is no summary of how the run ended", when=last))
    order = ("error", "warning", "note")
    return sorted(faults, key=lambda fault: order.index(fault.level))


def read_log(path: Path) -> tuple[list[Fault], str]:
    """(the warnings and errors in `log.txt`, the time of its last line or "").

    Lines that differ only in numbers are one fault, shown by the first of them.
    """
    kinds: dict[tuple[str, str], Fault] = {}
    last_time = ""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (match := _LOG_LINE.match(line.rstrip("\n"))) is None:
                    continue
                last_time = match[1]
                if match[2]:
                    level = "warning" if match[2] == "WARNING" else "error"
                    text = without_secrets(match[3])[:_MAX_LINE]
                    kind = (match[2], re.sub(r"\d+", "#", text))
                    kinds.setdefault(kind, Fault(level, text, 0, last_time)).times += 1
    faults = list(kinds.values())
    if len(faults) > _KINDS_NAMED:
        text = f"{len(faults) - _KINDS_NAMED:,} more kinds of warnings and errors in log.txt"
        faults[_KINDS_NAMED:] = [Fault("warning", text)]
    return faults, last_time


def _recorded_faults(run: Run) -> Iterable[Fault]:
    bad_samples = run.summary.get("bad_samples", 0)
    if isinstance(bad_samples, int) and bad_samples > 0:
        yield Fault("warning", f"{bad_samples:,} bad samples, replaced by others")
        for entry in run.summary_entries("bad_samples_by_shard")[:10]:
            shard, reason, count = (entry.get(name) for name in ("shard", "reason", "count"))
            times = count if isinstance(count, int) else 1
            yield Fault("warning", f"bad samples in {shard}: {reason}", times)
    metrics = run.metrics
    if not metrics.rows:
        yield Fault("note", "metrics.jsonl has no rows")
    if metrics.damaged_lines:
        text = "damaged lines of metrics.jsonl were skipped"
        yield Fault("warning", text, metrics.damaged_lines)
    if metrics.has_half_line:
        yield Fault("note", "the last line of metrics.jsonl is half written")
    nonfinite = {name: curve.x[~np.isfinite(curve.y)] for name, curve in metrics.curves.items()}
    first = sorted(((x[0], name) for name, x in nonfinite.items() if len(x)), key=itemgetter(0))
    for images_seen, name in first[:_NAMES_NAMED]:
        yield Fault("error", f"{name} was not finite", when=f"at {images_seen:,} images")
    if len(first) > _NAMES_NAMED:
        yield Fault("error", f"{len(first) - _NAMES_NAMED:,} more metrics were not finite")


@dataclass(frozen=True)
class Session:
    """Where a session began and what it ran on; "" for what is not known."""

    images_seen: int
    started: str = ""
    ranks: str = ""
    device: str = ""
    code: str = ""
    torch: str = ""


def sessions_of(run: Run) -> list[Session]:
    """All sessions in order, from `sessions.jsonl` or, in a run without it, from the summary."""
    entries = run.folder.read_sessions()
    if not entries:
        entries = [{**entry, "cluster": entry} for entry in run.summary_entries("sessions")]
        entries = [entry for entry in entries if isinstance(entry.get("images_seen"), int)]
        entries.sort(key=itemgetter("images_seen"))
    return [_session(entry) for entry in entries] or [Session(0)]


def _session(entry: dict[str, Any]) -> Session:
    cluster, git, versions = (_dict(entry.get(name)) for name in ("cluster", "git", "versions"))
    nodes = cluster.get("nodes")
    ranks = _text(cluster.get("world_size"))
    if isinstance(nodes, int) and nodes > 1:
        ranks += f" on {nodes:,} nodes"
    return Session(
        entry["images_seen"],
        started=_text(entry.get("started")).replace("T", " ").replace("+00:00", " UTC"),
        ranks=ranks,
        device=_text(cluster.get("device")),
        code=_text(git.get("revision"))[:10] + (" with changes" if git.get("is_dirty") else ""),
        torch=_text(versions.get("torch")),
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
