"""The nearest settings that would do, for sentences about ones that do not."""

from collections.abc import Callable, Sequence


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, 0 if none does; below one that fits, all do."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def nearest(wanted: int, does: Callable[[int], bool], at_most: int) -> list[int]:
    """The nearest number below `wanted` and the nearest above it that do, of 1 to `at_most`."""
    below = next((n for n in range(min(wanted - 1, at_most), 0, -1) if does(n)), None)
    above = next((n for n in range(wanted + 1, at_most + 1) if does(n)), None)
    return [n for n in (below, above) if n is not None]


def either(choices: Sequence[object]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last
