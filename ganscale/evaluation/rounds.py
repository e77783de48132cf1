"""How ranks agree to go on, to stop or to fail while they share the work of an evaluation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ganscale.errors import OutOfMemoryError, UnavailableError, UserError
from ganscale.evaluation.work_share import WorkShare
from ganscale.runtime import Runtime, is_out_of_memory

_STOP, _FAILED = 1 << 40, 1 << 41
"""Votes; a rank that goes on votes for less, its microseconds per round."""
_VOTE_SECONDS = 1.0
OnRound = Callable[[str, int, int], None]
"""Gets the stage, how many of its rounds have begun, and how many there are; 0 if unknown."""

T = TypeVar("T")
_FAILURES = UserError, UnavailableError, OutOfMemoryError


class Interrupted(Exception):
    """The evaluation was given up on every rank, since one was asked to stop."""


class Rounds:
    """Votes of all ranks between rounds, about once a second: a vote costs the ranks a millisecond
    of processor time, and they wait for the slowest.

    A failure on one rank is raised on all of them: the failed rank votes, and the next collective
    operation of the others is a vote, too, since `sum` begins with one.
    """

    def __init__(self, runtime: Runtime, is_stopped: Callable[[], bool], on_round: OnRound) -> None:
        self._runtime, self._is_stopped, self._on_round = runtime, is_stopped, on_round
        self._failure: Exception | None = None
        self._stage, self._begun, self._total = "", 0, 0
        self._interval, self._since_vote = 1, 0
        self._voted_at = time.monotonic()
        self._has_ended = False

    def enter(self, stage: str, images: int = 0, batch_size: int = 1) -> None:
        """Begins a stage, of this many images in all if that is known."""
        self._stage, self._begun = stage, 0
        self._total = -(-images // (batch_size * self._runtime.world_size))
        self._interval, self._since_vote = 1, 0

    def share(self) -> WorkShare:
        runtime = self._runtime
        return WorkShare(runtime.rank, runtime.world_size, self.sum, self.begin_round)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, after a vote: a rank that has failed votes instead."""
        if self._runtime.world_size == 1:
            return tensor
        added = tensor.clone()
        self._vote()
        return self._runtime.all_reduce_sum_(added)

    def run_on_main(self, make: Callable[[], T]) -> T:
        """`Runtime.run_on_main`, also for failures that `attempt` explains. Collective."""

        def explained() -> T:
            try:
                return make()
            except Exception as error:
                if (failure := _explained(error)) is None:
                    raise
                raise failure from error

        return self._runtime.run_on_main(explained)

    @property
    def has_failed(self) -> bool:
        """Whether this rank has nothing to do until the next vote, which all ranks will fail."""
        return self._failure is not None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Remembers a failure of this rank until the next vote."""
        try:
            yield
        except Exception as error:
            if self._has_ended or (failure := _explained(error)) is None:
                raise
            self._failure = failure

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raises a failure of this rank on all of them, wherever within it was. Collective."""
        with self.attempt():
            yield
        if self._failure is not None:
            self._vote()

    def begin_round(self) -> None:
        """Every rank calls this equally often; it votes when a vote is due."""
        self._on_round(self._stage, self._begun, self._total)
        self._begun += 1
        if self._since_vote >= self._interval or self._begun == 1:
            self._vote()
        self._since_vote += 1

    def check(self) -> None:
        """Votes now. Collective."""
        self._on_round(self._stage, self._begun, self._total)
        self._vote()

    def _vote(self) -> None:
        """Raises the failure of any rank, or Interrupted if any was asked to stop."""
        seconds = (time.monotonic() - self._voted_at) / max(1, self._since_vote)
        vote = _STOP if self._is_stopped() else min(1 + int(1e6 * seconds), _STOP - 1)
        worst = self._runtime.start_max(_FAILED if self._failure else vote)()
        if worst == _FAILED:
            mine = self._failure and (type(self._failure), str(self._failure))
            self._failure = None
            found = next(each for each in self._runtime.all_gather_object(mine) if each)
            self._has_ended = True
            raise found[0](found[1])
        if worst == _STOP:
            self._has_ended = True
            raise Interrupted
        # By the slowest rank's pace; a first round is often no measure, so not at once.
        due = int(1e6 * _VOTE_SECONDS / worst)
        self._interval = max(1, min(due, 2 * self._since_vote))
        self._since_vote, self._voted_at = 0, time.monotonic()


def _explained(error: Exception) -> Exception | None:
    """What ends an evaluation, but not the run; None for anything else."""
    if isinstance(error, _FAILURES):
        return error
    if isinstance(error, OSError):
        return UnavailableError(f"the evaluation cannot read a file: {error}")
    if isinstance(error, torch.linalg.LinAlgError):
        return UserError(f"the features' covariance has no eigenvalues: {error}")
    if is_out_of_memory(error):
        return OutOfMemoryError(
            "out of memory in an evaluation: a lower evaluation.batch_size or fewer "
            "evaluation.metrics need less"
        )
    return None
