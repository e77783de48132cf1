"""Work on many rows, dealt over the ranks in chunks of a fixed size.

The chunks do not depend on the number of ranks, so neither does the arithmetic within them; only
the order in which their float64 sums are added does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class WorkShare:
    """One rank's share of the work; by default, all of it.

    sum: adds up a tensor over the ranks
    begin_round: called by every rank before each round, equally often; it may raise to stop all
    """

    rank: int = 0
    world_size: int = 1
    sum: Callable[[Tensor], Tensor] = _unchanged
    begin_round: Callable[[], None] = _nothing

    def rounds(self, length: int, chunk: int) -> Iterator[range]:
        """This rank's range of the `length` rows in each round; an empty one where the last round
        has too few chunks for all ranks. The caller may communicate in each round."""
        for first in range(0, length, chunk * self.world_size):
            self.begin_round()
            start = min(first + chunk * self.rank, length)
            yield range(start, min(start + chunk, length))
