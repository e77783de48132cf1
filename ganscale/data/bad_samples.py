"""Samples that cannot be used: how they are counted, how they are told, and when they are too many.

A bad sample is counted once each time that its own position comes up, whatever took its place:
the numbers are a function of the images seen, the same on every cluster.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ganscale.data.images.decoding import DecodeError
from ganscale.data.shard_reader import BadSampleError
from ganscale.errors import UserError

logger = logging.getLogger(__name__)

_NAMED = 10  # bad samples that the log tells in full
_PLACES_NAMED = 100  # shards and reasons that the log tells after them
_FIRST_READ = 1000  # a share is taken of no less: one of the first ten images is not ten percent


class BadSample(NamedTuple):
    """A sample that was not used.

    shard: the tar's name; reason: one of a few words, to count by; key: the sample's name in the
    tar, "" for what is behind a damage of the tar itself; detail: what exactly was found
    """

    shard: str
    reason: str
    key: str
    detail: str


def reason_of(error: BadSampleError | DecodeError) -> str:
    """The kind of damage: one of `_REASONS`, or "cannot be decoded"."""
    detail = error.reason if isinstance(error, BadSampleError) else str(error)
    for words, reason in _REASONS:
        if words in detail:
            return reason
    return "cannot be decoded"


_REASONS = (
    ("is cut", "cut"),
    ("its format is none that is known", "no image"),
    ("has no image", "no image"),
    ("data.class_count", "no class"),
    ("more than the limit", "too large"),
    (" MiB", "too large"),
    ("bytes at byte", "cut"),
)


class BadSampleLog:
    """Warns of bad samples: the first few by name, then each new shard and reason once, then
    whenever their number has doubled. A billion of them make some 150 lines."""

    def __init__(self) -> None:
        self._count = 0
        self._next_line = 1 << _NAMED.bit_length()
        self._places: set[tuple[str, str]] = set()

    def tell(self, found: Iterable[BadSample]) -> None:
        for bad_samples in found:
            self._count += 1
            place = (bad_samples.shard, bad_samples.reason)
            is_new = place not in self._places and len(self._places) < _PLACES_NAMED
            if is_new:
                self._places.add(place)
            if self._count <= _NAMED or is_new:
                logger.warning("%s %s; another one takes its place", name_of(bad_samples), bad_samples.detail)
            if self._count == _NAMED:
                logger.warning("from now on, one bad sample of a shard is named for all of them")
            if self._count == self._next_line:
                self._next_line *= 2
                logger.warning("%s bad samples so far on this rank", f"{self._count:,}")


def name_of(bad_samples: BadSample) -> str:
    where = f"sample {bad_samples.key} of shard" if bad_samples.key else "shard"
    return f"{where} {bad_samples.shard}"


def check_bad_sample_limit(
    bad_samples: int, read: int, limit: float, worst: Sequence[tuple[tuple[str, str], int]]
) -> None:
    """Raises UserError when more than the share `limit` of the samples read was broken.

    broken, read: over all ranks, in samples; read includes the bad ones
    worst: ((shard, reason), count), the worst first, as `Counter.most_common` has it
    """
    if bad_samples <= limit * max(read, _FIRST_READ):
        return
    places = "; ".join(f"{shard}: {count:,} {reason}" for (shard, reason), count in worst[:3])
    raise UserError(
        f"{bad_samples:,} of {read:,} samples could not be used, more than data.max_bad_fraction={limit:g} "
        f"allows; most of them in {places} (`ganscale shards verify --leave-out` lists them all)"
    )


def bad_sample_rows(counts: Counter[tuple[str, str]], most: int = 100) -> list[dict[str, str | int]]:
    """{"shard", "reason", "count"} for summaries, the worst first; what is beyond `most` rows is
    summed in a last one."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows: list[dict[str, str | int]] = [
        {"shard": shard, "reason": reason, "count": count}
        for (shard, reason), count in ordered[:most]
    ]
    rest = sum(count for _, count in ordered[most:])
    if rest:
        more = f"({len(ordered) - most:,} more)"
        rows.append({"shard": more, "reason": "any", "count": rest})
    return rows
