"""Means and maxima of detached scalars, kept on the device until a row is due."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganscale.runtime import Runtime

Groups = dict[tuple[str, ...], Tensor]


class MeterAccumulator:
    """Sums and maxima of meters since the last `read`.

    Meters of one `add` are kept as one tensor: adding them is one stack and one sum.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sums: Groups = {}
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._maxima: Groups = {}

    def add(self, meters: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None) -> None:
        """Adds detached scalars without waiting for the device.

        `read` returns means of `meters` and the largest of `maxima`, over steps and ranks.
        """
        self._counts[tuple(meters)] += 1
        kinds = (self._sums, meters, torch.add), (self._maxima, maxima, torch.maximum)
        for groups, added, merge in kinds:
            if added:
                names, values = tuple(added), torch.stack([*added.values()]).double()
                groups[names] = merge(groups[names], values) if names in groups else values

    def read(self) -> dict[str, float]:
        """The means and maxima over steps and ranks since the last call."""
        groups = self.state()
        self._sums, self._counts, self._maxima = {}, Counter(), {}
        totals: defaultdict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        maxima: dict[str, float] = {}
        for group in groups:
            if "maxima" in group:
                for name, value in zip(group["names"], group["maxima"], strict=True):
                    # Unlike max, np.maximum keeps a NaN.
                    maxima[name] = float(np.maximum(maxima.get(name, -math.inf), value))
            else:
                for name, value in zip(group["names"], group["sums"], strict=True):
                    totals[name] += value
                    counts[name] += group["count"]
        return {name: total / counts[name] for name, total in totals.items()} | maxima

    def state(self) -> list[dict[str, Any]]:
        """The sums, averaged over the ranks, and the maxima, as plain numbers for a checkpoint."""
        ranks = self._runtime.world_size
        sums = _as_numbers(self._sums, lambda sums: self._runtime.all_reduce_sum(sums) / ranks)
        maxima = _as_numbers(self._maxima, self._runtime.all_reduce_max)
        return [
            *({"names": [*n], "count": self._counts[n], "sums": sums[n]} for n in sums),
            *({"names": [*n], "maxima": maxima[n]} for n in maxima),
        ]

    def load_state(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            names, kind = tuple(group["names"]), "maxima" if "maxima" in group else "sums"
            values = torch.tensor(group[kind], dtype=torch.float64, device=self._runtime.device)
            if kind == "maxima":
                self._maxima[names] = values
            else:
                self._sums[names], self._counts[names] = values, group["count"]


def _as_numbers(
    groups: Groups, reduce: Callable[[Tensor], Tensor]
) -> dict[tuple[str, ...], list[float]]:
    if not groups:
        return {}
    values = iter(reduce(torch.cat([*groups.values()])).tolist())
    return {names: [next(values) for _ in names] for names in groups}
