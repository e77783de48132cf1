"""Times of contestants that take turns, so that other load on the machine affects all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

LEAST_ROUNDS = 3  # for a median and its quartiles


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[Callable[[], object]], Callable[[], object]] = lambda run: run,
    limit_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; in every round each runs once.

    prepare: makes of a contestant what is timed, outside of the time
    limit_seconds: after which no further round begins, once there are `LEAST_ROUNDS`
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    deadline = time.monotonic() + limit_seconds
    for turn in range(warm_up + rounds):
        if turn >= warm_up + LEAST_ROUNDS and time.monotonic() > deadline:
            break
        for name, contestant in contestants.items():
            run = prepare(contestant)
            started = clock()
            run()
            if turn >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def wall_clock() -> float:
    """Wall-clock seconds; with a GPU, after synchronizing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_clock() -> float:
    """Processor seconds of this process, which other load hardly changes; with a GPU, those of
    `wall_clock`."""
    return wall_clock() if torch.cuda.is_available() else time.process_time()


def speedup(rival: list[float], ours: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper quartile) of rival / ours over the rounds; above 1, we are faster."""
    return spread([theirs / own for theirs, own in zip(rival, ours, strict=True)])


def spread(ratios: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper quartile)."""
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return median, lower, upper
