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
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from ganscale import __version__
from ganscale.report.comparison import (
    EMPTY,
    differing_settings,
    final_values,
    format_number,
    objective_of,
)
from ganscale.report.curves import (
    COLOURS,
    Chart,
    all_names,
    drawable,
    layout_of,
    most_points,
    title_of_section,
    trained_by,
)
from ganscale.report.faults import faults_of, read_log, run_state
from ganscale.report.run_reader import Run
from ganscale.report.samples import order_of_kinds, read_grids, title_of_kind
from ganscale.report.sessions import Session, sessions_of


def render(runs: Sequence[Run], now: datetime) -> str:
    """The page of one run, or of several in comparison; `now` is shown as its date."""
    sections = _sections(runs)
    sample_kinds = _sample_kinds(runs)
    views = [_run_view(run) for run in runs]
    data = {
        "runs": [{"name": view["name"], "restarts": view["restarts"]} for view in views],
        "sections": sections,
    }
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
        style=_read_resource("style.css"),
        script=_read_resource("page.js"),
        plotly=_compressed_plotly(),
        data=_compress(json.dumps(data, allow_nan=False, separators=(",", ":")).encode()),
        runs=views,
        colours=COLOURS,
        empty=EMPTY,
        sections=sections,
        is_thinned=_is_thinned(sections),
        most_points=most_points(len(runs)),
        final_values=final_values(runs),
        differences=differing_settings(runs) if len(runs) > 1 else [],
        sample_kinds=sample_kinds,
        times=_times(sample_kinds),
    )


def _sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every section's charts, as page.js draws them."""
    layout = layout_of(all_names(runs), overlays_runs=len(runs) > 1)
    sections = []
    for section, charts in layout.items():
        title, description = title_of_section(section)
        views = [_chart_view(chart, runs) for chart in charts]
        sections.append({"title": title, "description": description, "charts": views})
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
    faults = faults_of(run, read_log(run.folder.log))
    sessions = sessions_of(run)
    starts = dict.fromkeys(session.images_seen for session in sessions)
    return {
        "name": run.name,
        "objective": objective_of(run),
        "state": state,
        "level": level,
        "faults": faults,
        "serious": sum(fault.level != "note" for fault in faults),
        "sessions": sessions,
        "restarts": [start for start in starts if start > 0],
        "config": run.config_text,
        "summary": json.dumps(run.summary, indent=1, ensure_ascii=False) if run.summary else "",
        "tiles": _tiles(run, sessions),
    }


def _tiles(run: Run, sessions: Sequence[Session]) -> list[tuple[str, str, str]]:
    """(label, value, note) of the few values that come first."""
    total = run.setting("training.total_images")
    share = ""
    if isinstance(total, int) and total > 0:
        share = f"{run.images_seen / total:.0%} of {total:,}"
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


def _sample_kinds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The kinds of sample grids, each with the series of every run that has it.

    Real images that all runs share are shown once, next to the grids of the first kind.
    """
    series = [read_grids(run.folder, len(runs)) for run in runs]
    kinds: list[dict[str, Any]] = []
    for kind in order_of_kinds(kind for by_kind in series for kind in by_kind):
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
    """The library: 1.9 MB, from 4.8 MB of text."""
    return _compress(get_plotlyjs().encode())


def _compress(content: bytes) -> str:
    """gzip in base64."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _read_resource(name: str) -> str:
    return files("ganscale.report").joinpath(name).read_text(encoding="utf-8")
