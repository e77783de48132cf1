"""How long the sections of a cycle take: a stopwatch for every row, torch's profiler on request."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function, schedule

logger = logging.getLogger(__name__)

_WARM_UP_CYCLES = 5
_OPERATORS_LISTED = 25

HOST_SECTIONS = frozenset({"data wait", "logging", "samples", "audit", "checkpoint"})
SECTIONS = (
    "data wait",
    "to the device",
    "fakes together",  # for all critic steps, on several ranks
    "fake images",
    "critic forward",  # with the forward of its penalties
    "critic backward",  # with the all-reduce
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


class Stopwatch:
    """Seconds by section; waits for the device only when it is read.

    `HOST_SECTIONS`, what the host does between steps, are always timed, by the clock. The others
    are timed only while `is_running`: in a logged cycle, before its critic steps, in the last of
    them, and from then on. On CUDA they are timed by events in the current stream.
    """

    def __init__(self) -> None:
        self.is_running = False
        self._is_cuda = False
        self._starts: dict[str, Any] = {}  # of open sections
        self._intervals: list[tuple[str, Any, Any]] = []  # (section, start, end)
        self._host_seconds: defaultdict[str, float] = defaultdict(float)

    def restart(self, is_running: bool, device: torch.device) -> None:
        """Forgets the sections on the device, and times the next ones if `is_running`."""
        self.is_running = is_running
        self._is_cuda = device.type == "cuda"
        self._intervals.clear()

    def start_section(self, name: str) -> None:
        if name in HOST_SECTIONS:
            self._starts[name] = time.perf_counter()
        elif self.is_running:
            self._starts[name] = self._now()

    def end_section(self, name: str) -> None:
        if name in HOST_SECTIONS:
            self._host_seconds[name] += time.perf_counter() - self._starts[name]
        elif self.is_running and name in self._starts:
            self._intervals.append((name, self._starts.pop(name), self._now()))

    def time_backward_until(self, loss: Tensor, name: str) -> None:
        """Adds to section `name` what the next critic backward takes until it reaches `loss`.

        Autograd goes backwards: terms that were computed after `loss` and added to it are
        differentiated completely before it.
        """

        def record(_: Tensor) -> None:
            if self.is_running and (start := self._starts.get("critic backward")) is not None:
                self._intervals.append((name, start, self._now()))

        if self.is_running:
            loss.register_hook(record)

    def read_host(self) -> dict[str, float]:
        """Seconds by host section since the last call."""
        seconds, self._host_seconds = self._host_seconds, defaultdict(float)
        return seconds

    def read_device(self) -> dict[str, float]:
        """Seconds by every other section since the restart; stops the watch."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, start, end in self._intervals:
            seconds[name] += start.elapsed_time(end) / 1000 if self._is_cuda else end - start
        self.is_running = False
        self._intervals.clear()
        return seconds

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


stopwatch = Stopwatch()
"""One for the process, like torch's profiler: sections are marked all over the training loop."""


class section(ContextDecorator):
    """Marks a section for the stopwatch, and for a profiler if one listens: a context manager and a
    decorator."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._range: record_function | None = None

    def __enter__(self) -> "section":
        if torch.autograd._profiler_enabled():
            self._range = record_function(self.name)
            self._range.__enter__()
        stopwatch.start_section(self.name)
        return self

    def __exit__(self, *exception: Any) -> None:
        stopwatch.end_section(self.name)
        if self._range is not None:
            self._range.__exit__(*exception)
            self._range = None


@contextmanager
def profile_cycles(folder: Path, cycles: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every cycle; profiles `cycles` of them after a warm-up.

    Then writes `trace.json` (for chrome://tracing or ui.perfetto.dev) and `table.txt` into
    `folder`; warns if the run ends before that.
    """
    if cycles == 0:
        yield lambda: None
        return

    is_written = False

    def write(profiler: profile) -> None:
        nonlocal is_written
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        (folder / "table.txt").write_text(_table(profiler, cycles))
        logger.info("profile of %d cycles: %s", cycles, folder / "table.txt")
        is_written = True

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    phases = schedule(skip_first=_WARM_UP_CYCLES - 1, wait=0, warmup=1, active=cycles, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=write) as profiler:
        yield profiler.step
    if not is_written:
        logger.warning("the run ended before %d cycles could be profiled", cycles)


def _table(profiler: profile, cycles: int) -> str:
    """The time of each section, and the operators that take the most."""
    averages = profiler.key_averages()
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
