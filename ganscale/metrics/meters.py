"""Means and maxima of detached scalars, kept on the device until a row is due."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ganscale.runtime import Runtime


class MeterAccumulator:
    """Sums and maxima of meters since the last `read`.

    Meters of one `add` are kept as one tensor: adding them is one stack and one sum.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._maxima: dict[tuple[str, ...], Tensor] = {}

    def add(self, meters: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None) -> None:
        """Adds detached scalars without waiting for the device.

        `read` returns means of `meters` and the largest of `maxima`, over steps and ranks.
        """
        names, values = tuple(meters), torch.stack([*meters.values()]).double()
        sums = self._sums.get(names)
        self._sums[names] = values if sums is None else sums + values
        self._counts[names] += 1
        if maxima:
            names, values = tuple(maxima), torch.stack([*maxima.values()]).double()
            largest = self._maxima.get(names)
            self._maxima[names] = values if largest is None else torch.maximum(largest, values)

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
        groups = []
        if self._sums:
            values = torch.cat(list(self._sums.values()))
            sums = iter((self._runtime.all_reduce_sum(values) / self._runtime.world_size).tolist())
            for names, count in self._counts.items():
                of_names = [next(sums) for _ in names]
                groups.append({"names": list(names), "count": count, "sums": of_names})
        if self._maxima:
            values = torch.cat(list(self._maxima.values()))
            maxima = iter(self._runtime.all_reduce_max(values).tolist())
            for names in self._maxima:
                groups.append({"names": list(names), "maxima": [next(maxima) for _ in names]})
        return groups

    def load_state(self, groups: list[dict[str, Any]]) -> None:
        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self._runtime.device)

        for group in groups:
            names = tuple(group["names"])
            if "maxima" in group:
                self._maxima[names] = tensor(group["maxima"])
            else:
                self._sums[names] = tensor(group["sums"])
                self._counts[names] = group["count"]
