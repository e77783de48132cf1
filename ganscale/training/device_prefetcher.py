"""The batches of the next cycle, fetched and sent to the device while the current one trains.

A cycle ahead, the ranks can agree that all of them have their batches before any of them enters a
collective, where the others would wait for a rank whose data failed.
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

_POLL_SECONDS = 0.5


class DevicePrefetcher:
    """This rank's `batches` of each cycle; counts bad samples and the time spent waiting."""

    def __init__(
        self, loader: LoaderThread | LoaderProcess, runtime: Runtime, batches: int
    ) -> None:
        self._loader, self._runtime, self._batches = loader, runtime, batches
        is_cuda = runtime.device.type == "cuda"
        self._copy_stream = torch.cuda.Stream(runtime.device) if is_cuda else None
        self._prefetched: list[Batch] = []
        self._failure: GanscaleError | None = None
        self._wait_seconds = 0.0
        self._bad_samples: Counter[tuple[str, str]] = Counter()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not get the batches of the next cycle."""
        return self._failure is not None

    def prefetch(self, is_stopped: Callable[[], bool]) -> None:
        """Gets the next cycle's batches; keeps a failure until all ranks agree on it. Returns
        without them within a second of a stop: data may be slow to come, or never come."""
        started = time.perf_counter()
        with section("data wait"):
            try:
                while len(self._prefetched) < self._batches and self._wait(is_stopped):
                    self._prefetched.append(self._to_device(next(self._loader)))
            except GanscaleError as error:
                self._failure = error
        self._wait_seconds += time.perf_counter() - started

    def take(self) -> list[Batch]:
        """The prefetched batches, to be trained on now; on the GPU if there is one."""
        batches, self._prefetched = self._prefetched, []
        if self._copy_stream is not None:
            compute_stream = torch.cuda.current_stream(self._runtime.device)
            compute_stream.wait_stream(self._copy_stream)
            for batch in batches:
                for tensor in _tensors(batch).values():
                    tensor.record_stream(compute_stream)  # keeps its memory until it was used
        for batch in batches:
            self._bad_samples.update((bad.shard, bad.reason) for bad in batch.bad_samples)
        return batches

    def failure(self) -> GanscaleError:
        """The error of the first rank that has one. Collective."""
        failures = self._runtime.all_gather_object(self._failure)
        return next(failure for failure in failures if failure is not None)

    def pop_wait_seconds(self) -> float:
        """How long this rank has waited for data since the last call."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def pop_bad_samples(self) -> Counter[tuple[str, str]]:
        """Bad samples by (shard, reason) in what all ranks took since the last call. Collective."""
        own, self._bad_samples = self._bad_samples, Counter()
        count = torch.tensor([own.total()], device=self._runtime.device)
        if not self._runtime.all_reduce_sum(count).item():
            return Counter()
        return sum(self._runtime.all_gather_object(own), Counter())

    def _wait(self, is_stopped: Callable[[], bool]) -> bool:
        """Waits for the next batch or a stop; returns whether the batch is there."""
        while not is_stopped():
            if self._loader.wait(_POLL_SECONDS):
                return True
        return self._loader.wait(0.0)

    def _to_device(self, batch: Batch) -> Batch:
        """Starts the copy to the GPU, in a stream of its own."""
        if self._copy_stream is None:
            return batch
        with torch.cuda.stream(self._copy_stream):
            sent = {
                name: tensor.pin_memory().to(self._runtime.device, non_blocking=True)
                for name, tensor in _tensors(batch).items()
            }
        return replace(batch, **sent)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """What of the batch is needed on the device, by field."""
    draws = {} if batch.draws is None else {"draws": batch.draws}
    return {"images": batch.images, "labels": batch.labels, "slots": batch.slots} | draws
