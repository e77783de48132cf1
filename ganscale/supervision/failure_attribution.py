"""Which rank is to blame when a run cannot go on, judged from the status of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from ganscale.errors import EXIT_FAILED, EXIT_RANK_LOST, DeviceError, GanscaleError
from ganscale.runtime import is_communication_error, is_device_error
from ganscale.supervision.progress import ProgressMark

# The errors that a lost rank causes in others may arrive before the news of its death.
_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Failure:
    """An error that ended a rank.

    is_consequence: as the loss of another rank causes it
    is_of_device: the rank's machine is to blame
    """

    exit_code: int
    message: str
    is_consequence: bool = False
    is_of_device: bool = False

    @classmethod
    def from_error(cls, error: BaseException) -> "Failure":
        is_consequence = is_communication_error(error)
        is_of_device = is_device_error(error) or isinstance(error, DeviceError)
        if is_consequence or is_of_device:  # the network or a GPU, not the run
            exit_code = EXIT_RANK_LOST
        else:
            exit_code = error.exit_code if isinstance(error, GanscaleError) else EXIT_FAILED
        kind = "" if is_for_users(error) else f"{type(error).__name__}: "
        return cls(exit_code, kind + " ".join(str(error).split()), is_consequence, is_of_device)


@dataclass
class RankStatus:
    """A rank as this one sees it; times are of this process's monotonic clock."""

    rank: int
    host: str
    heard_at: float
    progressed_at: float  # when it entered its stage
    mark: ProgressMark = field(default_factory=ProgressMark)
    is_waiting: bool = False  # in a collective, for the others
    disconnected_at: float | None = None  # without a goodbye
    has_left: bool = False  # with a goodbye: it is no longer watched
    failure: Failure | None = None
    failed_at: float = inf

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class FailureCause:
    """suspect_host: a machine that the next attempt had better avoid"""

    exit_code: int
    message: str
    is_hang: bool = False
    suspect_host: str = ""


def is_for_users(error: BaseException) -> bool:
    """Whether the error's message explains itself, without a type or traceback."""
    return isinstance(error, GanscaleError | OSError)


def attribute_failure(
    ranks: Sequence[RankStatus], now: float, limit_seconds: float, silence_seconds: float
) -> FailureCause | None:
    """Why the run has to end; None while all is well. It may be `limit_seconds` without progress on
    any rank, and `silence_seconds` without a sign of life from one."""
    ranks = [rank for rank in ranks if not rank.has_left]
    if not ranks:
        return None
    if (cause := _death_or_error(ranks, now)) is not None:
        return cause
    silent = [r for r in ranks if r.disconnected_at is None and now - r.heard_at > silence_seconds]
    if silent:
        seconds = now - min(rank.heard_at for rank in silent)
        message = (
            f"{_name_all(silent)} was lost: no sign of life for {seconds:.0f} s; its process is "
            "stopped, or its machine cannot be reached"
        )
        return FailureCause(EXIT_RANK_LOST, message, is_hang=True, suspect_host=silent[0].host)
    limit_seconds += max(rank.mark.extra_seconds for rank in ranks)
    if now - max(rank.progressed_at for rank in ranks) <= limit_seconds:
        return None
    lowest_count = min(rank.mark.count for rank in ranks)
    behind = [rank for rank in ranks if rank.mark.count == lowest_count]
    hanging = [rank for rank in behind if not rank.is_waiting] or behind
    is_everywhere = 1 < len(ranks) == len(hanging)
    name = "every rank" if is_everywhere else _name_all(hanging)
    seconds = now - min(rank.progressed_at for rank in hanging)
    message = f"{name} hangs: in `{hanging[0].mark.stage}` for {seconds:.0f} s"
    host = "" if is_everywhere else hanging[0].host
    return FailureCause(EXIT_RANK_LOST, message, is_hang=True, suspect_host=host)


def _death_or_error(ranks: Sequence[RankStatus], now: float) -> FailureCause | None:
    """A death is blamed before an error, and an error before its consequences."""
    dead = [rank for rank in ranks if rank.disconnected_at is not None]
    failed = [(rank, rank.failure) for rank in ranks if rank.failure is not None]
    if not dead and not failed:
        return None
    first_at = min(
        rank.failed_at if rank.disconnected_at is None else rank.disconnected_at for rank in ranks
    )
    if len(failed) < len(ranks) and now - first_at < _GRACE_SECONDS:
        return None
    if dead:
        message = f"{_name_all(dead)} was lost: the process died in `{dead[0].mark.stage}`"
        return FailureCause(EXIT_RANK_LOST, message)
    causes = [(rank, failure) for rank, failure in failed if not failure.is_consequence] or failed
    rank, failure = causes[0]
    is_everywhere = len(failed) == len(ranks) and len({f.message for _, f in causes}) == 1
    name = "" if is_everywhere else f"{rank.name}: "
    host = rank.host if failure.is_of_device else ""
    return FailureCause(failure.exit_code, f"{name}{failure.message}", suspect_host=host)


def _name_all(ranks: Sequence[RankStatus]) -> str:
    return ranks[0].name + (f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else "")
