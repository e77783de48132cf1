"""Samples that cannot be used: how they are counted and logged, and when there are too many.

A bad sample is counted when its own position comes up: counts are a function of the images seen.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ganscale.errors import UserError
from ganscale.terminal import printable

logger = logging.getLogger(__name__)

SAMPLES_TRIED = 64
"""How many bad samples in a row end a run."""

_LOGGED_IN_FULL = 10
_PLACES_LOGGED = 100  # pairs of shard and reason, of which one sample each is logged
_FEWEST_READ = 1000  # the limit is a share of at least these: one bad image of ten is not 10 %


class BadSample(NamedTuple):
    """A sample that was not used.

    shard: the tar's name
    reason: one of a few words to count by: "cut", "no image", "no class", "too large", ...
    key: the sample's name in the tar; "" where the tar itself is damaged
    detail: what exactly is wrong, as the end of a sentence about the sample
    """

    shard: str
    reason: str
    key: str
    detail: str

    def __str__(self) -> str:
        where = f"sample {self.key} of shard" if self.key else "shard"
        return printable(f"{where} {self.shard} {self.detail}")


class BadSampleError(Exception):
    """A sample that cannot be used, however often one tries. detail, reason: as in `BadSample`."""

    def __init__(self, detail: str, reason: str = "cannot be decoded") -> None:
        super().__init__(detail)
        self.detail, self.reason = detail, reason


def too_many_in_a_row(last: BadSample) -> UserError:
    return UserError(f"{SAMPLES_TRIED} samples in a row could not be used; the last: {last}")


class BadSampleLog:
    """Warns of bad samples: of the first few, then of one for each shard and reason, then whenever
    their number has doubled. A billion of them make some 150 lines."""

    def __init__(self) -> None:
        self._count = 0
        self._places: set[tuple[str, str]] = set()

    def warn(self, bad_samples: Iterable[BadSample]) -> None:
        for bad_sample in bad_samples:
            self._count += 1
            place = (bad_sample.shard, bad_sample.reason)
            is_new = place not in self._places and len(self._places) < _PLACES_LOGGED
            if is_new:
                self._places.add(place)
            if self._count <= _LOGGED_IN_FULL or is_new:
                logger.warning("%s; another sample replaces it", bad_sample)
            if self._count == _LOGGED_IN_FULL:
                logger.warning("from now on, only one bad sample per shard and reason is logged")
            elif self._count > _LOGGED_IN_FULL and self._count.bit_count() == 1:
                logger.warning("%s bad samples so far on this rank", f"{self._count:,}")


def check_bad_sample_limit(counts: Counter[tuple[str, str]], read: int, limit: float) -> None:
    """Raises UserError when more than the share `limit` of the `read` samples of all ranks was bad.

    counts: of bad samples by (shard, reason), over all ranks
    """
    bad = counts.total()
    if bad <= limit * max(read, _FEWEST_READ):
        return
    worst = "; ".join(f"{shard}: {n:,} {reason}" for (shard, reason), n in counts.most_common(3))
    raise UserError(
        f"{bad:,} of {read:,} samples could not be used, more than "
        f"data.max_bad_fraction={limit:g} allows; most of them in {worst} "
        "(`ganscale shards verify --leave-out` lists them all)"
    )


def bad_sample_rows(
    counts: Counter[tuple[str, str]], most: int = 100
) -> list[dict[str, str | int]]:
    """{"shard", "reason", "count"} for summaries, the most frequent first; beyond `most` rows, a
    last one has the sum of the others."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = ordered[:most]
    if rest := sum(count for _, count in ordered[most:]):
        rows.append(((f"({len(ordered) - most:,} more)", "any"), rest))
    return [{"shard": shard, "reason": reason, "count": n} for (shard, reason), n in rows]
