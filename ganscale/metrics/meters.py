"""Running means of a step's figures, kept on the device until somebody reads them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ganscale.runtime import Runtime


class MeterAccumulator:
    """Sums and maxima of meters since the last reading. Meters added together are kept together,
    so that adding them is one stack and one sum."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        self._maxima: dict[tuple[str, ...], Tensor] = {}

    def add(self, meters: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None) -> None:
        """Adds detached scalars; never waits for the device.

        `meters` are averaged over steps and ranks, of `maxima` the largest counts.
        """
        names, values = tuple(meters), torch.stack([*meters.values()]).double()
        known = self._sums.get(names)
        self._sums[names] = values if known is None else known + values
        self._counts[names] = self._counts.get(names, 0) + 1
        if maxima:
            names, values = tuple(maxima), torch.stack([*maxima.values()]).double()
            known = self._maxima.get(names)
            self._maxima[names] = values if known is None else torch.maximum(known, values)

    def read(self) -> dict[str, float]:
        """The means over steps and ranks since the last call, and the maxima."""
        saved = self.state()
        self._sums, self._counts, self._maxima = {}, {}, {}
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        maxima: dict[str, float] = {}
        for group in saved:
            if "maxima" in group:
                for name, largest in zip(group["names"], group["maxima"], strict=True):
                    known = maxima.get(name, -math.inf)
                    is_kept = known > largest or math.isnan(known)
                    maxima[name] = known if is_kept else largest
                continue
            for name, total in zip(group["names"], group["sums"], strict=True):
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + group["count"]
        return {name: total / counts[name] for name, total in totals.items()} | maxima

    def state(self) -> list[dict]:
        """The sums, averaged over the ranks, and the maxima, as plain numbers for a checkpoint."""
        groups = []
        if self._sums:
            values = torch.cat(list(self._sums.values()))
            averaged = (self._runtime.all_reduce_sum(values) / self._runtime.world_size).tolist()
            for names, count in self._counts.items():
                sums, averaged = averaged[: len(names)], averaged[len(names) :]
                groups.append({"names": list(names), "count": count, "sums": sums})
        if self._maxima:
            values = torch.cat(list(self._maxima.values()))
            largest = self._runtime.all_reduce_max(values).tolist()
            for names in self._maxima:
                maxima, largest = largest[: len(names)], largest[len(names) :]
                groups.append({"names": list(names), "maxima": maxima})
        return groups

    def load_state(self, groups: list[dict]) -> None:
        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self._runtime.device)

        for group in groups:
            names = tuple(group["names"])
            if "maxima" in group:
                self._maxima[names] = tensor(group["maxima"])
            else:
                self._sums[names] = tensor(group["sums"])
                self._counts[names] = group["count"]
