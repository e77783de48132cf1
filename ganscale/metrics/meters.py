"""Means and maxima of detached tensors, kept on the device until a row is due."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ganscale.runtime import Runtime

Groups = dict[tuple[str, ...], Tensor]

_STEPS_HELD, _VALUES_HELD = 64, 1 << 20

SQUARE = " square"
"""Ends the name of a mean of squares; no loss or penalty can have a name with a space."""


class Scaled(NamedTuple):
    """`factor` times a scalar."""

    value: Tensor
    factor: float


class NormOf(NamedTuple):
    """The 2-norm of scalars."""

    parts: tuple[Tensor, ...]


Meter = Tensor | float | Scaled | NormOf
"""A number of a step, given such that the step need not launch anything for it."""


class _Layout(NamedTuple):
    """How a meter is computed: `factor` alone without parts, times the scalar for one part, times
    the 2-norm for several."""

    name: str
    parts: int
    factor: float


class _Kind(NamedTuple):
    """Names and shapes of what one `add` is given; all of a kind are reduced together."""

    meters: tuple[_Layout, ...]
    maxima: tuple[_Layout, ...]
    norms: tuple[tuple[str, torch.Size], ...]
    logits: tuple[tuple[str, torch.Size], ...]


class MeterAccumulator:
    """Sums and maxima of meters since the last `read`.

    A step only hands over references, which launches nothing: on a GPU, its meters would take as
    many launches as a small network. Many steps are reduced together, in float64.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._held: defaultdict[_Kind, list[list[Tensor]]] = defaultdict(list)
        self._steps_held = self._values_held = 0
        self._sums: Groups = {}
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._maxima: Groups = {}

    def add(
        self,
        meters: Mapping[str, Meter],
        maxima: Mapping[str, Meter] | None = None,
        norms: Mapping[str, Tensor] | None = None,
        logits: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keeps detached tensors, which must not be changed afterwards; does not wait for the
        device.

        `read` returns means of the scalars `meters` and the largest of `maxima`, over steps and
        ranks; and of `norms` (batch,) and `logits` (batch, *map) what `_summarize` makes of them.
        """
        maxima, norms, logits = maxima or {}, norms or {}, logits or {}
        scalars = [
            each for meter in (*meters.values(), *maxima.values()) for each in parts_of(meter)
        ]
        kind = _Kind(_layouts(meters), _layouts(maxima), _shapes(norms), _shapes(logits))
        self._held[kind].append([*scalars, *norms.values(), *logits.values()])
        self._steps_held += 1
        self._values_held += sum(each.numel() for each in (*norms.values(), *logits.values()))
        if self._steps_held >= _STEPS_HELD or self._values_held >= _VALUES_HELD:
            self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """Adds what is held to the sums, in the order of the steps: a run that was interrupted, and
        so reduced its steps in other portions, gets the same bits."""
        for kind, steps in self._held.items():
            means, maxima = _summarize(kind, steps, self._runtime.device)
            names = tuple(means)
            self._counts[names] += len(steps)
            if means:
                rows = torch.stack([*means.values()], dim=1)
                before = [self._sums[names][None]] if names in self._sums else []
                self._sums[names] = torch.cat([*before, rows]).cumsum(0)[-1]
            if maxima:
                names = tuple(maxima)
                rows = torch.stack([*maxima.values()], dim=1)
                before = [self._maxima[names][None]] if names in self._maxima else []
                self._maxima[names] = torch.cat([*before, rows]).amax(0)
        self._held.clear()
        self._steps_held = self._values_held = 0

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
        self._reduce()
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


def parts_of(meter: Meter) -> tuple[Tensor, ...]:
    """The scalars that a meter is made of."""
    if isinstance(meter, NormOf):
        return meter.parts
    if isinstance(meter, Scaled):
        return (meter.value,)
    return (meter,) if isinstance(meter, Tensor) else ()


def _layouts(meters: Mapping[str, Meter]) -> tuple[_Layout, ...]:
    named = meters.items()
    return tuple(_Layout(name, len(parts_of(meter)), _factor(meter)) for name, meter in named)


def _shapes(values: Mapping[str, Tensor]) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, value.shape) for name, value in values.items())


def _factor(meter: Meter) -> float:
    if isinstance(meter, Scaled):
        return meter.factor
    return meter if isinstance(meter, float) else 1.0


def _summarize(
    kind: _Kind, steps: Sequence[list[Tensor]], device: torch.device
) -> tuple[dict[str, Tensor], ...]:
    """(means, maxima) by name, of each step, (steps,) float64.

    Of norms: the mean, the mean square, from which a row derives its deviation, and the maximum.
    Of logits: the first two and the mean sign; of both kinds, how often the real one is larger.
    """
    layouts = (*kind.meters, *kind.maxima)
    count = sum(layout.parts for layout in layouts)
    columns: list[Tensor] = []
    if layouts:
        in_order = [value for step in steps for value in step[:count]]
        table = torch.stack(in_order) if in_order else torch.empty(0, device=device)
        table = table.double().view(len(steps), count)
        counts = [layout.parts for layout in layouts]
        for layout, parts in zip(layouts, table.split(counts, dim=1), strict=True):
            columns.append(_combined(parts, layout.factor))
    names = [layout.name for layout in layouts]
    means = dict(zip(names[: len(kind.meters)], columns, strict=False))
    maxima = dict(zip(names[len(kind.meters) :], columns[len(kind.meters) :], strict=True))
    logits: dict[str, Tensor] = {}
    others = zip(*(step[count:] for step in steps), strict=True)
    for index, values in enumerate(others):
        rows = torch.stack(values).double().flatten(1)
        if index < len(kind.norms):
            name = kind.norms[index][0]
            means |= {name: rows.mean(1), f"{name}{SQUARE}": rows.square().mean(1)}
            maxima[f"{name}_max"] = rows.amax(1)
        else:
            logits[kind.logits[index - len(kind.norms)][0]] = rows
    for name, rows in logits.items():
        means[f"logits/{name}_mean"] = rows.mean(1)
        means[f"logits/{name}{SQUARE}"] = rows.square().mean(1)
        means[f"logits/{name}_sign_rate"] = rows.sign().mean(1)
    if logits:
        means["logits/pairs_in_order"] = (logits["real"] > logits["fake"]).double().mean(1)
    return means, maxima


def _combined(parts: Tensor, factor: float) -> Tensor:
    """The meter of each step from its parts, (steps, parts)."""
    if parts.shape[1] == 0:
        return parts.new_full((len(parts),), factor)
    if parts.shape[1] == 1:
        return parts[:, 0] * factor
    return parts.square().cumsum(1)[:, -1].sqrt() * factor  # one after another, as in `_reduce`


def _as_numbers(
    groups: Groups, reduce: Callable[[Tensor], Tensor]
) -> dict[tuple[str, ...], list[float]]:
    if not groups:
        return {}
    values = iter(reduce(torch.cat([*groups.values()])).tolist())
    return {names: [next(values) for _ in names] for names in groups}
