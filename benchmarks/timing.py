"""Times of contestants that take turns, so that what else the machine does hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    contestants: Mapping[str, Callable[[], None]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; in every round all run once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm_up + rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speedup(rival: list[float], ours: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper quartile) of rival / ours over the rounds: above 1 we are faster."""
    ratios = [theirs / mine for theirs, mine in zip(rival, ours, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return median, lower, upper
