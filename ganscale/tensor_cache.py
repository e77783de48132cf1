"""Tensors that are made once and then read again and again.

A CUDA graph reads them at their addresses, so whoever captures one has to hold those that it uses:
a cache forgets them when it is full.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_holders: list[list[Any]] = []  # shared by all threads: autograd's look tensors up, too
_clear: list[Callable[[], None]] = []  # of every cache


def cached_tensors(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Like `functools.lru_cache`, for functions that return tensors. Nobody may change them."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cached = lru_cache(maxsize)(function)
        _clear.append(cached.cache_clear)

        @wraps(function)
        def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
            found = cached(*args, **kwargs)
            for held in _holders:
                held.append(found)
            return found

        return look_up

    return decorate


def clear_cached_tensors() -> None:
    """So that what is used next is made anew, for a count of all tensors."""
    for clear in _clear:
        clear()


@contextmanager
def holding_cached_tensors() -> Iterator[list[Any]]:
    """Yields a list that gets everything that is taken from these caches within."""
    held: list[Any] = []
    _holders.append(held)
    try:
        yield held
    finally:
        _holders.pop()
