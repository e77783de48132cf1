"""The batches of a run, a cycle ahead of its training; those of the cycle after that lie ready.

Ahead, so that the ranks can agree that every one of them has its batches before any of them enters
a collective: a rank whose data fails would leave the others waiting there. So the device is still
busy with one cycle when the batches of the next are copied to it, in a stream of their own.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from ganscale.data.batch import Batch
from ganscale.data.loader_process import LoaderProcess, LoaderThread
from ganscale.errors import GanscaleError
from ganscale.metrics.profiling import section
from ganscale.runtime import Runtime

_LOOK_SECONDS = 0.5


class DevicePrefetcher:
    """This rank's batches, cycle by cycle; counts what the data lacked.

    Attribute `waited_seconds`: the loop has stood still for data since someone set it to 0.
    """

    def __init__(self, loader: LoaderThread | LoaderProcess, runtime: Runtime, steps: int) -> None:
        """steps: batches in a cycle"""
        self.waited_seconds = 0.0
        self._loader = loader
        self._runtime = runtime
        self._steps = steps
        is_cuda = runtime.device.type == "cuda"
        self._copies = torch.cuda.Stream(runtime.device) if is_cuda else None
        self._fetched: list[Batch] = []
        self._failure: GanscaleError | None = None
        self._broken: Counter[tuple[str, str]] = Counter()  # since `count_bad_samples`

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
            try:
                while len(self._fetched) < self._steps and not self._waits_in_vain(is_stopped):
                    self._fetched.append(self._sent(next(self._loader)))
            except GanscaleError as error:
                self._failure = error
        self.waited_seconds += time.perf_counter() - started

    def _waits_in_vain(self, is_stopped: Callable[[], bool]) -> bool:
        """Waits for the next batch, and returns whether a stop came first."""
        stopped = is_stopped()
        while not self._loader.wait(0.0 if stopped else _LOOK_SECONDS):
            if stopped:
                return True
            stopped = is_stopped()
        return False

    def take(self) -> list[Batch]:
        """What was fetched, to be trained on now: on a GPU if there is one."""
        batches, self._fetched = self._fetched, []
        if self._copies is not None:
            computes = torch.cuda.current_stream(self._runtime.device)
            computes.wait_stream(self._copies)
            for batch in batches:
                for tensor in (batch.images, batch.labels, batch.slots):
                    tensor.record_stream(computes)  # its memory is not the copies' any more
        for batch in batches:
            self._broken.update(
                (bad_samples.shard, bad_samples.reason) for bad_samples in batch.bad_samples
            )
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

    def failure(self) -> GanscaleError:
        """What ended the data of the first rank for which it did. On every rank: it gathers."""
        failures = self._runtime.all_gather_object(self._failure)
        return next(failure for failure in failures if failure is not None)

    def count_bad_samples(self, counts: Counter[tuple[str, str]]) -> None:
        """Adds to `counts`, by (shard, reason), the samples that any rank found unreadable in what
        it took since the last time. On every rank: it sums."""
        new = torch.tensor([self._broken.total()], device=self._runtime.device)
        if self._runtime.all_reduce_sum(new).item():
            for found in self._runtime.all_gather_object(self._broken):
                counts.update(found)
            self._broken = Counter()
