"""How the runs of a page differ: in their settings, and in the values that they end with."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ganscale.report.curves import all_names, late_mean, layout_of, title_of_section
from ganscale.report.run_reader import Run, flattened

EMPTY = "\N{EN DASH}"
"""An empty cell."""

_MINUS = "\N{MINUS SIGN}"
_LOCATION = ("run.name", "run.folder")  # they always differ


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
    terms = [loss]
    penalties = run.setting("objective.penalties")
    for name, penalty in (penalties if isinstance(penalties, dict) else {}).items():
        weight = penalty.get("weight") if isinstance(penalty, dict) else None
        terms.append(f"{weight:g} {name}" if isinstance(weight, int | float) else str(name))
    text = " + ".join(terms)
    if (clip := run.setting("objective.clip.value")) is not None:
        text += f", clipped to {clip}"
    if isinstance(n_critic := run.setting("objective.n_critic"), int) and n_critic != 1:
        text += f", n_critic {n_critic}"
    return text


def differing_settings(runs: Sequence[Run]) -> list[Row]:
    """The settings in which the runs differ; a run without a setting has an EMPTY cell."""
    settings = [flattened(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for run_settings in settings for key in run_settings):
        cells = [run_settings.get(key, EMPTY) for run_settings in settings]
        if key not in _LOCATION and len(set(cells)) > 1:
            rows.append(Row(key, cells, ["" for _ in runs]))
    return rows


def final_values(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
    """(section's title, its rows): means over the last tenth of each run's images, with the last
    value as the note."""
    tables = []
    for section, charts in layout_of(all_names(runs), overlays_runs=True).items():
        names = [name for chart in charts for name, _ in chart.lines]
        tables.append((title_of_section(section)[0], [_final_row(name, runs) for name in names]))
    return tables


def format_number(value: float) -> str:
    """A number with four significant digits, for tables."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{_MINUS}∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    else:
        text = f"{value:.3e}"
    return text.replace("-", _MINUS)


def _final_row(name: str, runs: Iterable[Run]) -> Row:
    cells, notes = [], []
    for run in runs:
        curve = run.metrics.curves.get(name)
        cells.append(EMPTY if curve is None else format_number(late_mean(curve)))
        notes.append("" if curve is None else f"last: {curve.last!r} at {curve.x[-1]:,} images")
    return Row(name, cells, notes)
