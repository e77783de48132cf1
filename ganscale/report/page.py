"""The report as one HTML page that needs no network and no other file.

The content of a run folder is untrusted text. Jinja escapes all of it, curves are stored as
compressed JSON, and the page's content security policy lets the browser run only this page's own
scripts and load nothing.
"""

import base64
import gzip
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from ganscale import __version__
from ganscale.report.curves import (
    COLOURS,
    Chart,
    all_names,
    drawable,
    format_number,
    known_first,
    late_mean,
    layout_of,
    most_points,
    title_of_section,
    trained_by,
)
from ganscale.report.evaluations import best_figures, dependences, incomparable
from ganscale.report.history import Session, faults_of, run_state, sessions_of
from ganscale.report.run_reader import Run, flattened
from ganscale.report.samples import KIND_TITLES, read_grids, title_of_kind

EMPTY = "\N{EN DASH}"  # in an empty cell
_LOCATION = ("run.name", "run.folder")  # they always differ


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, and one cell for each run; `notes` are shown on hover."""

    name: str
    cells: list[str]
    notes: Sequence[str] = ()


def render(runs: Sequence[Run], now: datetime) -> str:
    """The page of one run, or of several in comparison; `now` is shown as its date."""
    resources = files("ganscale.report")
    sections, sample_kinds = _sections(runs), _sample_kinds(runs)
    views = [_run_view(run) for run in runs]
    names = [{"name": view["name"], "restarts": view["restarts"]} for view in views]
    data = {"runs": names, "sections": sections}
    environment = Environment(
        loader=PackageLoader("ganscale.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        version=__version__,
        now=f"{now:%Y-%m-%d %H:%M}",
        nonce=secrets.token_urlsafe(16),
        style=resources.joinpath("style.css").read_text(encoding="utf-8"),
        script=resources.joinpath("page.js").read_text(encoding="utf-8"),
        plotly=_compressed_plotly(),
        data=_compress(json.dumps(data, allow_nan=False, separators=(",", ":")).encode()),
        runs=views,
        colours=COLOURS,
        empty=EMPTY,
        sections=sections,
        is_thinned=_is_thinned(sections),
        most_points=most_points(len(runs)),
        evaluations={
            "dependences": dependences(runs),
            "incomparable": incomparable(runs),
            "best": best_figures(runs),
        },
        final_values=final_values(runs),
        differences=differing_settings(runs) if len(runs) > 1 else [],
        sample_kinds=sample_kinds,
        times=_times(sample_kinds),
    )


def _sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every section's charts, as page.js draws them."""
    sections = []
    for section, charts in layout_of(all_names(runs), overlays_runs=len(runs) > 1).items():
        title, description = title_of_section(section)
        views = [_chart_view(chart, runs) for chart in charts]
        view = {"key": section, "title": title, "description": description, "charts": views}
        sections.append(view)
    return sections


def _chart_view(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    lines = []
    for name, label in chart.lines:
        for number, run in enumerate(runs):
            if (curve := run.metrics.curves.get(name)) is not None:
                line = {"name": name, "label": label, "run": number}
                points = drawable(curve, most_points(len(runs)))
                lines.append({**line, "last": format_number(curve.last), **points})
    return {
        "title": chart.title,
        "names": " · ".join(name for name, _ in chart.lines),
        "unit": chart.unit,
        "colours": chart.colours,
        "trained_by": trained_by(chart, runs),
        "lines": lines,
    }


def _is_thinned(sections: list[dict[str, Any]]) -> bool:
    """Whether any line has fewer points than its record."""
    charts = (chart for section in sections for chart in section["charts"])
    return any("mean_x" in line for chart in charts for line in chart["lines"])


def _run_view(run: Run) -> dict[str, Any]:
    """One run as the template shows it."""
    state, level = run_state(run)
    faults, sessions = faults_of(run), sessions_of(run)
    return {
        "name": run.name,
        "objective": objective_of(run),
        "state": state,
        "level": level,
        "faults": faults,
        "serious": sum(fault.level != "note" for fault in faults),
        "sessions": sessions,
        "restarts": sorted({session.images_seen for session in sessions} - {0}),
        "config": run.config_text,
        "summary": json.dumps(run.summary, indent=1, ensure_ascii=False) if run.summary else "",
        "tiles": _tiles(run, sessions),
    }


def _tiles(run: Run, sessions: Sequence[Session]) -> list[tuple[str, str, str]]:
    """(label, value, note) of the few values that come first."""
    total = run.setting("training.total_images")
    is_known = isinstance(total, int) and total > 0
    share = f"{run.images_seen / total:.0%} of {total:,}" if is_known else ""
    ranks = list(dict.fromkeys(session.ranks for session in sessions if session.ranks))
    on = f"on {', '.join(ranks)} rank{'s' if ranks != ['1'] else ''}" if ranks else ""
    return [
        ("images seen", f"{run.images_seen:,}", share),
        ("images/s", *_speed(run)),
        ("training time", _duration(run.summary.get("training_seconds")), ""),
        ("sessions", f"{len(sessions):,}", on),
    ]


def _speed(run: Run) -> tuple[str, str]:
    mean = run.summary.get("images_per_second")
    if run.has_ended and isinstance(mean, int | float):
        return f"{mean:,.0f}", "mean of all sessions"
    curve = run.metrics.curves.get("perf/images_per_second")
    return (EMPTY, "") if curve is None else (f"{curve.last:,.0f}", "at the last row")


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e10:
        return EMPTY
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 360) / 10
    return f"{minutes:,} min" if minutes < 120 else f"{hours:,.1f} h"


def objective_of(run: Run) -> str:
    """The objective in a few words, such as `wgan + 10 wgan_gp, n_critic 2`; "" if unknown."""
    loss = run.setting("objective.loss.name")
    if not isinstance(loss, str):
        return ""
    terms = [loss]
    penalties: dict[str, Any] = {}
    for kind in ("penalties", "generator_penalties"):
        of_kind = run.setting(f"objective.{kind}")
        penalties |= of_kind if isinstance(of_kind, dict) else {}
    for name, penalty in penalties.items():
        weight = penalty.get("weight") if isinstance(penalty, dict) else None
        is_schedule = isinstance(weight, dict)
        ends = [weight.get("from"), weight.get("to")] if is_schedule else [weight]
        shown = " to ".join(f"{end:g}" for end in ends if isinstance(end, int | float))
        terms.append(f"{shown} {name}".strip())
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
            rows.append(Row(key, cells))
    return rows


def final_values(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
    """(section's title, its rows): means over the last tenth of each run's images, with the last
    value as the note."""
    tables = []
    for section, charts in layout_of(all_names(runs), overlays_runs=True).items():
        rows = []
        for name in (name for chart in charts for name, _ in chart.lines):
            curves = [run.metrics.curves.get(name) for run in runs]
            cells = [format_number(late_mean(curve)) if curve else EMPTY for curve in curves]
            notes = [f"last: {c.last!r} at {c.x[-1]:,} images" if c else "" for c in curves]
            rows.append(Row(name, cells, notes))
        tables.append((title_of_section(section)[0], rows))
    return tables


def _sample_kinds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The kinds of sample grids, each with the series of every run that has it.

    Real images that all runs share are shown once, next to the grids of the first kind.
    """
    series = [read_grids(run.folder, len(runs)) for run in runs]
    kinds: list[dict[str, Any]] = []
    for kind in known_first((kind for by_kind in series for kind in by_kind), KIND_TITLES):
        panels = [
            {"run": number, "name": runs[number].name, "series": by_kind[kind]}
            for number, by_kind in enumerate(series)
            if kind in by_kind and by_kind[kind].frames
        ]
        frames = {frame for panel in panels for frame in panel["series"].frames}
        is_shared = len(frames) == 1 < len(panels) and frames.pop().images_seen is None
        if is_shared and kinds:
            panel = {"run": None, "name": title_of_kind(kind), "series": panels[0]["series"]}
            kinds[0]["panels"].append(panel)
        elif panels:
            kinds.append({"title": title_of_kind(kind), "panels": panels})
    return kinds


def _times(sample_kinds: list[dict[str, Any]]) -> list[int]:
    """The stops of the samples' slider: the images seen of every grid."""
    panels = [panel for kind in sample_kinds for panel in kind["panels"]]
    times = {frame.images_seen for panel in panels for frame in panel["series"].frames}
    return sorted(time for time in times if time is not None)


@cache
def _compressed_plotly() -> str:
    # 1.9 MB, from 4.8 MB of text
    return _compress(get_plotlyjs().encode())


def _compress(content: bytes) -> str:
    """gzip in base64."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
