"""The sessions of a run: one from each start to its end, whatever ended it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganscale.report.faults import Log
from ganscale.report.run_reader import Run


@dataclass(frozen=True)
class Session:
    """Where a session began and what it ran on; "" for what is not known of it."""

    images_seen: int
    started: str = ""
    ranks: str = ""
    device: str = ""
    code: str = ""
    torch: str = ""


def sessions_of(run: Run, log: Log) -> list[Session]:
    """All sessions in their order: from `sessions.jsonl`, and for a run without that from the
    summary and, where a session was killed before it wrote one, from the log."""
    if told := _told(run.folder / "sessions.jsonl"):
        return told
    sessions: list[Session] = []
    listed = run.summary.get("sessions")
    for facts in listed if isinstance(listed, list) else []:
        if isinstance(facts, dict) and isinstance(facts.get("images_seen"), int):
            sessions.append(Session(facts["images_seen"], ranks=_text(facts.get("world_size"))))
    known = {session.images_seen for session in sessions}
    starts = [start for start in dict.fromkeys(log.continued_at) if start not in known]
    sessions += [Session(start) for start in starts]
    return sorted(sessions or [Session(0)], key=lambda session: session.images_seen)


def _told(path: Path) -> list[Session]:
    """Damaged lines are passed over."""
    if not path.is_file():
        return []
    sessions = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(facts, dict) and isinstance(facts.get("images_seen"), int):
            sessions.append(_session(facts))
    return sessions


def _session(facts: dict[str, Any]) -> Session:
    cluster, git, versions = (_dict(facts.get(name)) for name in ("cluster", "git", "versions"))
    nodes = cluster.get("nodes")
    ranks = _text(cluster.get("world_size"))
    if isinstance(nodes, int) and nodes > 1:
        ranks += f" on {nodes:,} nodes"
    return Session(
        facts["images_seen"],
        started=_text(facts.get("started")).replace("T", " ").replace("+00:00", " UTC"),
        ranks=ranks,
        device=_text(cluster.get("device")),
        code=_text(git.get("revision"))[:10] + (" with changes" if git.get("is_dirty") else ""),
        torch=_text(versions.get("torch")),
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
