"""Which rank is to blame when a run can go no further: a judgement of what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ganscale.errors import EXIT_RANK_LOST

# What one rank's end does to the others comes after it, but may be heard of first.
_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class ProgressMark:
    """How far a rank has come: `count` grows with every part of a step that it begins.

    patience_seconds: that this part may take beyond the limit
    """

    count: int = 0
    where: str = "start"
    patience_seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """An error that ended a rank. is_echo: as another rank's end causes it"""

    exit_code: int
    sentence: str
    is_echo: bool


@dataclass
class Member:
    """A rank as another one sees it; times are of one monotonic clock."""

    name: str  # "rank 3 on node2"
    heard_at: float
    moved_at: float  # when it began the part of a step that it is in
    mark: ProgressMark = ProgressMark()
    is_waiting: bool = False  # in a collective, for the others
    gone_at: float | None = None  # its connection closed without a word
    has_left: bool = False  # in order: it is watched no more
    failure: Failure | None = None
    failed_at: float = inf


@dataclass(frozen=True)
class FailureCause:
    exit_code: int
    sentence: str
    is_hang: bool = False


def attribute_failure(
    members: Sequence[Member], now: float, limit_seconds: float, silence_seconds: float
) -> FailureCause | None:
    """Why the run has to end, None while all is well.

    limit_seconds: without progress on any rank
    silence_seconds: without a sign of life from a rank
    """
    members = [member for member in members if not member.has_left]
    if not members:
        return None
    if (ended := _judged_by_ends(members, now)) is not None:
        return ended
    silent = [m for m in members if m.gone_at is None and now - m.heard_at > silence_seconds]
    if silent:
        seconds = now - min(member.heard_at for member in silent)
        return FailureCause(
            EXIT_RANK_LOST,
            f"{_named(silent)} was lost: no sign of life for {seconds:.0f} s; the process is "
            "stopped, or its machine is away",
            is_hang=True,
        )
    stands_since = max(member.moved_at for member in members)
    patience = max(member.mark.patience_seconds for member in members)
    if now - stands_since > limit_seconds + patience:
        behind = min(member.mark.count for member in members)
        stuck = [member for member in members if member.mark.count == behind]
        stuck = [member for member in stuck if not member.is_waiting] or stuck
        name = "every rank" if 1 < len(members) == len(stuck) else _named(stuck)
        seconds = now - min(member.moved_at for member in stuck)
        return FailureCause(
            EXIT_RANK_LOST, f"{name} hangs: in `{stuck[0].mark.where}` for {seconds:.0f} s", True
        )
    return None


def _judged_by_ends(members: Sequence[Member], now: float) -> FailureCause | None:
    """A process that is gone comes before errors, and an error before its echoes."""
    gone = [member for member in members if member.gone_at is not None]
    failed = [(member, member.failure) for member in members if member.failure is not None]
    if not gone and not failed:
        return None
    first = min(m.failed_at if m.gone_at is None else m.gone_at for m in members)
    if len(failed) < len(members) and now - first < _GRACE_SECONDS:
        return None
    if gone:
        where = gone[0].mark.where
        died = f"{_named(gone)} was lost: the process died in `{where}`"
        return FailureCause(EXIT_RANK_LOST, died)
    own = [(member, failure) for member, failure in failed if not failure.is_echo] or failed
    member, failure = own[0]
    is_of_all = len(failed) == len(members) and len({f.sentence for _, f in own}) == 1
    by = "" if is_of_all else f"{member.name}: "
    return FailureCause(failure.exit_code, f"{by}{failure.sentence}")


def _named(members: Sequence[Member]) -> str:
    more = f" (and {len(members) - 1} more)" if len(members) > 1 else ""
    return f"{members[0].name}{more}"
