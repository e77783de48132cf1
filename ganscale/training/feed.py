"""The batches of a run, a cycle ahead of its training, and asked for another cycle ahead of that.

Ahead, so that the ranks can agree that every one of them has its batches before any of them enters
a collective: a rank whose data fails would leave the others waiting there. Whatever is asked of the
loader is done while the device is still busy with the cycle before; so are the copies to a GPU, in
a stream of their own.
"""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace

import torch

from ganscale.data.batch import Batch
from ganscale.data.loader import Loader
from ganscale.data.streaming import StreamLoader
from ganscale.data.threads import Crew
from ganscale.errors import UnavailableError, UserError
from ganscale.runtime import Runtime
from ganscale.training.profiling import section

_LOOK_SECONDS = 0.5
_CLOSE_SECONDS = 1.0


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
        is_cuda = runtime.device.type == "cuda"
        self._copies = torch.cuda.Stream(runtime.device) if is_cuda else None
        self._crew = Crew(1, "feed")
        self._ahead: list[Batch] = []
        self._asked_for: Future[list[Batch]] | None = None
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
            batches = self._asked_for or self._ask()
            while not batches.done() and not is_stopped():
                wait([batches], timeout=_LOOK_SECONDS)
            self._asked_for = batches
            try:
                if batches.done():
                    self._ahead = [self._sent(batch) for batch in batches.result()]
                    self._asked_for = self._ask()
            except (UserError, UnavailableError) as error:
                self._failure = error
        self.waited_seconds += time.perf_counter() - started

    def _ask(self) -> Future[list[Batch]]:
        """Has the next cycle's batches collected while this thread trains."""
        return self._crew.submit(lambda: [next(self._loader) for _ in range(self._steps)])

    def close(self) -> None:
        """Within a second: a fetch that still waits is left to itself."""
        self._crew.close(_CLOSE_SECONDS)

    def take(self) -> list[Batch]:
        """What was fetched, to be trained on now: on a GPU if there is one."""
        batches, self._ahead = self._ahead, []
        if self._copies is not None:
            computes = torch.cuda.current_stream(self._runtime.device)
            computes.wait_stream(self._copies)
            for batch in batches:
                for tensor in (batch.images, batch.labels, batch.slots):
                    tensor.record_stream(computes)  # its memory is not the copies' any more
        for batch in batches:
            self._broken.update((broken.shard, broken.reason) for broken in batch.broken)
        return batches

    def _sent(self, batch: Batch) -> Batch:
        """On the way to the GPU, beside what that computes."""
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):
            images, labels, slots = (
                tensor.pin_memory().to(self._runtime.device, non_blocking=True)
                for tensor in (batch.images, batch.labels, batch.slots)
            )
        return replace(batch, images=images, labels=labels, slots=slots)

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
