"""Curves for a page: grouped into charts, with few enough points to draw."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganscale.evaluation.figures import is_figure, title_of
from ganscale.report.run_reader import Curve, Run

COLOURS = 6
"""The number of line colours in style.css."""

_MINUS = "\N{MINUS SIGN}"
# Of one curve. A card is some 500 pixels wide, and a bucket of rows gives two points.
_MOST_POINTS = 2000
_FEWEST_POINTS = 400
_MARKS_SHOWN = 50  # of the non-finite values of one curve

_PANEL = (
    "Every loss on the same logits, whichever one the run trains: these can be compared between "
    "runs with different objectives."
)
_SECTIONS = {
    "eval": (
        "Sample quality",
        "Generated images against the reference. Lower is better for Fréchet and kernel distances "
        "and KL; higher for precision, recall, density, coverage, Inception Score and modes.",
    ),
    "collapse": (
        "Diversity",
        "Distances among generated images divided by those among real ones: 1 is as diverse as "
        "the data; near 0 for long means that the generator has collapsed.",
    ),
    "panel": ("Panel", _PANEL),
    "panel/critic": ("Panel: critic", _PANEL),
    "panel/generator": ("Panel: generator", _PANEL),
    "loss": ("Loss", "The trained loss and its terms; comparable within one objective."),
    "logits": ("Logits", "The critic's raw scores of real and generated images."),
    "penalty": ("Penalties", "Gradient penalties and the gradient norms they use."),
    "input_gradient_norm": (
        "Input gradient norm",
        "The norm of the critic's gradient at real images, for runs without a penalty on it.",
    ),
    "augment": (
        "Augmentation",
        "The probability of augmentation, and the sign rate of real logits that it follows.",
    ),
    "clip": ("Clipping", "Weight clipping."),
    "optim": ("Optimization", "Gradients, weights, learning rates, betas, EMA."),
    "perf": ("Speed", "Throughput, and the time of each part of a cycle."),
    "data": ("Data", "Bad samples, and the state of the data."),
    "audit": ("Audits", "Comparisons of the ranks' replicas, and stops on NaN or infinity."),
}
"""Known sections in the order of the page: (title, description). Others follow by name."""

# In a report of one run, these metrics share a chart: (row name, title, label of the bare name).
_TOGETHER = (
    (r"loss/(?:critic(?:_(?P<label>.+))?|(?P<also>penalty_.+))", "critic, with its terms", "sum"),
    (r"loss/generator(?:_(?P<label>.+))?", "generator, with its terms", "sum"),
    (r"perf/(?P<label>.+)_ms", "time of a cycle", ""),
    (r"logits/(?P<label>.+)_histogram_(?P<also>p\d\d)", "distribution: 5, 50, 95 %", ""),
)
# So do the values of both networks, of real and fake images, and the statistics of one metric.
_ROLES = (("critic", "generator"), ("real", "fake"))
_STATISTICS = ("min", "mean", "max", "std")
_PERCENTILES = ("p50", "p05", "p95")
_ORDER = ("sum", "cycle", "critic", "generator", "real", "fake", *_STATISTICS)

_UNITS = (
    (r"images_per_second", "images/s"),
    (r"_ms(_|$)", "ms"),
    (r"_gib(_|$)", "GiB"),
    (r"[_/](share|fraction)(_max)?$", "share"),
)


@dataclass(frozen=True)
class Chart:
    """One pair of axes, with (row name, label) of each line, for every run that has it.

    colours: how many the lines use; later lines repeat them dashed, then dotted
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    colours: int = COLOURS


def layout_of(names: Iterable[str], *, overlays_runs: bool) -> dict[str, list[Chart]]:
    """Charts by section, in the order of the page.

    overlays_runs: lines are runs, so a chart shows one metric; otherwise related metrics (critic
    and generator, real and fake, minimum, mean and maximum) share a chart.
    """
    by_section: dict[str, list[str]] = {}
    for name in sorted(filter(_is_drawn, set(names)), key=lambda name: (title_of(name), name)):
        by_section.setdefault(_section(name, overlays_runs), []).append(name)
    make = _single_charts if overlays_runs else _shared_charts
    ordered = known_first(by_section, _SECTIONS)
    return {section: make(section, by_section[section]) for section in ordered}


def known_first(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Each of `names` once: the known ones in their order, then others, then ""."""
    rank = {name: number for number, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name == "", name))


def title_of_section(section: str) -> tuple[str, str]:
    """(title, description) for a heading; an unknown section has its name as the title."""
    return _SECTIONS.get(section, (section.replace("_", " ").capitalize() or "Other", ""))


def unit_of(name: str) -> str:
    """The unit that a row's name ends with, or ""."""
    return next((unit for pattern, unit in _UNITS if re.search(pattern, name)), "")


def most_points(runs: int) -> int:
    """The most points of one curve on a page of `runs` runs."""
    return max(_FEWEST_POINTS, _MOST_POINTS // runs)


def drawable(curve: Curve, most: int) -> dict[str, Any]:
    """A curve for JSON: `x`, `y` (None breaks the line at a non-finite value), `rows`, and
    `nonfinite`, its first non-finite values as [x, text].

    With more than `most` rows, each of `most / 2` stretches of equal length keeps its minimum and
    its maximum at their positions, so no spike is lost; `mean_x` and `mean_y` are the stretches'
    means, from which the smoothed line is drawn.
    """
    is_finite = np.isfinite(curve.y)
    nonfinite = np.flatnonzero(~is_finite)
    shown = [(int(curve.x[i]), format_number(curve.y.item(i))) for i in nonfinite[:_MARKS_SHOWN]]
    line = {"rows": len(curve.x), "nonfinite": shown, "nonfinite_rows": len(nonfinite)}
    if len(curve.x) <= most:
        return {**line, "x": curve.x.tolist(), "y": _numbers(curve.y)}
    kept, mean_x, mean_y = [0, len(curve.x) - 1], [], []
    for stretch in np.array_split(np.arange(len(curve.x)), max(1, most // 2 - 1)):
        finite = stretch[is_finite[stretch]]
        if len(finite) < len(stretch):
            kept.append(int(stretch[~is_finite[stretch]][0]))
        if len(finite):
            values = curve.y[finite]
            kept += [int(finite[values.argmin()]), int(finite[values.argmax()])]
            mean_x.append(int(curve.x[finite].mean()))
            mean_y.append(float(f"{values.mean():.6g}"))  # enough to draw
    rows = np.unique(kept)
    drawn = {"x": curve.x[rows].tolist(), "y": _numbers(curve.y[rows])}
    return {**line, **drawn, "mean_x": mean_x, "mean_y": mean_y}


def late_mean(curve: Curve) -> float:
    """The mean of the finite values in the last tenth of a curve's images; NaN without any."""
    late = curve.y[curve.x >= curve.x[0] + 0.9 * (curve.x[-1] - curve.x[0])]
    late = late[np.isfinite(late)]
    return float(late.mean()) if len(late) else math.nan


def all_names(runs: Sequence[Run]) -> list[str]:
    """The row names of all runs."""
    return [name for run in runs for name in run.metrics.curves]


def trained_by(chart: Chart, runs: Sequence[Run]) -> list[int]:
    """The numbers of the runs that train the loss shown in a chart of the panel."""
    name = chart.lines[0][0]
    if not name.startswith("panel/"):
        return []
    trained = [run.setting("objective.loss.name") for run in runs]
    return [number for number, loss in enumerate(trained) if loss == name.rpartition("/")[2]]


def _section(name: str, overlays_runs: bool) -> str:
    if overlays_runs and (match := re.match(r"panel/[^/]*(?=/)", name)) is not None:
        return match[0]
    return name.rpartition("/")[0].partition("/")[0]


def _is_drawn(name: str) -> bool:
    """Of an evaluation, only the figures: what they depend on is said once."""
    return not name.startswith("eval/") or bool(title_of(name))


def _single_charts(section: str, names: list[str]) -> list[Chart]:
    # Without the percentiles of histograms: their means and deviations are shown.
    return [
        Chart(_title(section, name), unit_of(name), ((name, ""),))
        for name in names
        if not re.search(r"_histogram_p\d\d$", name)
    ]


def _shared_charts(section: str, names: list[str]) -> list[Chart]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        title, label = _shared(section, name, set(names))
        groups.setdefault(title, []).append((name, label))
    charts = []
    for title, lines in groups.items():
        lines.sort(key=lambda line: _order(line[1]))
        # The percentiles of a distribution share its colour; the median's line is solid.
        is_paired = len(lines) == 2 * len(_PERCENTILES) and lines[0][1].endswith(_PERCENTILES[0])
        colours = 2 if is_paired else COLOURS
        charts.append(Chart(title, unit_of(lines[0][0]), tuple(lines), colours))
    return charts


def _shared(section: str, name: str, names: set[str]) -> tuple[str, str]:
    """(the title of the chart that shows a metric, its label there)."""
    if title := title_of(name):
        has_deviation = sum(title_of(other) == title for other in names) > 1
        return title, ("mean" if is_figure(name) else "std") if has_deviation else ""
    for pattern, title, bare_label in _TOGETHER:
        if (match := re.fullmatch(pattern, name)) is not None:
            labels = [label for label in match.groupdict().values() if label]
            return title, " ".join(labels).replace("_", " ") or bare_label
    words = re.split(r"([/_])", name)
    for roles in _ROLES:
        for i, word in enumerate(words):
            siblings = {"".join([*words[:i], role, *words[i + 1 :]]) for role in roles}
            if word in roles and siblings <= names:
                shared = "".join([*words[:i], *words[i + 2 :]]).rstrip("_/")
                return _title(section, shared), word
    stem, _, statistic = name.rpartition("_")
    for base, label in ((stem, statistic), (name, "mean")):
        siblings = {base, *(f"{base}_{statistic}" for statistic in _STATISTICS)}
        if label in _STATISTICS and len(siblings & names) > 1:
            return _title(section, base), label
    return _title(section, name), ""


def _order(label: str) -> tuple[int, int]:
    kind, _, percentile = label.rpartition(" ")
    if percentile in _PERCENTILES:
        return _PERCENTILES.index(percentile), _ORDER.index(kind) if kind in _ORDER else -1
    return _ORDER.index(label) if label in _ORDER else len(_ORDER), 0


def _title(section: str, name: str) -> str:
    if title := title_of(name):
        return title if is_figure(name) else f"{title}, standard deviation"
    if section and name.startswith(f"{section}/"):
        name = name.removeprefix(f"{section}/")
    elif name == section:
        return title_of_section(section)[0].lower()
    words = name.replace("_", " ").replace("/", " / ")
    return re.sub(r" (ms|gib|share)$", "", words)  # the unit is shown next to the title


def _numbers(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def format_number(value: float) -> str:
    """A number with four significant digits, for tables."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{_MINUS}∞"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    else:
        text = f"{value:.3e}"
    return text.replace("-", _MINUS)
