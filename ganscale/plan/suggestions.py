"""The nearest valid settings, for messages about invalid ones."""

from collections.abc import Callable, Sequence


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, or 0. If a number fits, all smaller ones must."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def nearest(value: int, is_valid: Callable[[int], bool], at_most: int) -> list[int]:
    """The nearest valid numbers below and above `value`, between 1 and `at_most`."""
    below = next((n for n in range(min(value - 1, at_most), 0, -1) if is_valid(n)), None)
    above = next((n for n in range(value + 1, at_most + 1) if is_valid(n)), None)
    return [n for n in (below, above) if n is not None]


def either(choices: Sequence[object]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last
