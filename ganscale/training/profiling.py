"""Where the time of a cycle goes: torch's profiler over a few of them, once a run is warm."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

logger = logging.getLogger(__name__)

_WARM_UP_CYCLES = 5
_OPERATORS_LISTED = 25

section = record_function
"""Names a part of a cycle in the trace: a context manager, and a decorator."""

SECTIONS = (
    "data wait",
    "to the device",
    "fake images",
    "critic forward",  # with its penalties
    "critic backward",  # with the averaging over ranks
    "critic update",
    "generator forward",
    "generator backward",
    "generator update",
    "average",
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
