"""Running means of a step's figures, kept on the device until somebody reads them."""

import torch
from torch import Tensor

from ganscale.runtime import Runtime


class MeterSums:
    """Sums of meters since the last reading; figures that come together are added together."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, meters: dict[str, Tensor]) -> None:
        """Adds detached scalars; never waits for the device."""
        names = tuple(meters)
        values = torch.stack([value.to(torch.float64) for value in meters.values()])
        known = self._sums.get(names)
        self._sums[names] = values if known is None else known + values
        self._counts[names] = self._counts.get(names, 0) + 1

    def read(self) -> dict[str, float]:
        """The means over steps and ranks since the last call: one collective, one copy."""
        saved = self.state()
        self._sums, self._counts = {}, {}
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for group in saved:
            for name, total in zip(group["names"], group["sums"], strict=True):
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + group["count"]
        return {name: total / counts[name] for name, total in totals.items()}

    def state(self) -> list[dict]:
        """The sums, averaged over the ranks, as plain numbers for a checkpoint."""
        if not self._sums:
            return []
        values = torch.cat(list(self._sums.values()))
        averaged = (self._runtime.sum(values) / self._runtime.world_size).tolist()
        groups = []
        for names, count in self._counts.items():
            groups.append({"names": list(names), "count": count, "sums": averaged[: len(names)]})
            averaged = averaged[len(names) :]
        return groups

    def load_state(self, groups: list[dict]) -> None:
        device = self._runtime.device
        for group in groups:
            names = tuple(group["names"])
            self._sums[names] = torch.tensor(group["sums"], dtype=torch.float64, device=device)
            self._counts[names] = group["count"]
