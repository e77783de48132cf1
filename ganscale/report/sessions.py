"""The sessions of a run, each from one start to its end, as rows of a table."""

from dataclasses import dataclass
from typing import Any

from ganscale.report.run_reader import Run


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
    if entries := run.folder.read_sessions():
        return [_session(entry) for entry in entries]
    sessions = [
        Session(entry["images_seen"], ranks=_text(entry.get("world_size")))
        for entry in run.summary_entries("sessions")
        if isinstance(entry.get("images_seen"), int)
    ]
    return sorted(sessions, key=lambda session: session.images_seen) or [Session(0)]


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
