"""What sets the runs of a page apart: their settings, and the figures that they end with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ganscale.report.curves import all_names, late_mean, layout_of, title_of_section
from ganscale.report.run_reader import Run, flattened

NOTHING = "\N{EN DASH}"
"""What a cell shows where there is nothing to show."""

_MINUS = "\N{MINUS SIGN}"
_PLACES = ("run.name", "run.folder")  # always other ones


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, and one cell for each run; `notes` are shown on hover."""

    name: str
    cells: list[str]
    notes: list[str]


def objective_of(run: Run) -> str:
    """The objective in a few words, such as `wgan + 10 wgan_gp, n_critic 2`; "" if unknown."""
    loss = run.setting("objective.loss.name")
    if not isinstance(loss, str):
        return ""
    parts = [loss]
    penalties = run.setting("objective.penalties")
    for name, penalty in (penalties if isinstance(penalties, dict) else {}).items():
        weight = penalty.get("weight") if isinstance(penalty, dict) else None
        parts.append(f"{weight:g} {name}" if isinstance(weight, int | float) else str(name))
    text = " + ".join(parts)
    if (clip := run.setting("objective.clip.value")) is not None:
        text += f", clipped to {clip}"
    if isinstance(n_critic := run.setting("objective.n_critic"), int) and n_critic != 1:
        text += f", n_critic {n_critic}"
    return text


def differing_settings(runs: Sequence[Run]) -> list[Row]:
    """The settings in which the runs differ; NOTHING where a run has no such setting."""
    settings = [flattened(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for own in settings for key in own):
        cells = [own.get(key, NOTHING) for own in settings]
        if key not in _PLACES and len(set(cells)) > 1:
            rows.append(Row(key, cells, ["" for _ in runs]))
    return rows


def final_figures(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
    """(section's title, its figures): means over the last tenth of each run's images, with the last
    figure as the note."""
    tables = []
    for section, charts in layout_of(all_names(runs), overlays_runs=True).items():
        names = [name for chart in charts for name, _ in chart.lines]
        tables.append((title_of_section(section)[0], [_figures(name, runs) for name in names]))
    return tables


def in_figures(value: float) -> str:
    """A number as tables show it: four digits that count."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{_MINUS}∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    else:
        text = f"{value:.3e}"
    return text.replace("-", _MINUS)


def _figures(name: str, runs: Iterable[Run]) -> Row:
    cells, notes = [], []
    for run in runs:
        curve = run.metrics.curves.get(name)
        cells.append(NOTHING if curve is None else in_figures(late_mean(curve)))
        notes.append("" if curve is None else f"last: {curve.last!r} at {curve.x[-1]:,} images")
    return Row(name, cells, notes)
