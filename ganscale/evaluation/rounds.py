"""How ranks agree to go on, to stop or to fail while they share the work of an evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ganscale.errors import OutOfMemoryError, UnavailableError, UserError
from ganscale.evaluation.work_share import WorkShare
from ganscale.runtime import Runtime, is_out_of_memory

_CONTINUE, _STOP, _FAILED = range(3)
OnRound = Callable[[str, int, int], None]
"""Gets the stage, how many of its rounds have begun, and how many there are; 0 if unknown."""

_FAILURES = UserError, UnavailableError, OutOfMemoryError


class Interrupted(Exception):
    """The evaluation was given up on every rank, since one was asked to stop."""


class Rounds:
    """Votes before each round; a failure on one rank is raised on all of them."""

    def __init__(self, runtime: Runtime, is_stopped: Callable[[], bool], on_round: OnRound) -> None:
        self._runtime, self._is_stopped, self._on_round = runtime, is_stopped, on_round
        self._failure: Exception | None = None
        self._stage, self._begun, self._total = "", 0, 0

    def enter(self, stage: str, images: int = 0, batch_size: int = 1) -> None:
        """Begins a stage, of this many images in all if that is known."""
        self._stage, self._begun = stage, 0
        self._total = -(-images // (batch_size * self._runtime.world_size))

    def share(self) -> WorkShare:
        runtime = self._runtime
        return WorkShare(runtime.rank, runtime.world_size, runtime.all_reduce_sum, self.check)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Remembers a failure of this rank until the next round."""
        try:
            yield
        except _FAILURES as error:
            self._failure = error
        except OSError as error:
            self._failure = UnavailableError(f"the images cannot be read: {error}")
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._failure = OutOfMemoryError(
                "out of memory in an evaluation: a lower evaluation.batch_size needs less"
            )

    def check(self) -> None:
        """Collective. Raises the failure of any rank, or Interrupted if any was asked to stop."""
        self._on_round(self._stage, self._begun, self._total)
        self._begun += 1
        vote = _STOP if self._is_stopped() else _CONTINUE
        worst = self._runtime.start_max(_FAILED if self._failure else vote)()
        if worst == _FAILED:
            mine = self._failure and (type(self._failure), str(self._failure))
            self._failure = None
            found = next(each for each in self._runtime.all_gather_object(mine) if each)
            raise found[0](found[1])
        if worst == _STOP:
            raise Interrupted
