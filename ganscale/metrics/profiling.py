"""Where the time of a cycle goes: torch's profiler over a few of them, once a run is warm."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function, schedule

logger = logging.getLogger(__name__)

_WARM_UP_CYCLES = 5
_OPERATORS_LISTED = 25


class Stopwatch:
    """Seconds of the parts of a cycle; it waits for the device only when it is read.

    What the host does between steps (`HOST_SECTIONS`) is always timed. What the device does is
    timed while the watch runs: in a cycle that is logged, what comes before its critic steps, the
    last of these, and what follows.
    On CUDA that is by events in the stream of the computation, on the CPU by the clock.
    """

    def __init__(self) -> None:
        self.is_running = False
        self._is_cuda = False
        self._opened: dict[str, Any] = {}
        self._laps: list[tuple[str, Any, Any]] = []
        self._host_opened: dict[str, float] = {}
        self._host_seconds: dict[str, float] = {}

    def reset(self, device: torch.device) -> None:
        """Before a run."""
        self.__init__()
        self._is_cuda = device.type == "cuda"

    def run(self, runs: bool) -> None:
        """Starts anew, or stops."""
        self.is_running = runs
        self._laps.clear()

    def begin(self, name: str) -> None:
        if name in HOST_SECTIONS:
            self._host_opened[name] = time.perf_counter()
        elif self.is_running:
            self._opened[name] = self._now()

    def end(self, name: str) -> None:
        if name in HOST_SECTIONS:
            passed = time.perf_counter() - self._host_opened[name]
            self._host_seconds[name] = self._host_seconds.get(name, 0.0) + passed
        elif self.is_running and name in self._opened:
            self._laps.append((name, self._opened.pop(name), self._now()))

    def split_backward(self, loss: Tensor, name: str) -> None:
        """Adds to `name` the coming backward's time before it comes to `loss`.

        Backward takes what the forward did last first: so what is added to a loss and was computed
        after it is differentiated wholly before it.
        """
        if self.is_running:
            loss.register_hook(lambda _: self._lap(name, "critic backward"))

    def read_host(self) -> dict[str, float]:
        """By section, since the last call."""
        seconds, self._host_seconds = self._host_seconds, {}
        return seconds

    def read(self) -> dict[str, float]:
        """By section, since the watch was started, and stops it."""
        seconds: dict[str, float] = {}
        for name, start, end in self._laps:
            passed = start.elapsed_time(end) / 1000 if self._is_cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + passed
        self.run(False)
        return seconds

    def _lap(self, name: str, since: str) -> None:
        if self.is_running and since in self._opened:
            self._laps.append((name, self._opened[since], self._now()))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


stopwatch = Stopwatch()
"""Of this process, as the profiler is."""


class section(record_function):
    """Names a part of a cycle for the profiler and the stopwatch: a context manager, and a
    decorator."""

    def __enter__(self) -> "section":
        super().__enter__()
        stopwatch.begin(self.name)
        return self

    def __exit__(self, *raised: Any) -> None:
        stopwatch.end(self.name)
        super().__exit__(*raised)


HOST_SECTIONS = frozenset({"data wait", "logging", "samples", "audit", "checkpoint"})
SECTIONS = (
    "data wait",
    "to the device",
    "fakes together",  # for all critic steps, on several ranks
    "fake images",
    "critic forward",  # with its penalties' forward
    "critic backward",  # with the averaging over ranks
    "critic update",
    "generator forward",
    "generator backward",
    "generator update",
    "ema",
    "logging",
    "samples",
    "audit",
    "checkpoint",
)


@contextmanager
def profiled(folder: Path, cycles: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after every cycle; records `cycles` of them after a few others.

    Writes `trace.json` (for chrome://tracing or ui.perfetto.dev) and `table.txt` into `folder` as
    soon as they are recorded; a run that ends before that says so.
    """
    if cycles == 0:
        yield lambda: None
        return

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / "trace.json"))
        (folder / "table.txt").write_text(table(finished, cycles))
        logger.info("profile of %d cycles: %s", cycles, folder / "table.txt")
        written.append(folder)

    written: list[Path] = []
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    waits = schedule(skip_first=_WARM_UP_CYCLES - 1, wait=0, warmup=1, active=cycles, repeat=1)
    with profile(activities=activities, schedule=waits, on_trace_ready=write) as recorder:
        yield recorder.step
    if not written:
        logger.warning("the run ended before %d cycles could be profiled", cycles)


def table(finished: profile, cycles: int) -> str:
    """The sections of a cycle by their time, and the operators within them."""
    averages = finished.key_averages()
    by_name = {event.key: event for event in averages}
    cycle_us = sum(by_name[name].cpu_time_total for name in SECTIONS if name in by_name)
    lines = [f"{'ms a cycle, on the host':<36}{'ms':>10}{'share':>8}{'on the device, ms':>20}"]
    for name in SECTIONS:
        if name in by_name:
            host, device = by_name[name].cpu_time_total, by_name[name].device_time_total
            share = host / max(cycle_us, 1e-9)
            cells = f"{host / cycles / 1000:>10.3f}{share:>8.1%}{device / cycles / 1000:>20.3f}"
            lines.append(f"{name:<36}{cells}")
    sort_by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "\n".join([*lines, "", averages.table(sort_by=sort_by, row_limit=_OPERATORS_LISTED)])
