"""The batches of a run, a cycle ahead of its training.

Ahead, so that the ranks can agree that every one of them has its batches before any of them enters
a collective: a rank whose data fails would leave the others waiting there. Whatever is asked of the
loader is done while the device is still busy with the cycle before.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import wait

import torch

from ganscale.data.batch import Batch
from ganscale.data.loader import Loader
from ganscale.data.streaming import StreamLoader
from ganscale.data.threads import Crew
from ganscale.errors import UnavailableError, UserError
from ganscale.runtime import Runtime
from ganscale.training.profiling import section

_LOOK_SECONDS = 0.5


class Feed:
    """This rank's batches, cycle by cycle; counts what the data lacked.

    Attribute `waited_seconds`: the loop has stood still for data since someone set it to 0.
    """

    def __init__(self, loader: Loader | StreamLoader, runtime: Runtime, steps: int) -> None:
        """steps: batches in a cycle"""
        self.waited_seconds = 0.0
        self._loader = loader
        self._runtime = runtime
        self._steps = steps
        self._crew = Crew(1, "feed")
        self._ahead: list[Batch] = []
        self._failure: UserError | UnavailableError | None = None
        self._broken: Counter[tuple[str, str]] = Counter()  # since `count_broken`

    @property
    def has_failed(self) -> bool:
        """Whether the batches that were fetched last cannot be had on this rank."""
        return self._failure is not None

    def fetch(self, is_stopped: Callable[[], bool]) -> None:
        """Gets the next cycle's batches; a failure is kept for all ranks to agree on.

        Returns without them within a second of a stop: data may be slow to come, or never come.
        """
        started = time.perf_counter()
        with section("data wait"):
            batches = self._crew.submit(lambda: [next(self._loader) for _ in range(self._steps)])
            while not batches.done() and not is_stopped():
                wait([batches], timeout=_LOOK_SECONDS)
            try:
                self._ahead = batches.result() if batches.done() else []
            except (UserError, UnavailableError) as error:
                self._failure = error
        self.waited_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Leaves a fetch that still waits to itself."""
        self._crew.close(0.0)

    def take(self) -> list[Batch]:
        """What was fetched, to be trained on now."""
        batches, self._ahead = self._ahead, []
        for batch in batches:
            self._broken.update((broken.shard, broken.reason) for broken in batch.broken)
        return batches

    def failure(self) -> UserError | UnavailableError:
        """What ended the data of the first rank for which it did. On every rank: it gathers."""
        failures = self._runtime.gather(self._failure)
        return next(failure for failure in failures if failure is not None)

    def count_broken(self, counts: Counter[tuple[str, str]]) -> None:
        """Adds to `counts`, by (shard, reason), the samples that any rank found unreadable in what
        it took since the last time. On every rank: it sums."""
        new = torch.tensor([self._broken.total()], device=self._runtime.device)
        if self._runtime.sum(new).item():
            for found in self._runtime.gather(self._broken):
                counts.update(found)
            self._broken = Counter()
