"""The report as one HTML page that needs nothing else: no network, no other file.

What a run folder holds is text from elsewhere. Jinja escapes all of it; curves travel as compressed
JSON; and the page's content security policy lets the browser run this page's own scripts only, and
load nothing.
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
    NOTHING,
    differing_settings,
    final_figures,
    in_figures,
    objective_of,
)
from ganscale.report.curves import (
    COLOURS,
    all_names,
    drawable,
    layout_of,
    most_points,
    title_of_section,
    trained_by,
)
from ganscale.report.faults import Log, faults_of, read_log, standing
from ganscale.report.run_reader import Run
from ganscale.report.samples import Strip, order_of_kinds, read_strips, title_of_kind
from ganscale.report.sessions import Session, sessions_of


def render(runs: Sequence[Run], now: datetime) -> str:
    """The page of one run, or of several in comparison. `now`: the moment that it names."""
    logs = [read_log(run.folder / "log.txt") for run in runs]
    sections, is_thinned = _sections(runs)
    kinds = _kinds(runs)
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
        style=_part("style.css"),
        script=_part("page.js"),
        plotly=_plotly(),
        data=_packed(_json({"runs": _run_data(runs, logs), "sections": sections})),
        runs=[_run_view(run, log) for run, log in zip(runs, logs, strict=True)],
        colours=COLOURS,
        nothing=NOTHING,
        sections=sections,
        is_thinned=is_thinned,
        most_points=most_points(len(runs)),
        figures=final_figures(runs),
        differences=differing_settings(runs) if len(runs) > 1 else [],
        kinds=kinds,
        times=_times(kinds),
    )


def _sections(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], bool]:
    """Every section's charts with their lines, as page.js draws them, and whether any line has
    fewer points than its record."""
    most, is_thinned = most_points(len(runs)), False
    sections = []
    layout = layout_of(all_names(runs), overlays_runs=len(runs) > 1)
    for section, charts in layout.items():
        title, description = title_of_section(section)
        drawn = []
        for chart in charts:
            lines = []
            for name, label in chart.lines:
                for number, run in enumerate(runs):
                    if (curve := run.metrics.curves.get(name)) is not None:
                        line = drawable(curve, most)
                        is_thinned = is_thinned or "mean_x" in line
                        final = in_figures(curve.last)
                        lines.append(
                            {"name": name, "label": label, "run": number, "last": final, **line}
                        )
            names = " · ".join(name for name, _ in chart.lines)
            drawn.append(
                {
                    "title": chart.title,
                    "names": names,
                    "unit": chart.unit,
                    "colours": chart.colours,
                    "trained_by": trained_by(chart, runs),
                    "lines": lines,
                }
            )
        sections.append({"title": title, "description": description, "charts": drawn})
    return sections, is_thinned


def _run_data(runs: Sequence[Run], logs: Sequence[Log]) -> list[dict[str, Any]]:
    return [
        {"name": run.name, "restarts": _restarts(sessions_of(run, log))}
        for run, log in zip(runs, logs, strict=True)
    ]


def _restarts(sessions: Sequence[Session]) -> list[int]:
    """Where curves may have a kink, in images."""
    return [start for start in dict.fromkeys(s.images_seen for s in sessions) if start > 0]


def _run_view(run: Run, log: Log) -> dict[str, Any]:
    """What the template says of one run."""
    state, level = standing(run)
    faults = faults_of(run, log)
    return {
        "name": run.name,
        "objective": objective_of(run),
        "state": state,
        "level": level,
        "faults": faults,
        "serious": sum(fault.level != "note" for fault in faults),
        "sessions": sessions_of(run, log),
        "config": run.config_text,
        "summary": json.dumps(run.summary, indent=1, ensure_ascii=False) if run.summary else "",
        "tiles": _tiles(run, log),
    }


def _tiles(run: Run, log: Log) -> list[tuple[str, str, str]]:
    """(label, figure, note) of the few figures that come first."""
    total = run.setting("training.total_images")
    share = ""
    if isinstance(total, int) and total > 0:
        share = f"{run.images_seen / total:.0%} of {total:,}"
    sessions = sessions_of(run, log)
    ranks = list(dict.fromkeys(session.ranks for session in sessions if session.ranks))
    on = f"on {', '.join(ranks)} rank{'s' if ranks != ['1'] else ''}" if ranks else ""
    return [
        ("images seen", f"{run.images_seen:,}", share),
        ("images/s", *_speed(run)),
        ("training time", _duration(run.summary.get("training_seconds")), ""),
        ("sessions", f"{len(sessions):,}", on),
    ]


def _speed(run: Run) -> tuple[str, str]:
    told = run.summary.get("images_per_second")
    if run.has_ended and isinstance(told, int | float):
        return f"{told:,.0f}", "mean of all sessions"
    curve = run.metrics.curves.get("perf/images_per_second")
    return (NOTHING, "") if curve is None else (f"{curve.last:,.0f}", "at the last row")


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e10:
        return NOTHING
    minutes, hours = round(seconds / 60), round(seconds / 360) / 10
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{minutes:,} min" if minutes < 120 else f"{hours:,.1f} h"


def _kinds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The kinds of pictures, each with the strips of the runs that have it.

    A picture without time that all runs share, such as the real images', is shown once, beside
    those of the first kind.
    """
    strips: list[dict[str, Strip]] = [
        read_strips(run.folder / "samples", len(runs)) for run in runs
    ]
    kinds: list[dict[str, Any]] = []
    for kind in order_of_kinds(kind for own in strips for kind in own):
        panels = [
            {"run": number, "name": runs[number].name, "strip": own[kind]}
            for number, own in enumerate(strips)
            if kind in own and own[kind].frames
        ]
        frames = {frame for panel in panels for frame in panel["strip"].frames}
        is_shared = len(frames) == 1 < len(panels) and frames.pop().images_seen is None
        if is_shared and kinds:
            shared = {"run": None, "name": title_of_kind(kind), "strip": panels[0]["strip"]}
            kinds[0]["panels"].append(shared)
        elif panels:
            kinds.append({"title": title_of_kind(kind), "panels": panels})
    return kinds


def _times(kinds: list[dict[str, Any]]) -> list[int]:
    """Where the samples' slider stops: wherever any picture is from."""
    panels = [panel for kind in kinds for panel in kind["panels"]]
    times = {frame.images_seen for panel in panels for frame in panel["strip"].frames}
    return sorted(time for time in times if time is not None)


@cache
def _plotly() -> str:
    """The library, packed: 1.9 MB, of 4.8 MB of text."""
    return _packed(get_plotlyjs().encode())


def _packed(content: bytes) -> str:
    """Compressed, in base64."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _part(name: str) -> str:
    return files("ganscale.report").joinpath(name).read_text(encoding="utf-8")
