"""A run folder as a report sees it: whatever stands there, whole or not.

A run may be in progress, killed, from an older version, or copied without half of its files. What
is missing is told on the page; only a folder that holds no run at all is a mistake.
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ganscale.errors import UserError
from ganscale.secrets import without_secrets
from ganscale.tracking.record import IMAGES_SEEN

_AXES = (IMAGES_SEEN, "progress/step")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_PERCENTS = (5, 50, 95)  # of a histogram, to draw it as curves
_MAX_IMAGES = 2**53  # beyond it, neither JavaScript nor a float counts by ones
# Aliases can make a short YAML file endless.
_MAX_SETTINGS, _MAX_DEPTH = 10_000, 30


@dataclass
class Curve:
    """One figure of a run over time: x in images seen (int64, increasing), y (float64), both of
    shape (rows,); y may hold NaN and infinity."""

    x: np.ndarray
    y: np.ndarray

    @property
    def last(self) -> float:
        """The figure that was logged last."""
        return float(self.y[-1])


@dataclass
class Metrics:
    """What `metrics.jsonl` holds."""

    curves: dict[str, Curve] = field(default_factory=dict)
    rows: int = 0
    damaged_lines: int = 0
    has_half_line: bool = False  # at its end: a run that is writing, or was killed while it did
    images_seen: int = 0


@dataclass
class Run:
    """A run folder. `config` and `summary` are empty where there is none, or a damaged one.
    `config_text` and `summary` are without passwords and signatures."""

    name: str
    folder: Path
    metrics: Metrics
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]

    @property
    def images_seen(self) -> int:
        """As far as anything in the folder tells."""
        told = self.summary.get("images_seen", 0)
        return max(self.metrics.images_seen, told if isinstance(told, int) else 0)

    @property
    def has_ended(self) -> bool:
        """Whether the summary is of the end that the rows have, not of an earlier session's."""
        return bool(self.summary) and self.summary.get("images_seen") == self.images_seen

    def setting(self, key: str) -> Any:
        """A setting by its dotted key, None where the config lacks it."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in the order given, each with a name of its own.

    Raises UserError for a folder that is not there, holds no run, or is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for position, folder in enumerate(folders):
        if resolved[position] in resolved[:position]:
            raise UserError(f"{folder} is given twice: name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Reads one run folder. Raises UserError where it holds no run."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    try:
        metrics = read_metrics(folder / "metrics.jsonl")
        config_text = _text(folder / "config.yaml")
        if not metrics.rows and not config_text:
            raise UserError(
                f"{folder} holds no run: neither rows in metrics.jsonl nor a config.yaml"
            )
        config, shown = _config(config_text), _settings_text(config_text)
        return Run(name, folder, metrics, config, shown, _summary(folder))
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be read: {error}") from error


def read_metrics(path: Path) -> Metrics:
    """The numbers of a record by name; lines that are damaged are passed over and counted.

    Numbers of one name are put in the order of images; of two at the same images the later counts.
    """
    metrics = Metrics()
    xs: dict[str, array] = {}
    ys: dict[str, array] = {}
    if not path.is_file():
        return metrics
    with path.open("rb") as file:
        for line in file:
            row = _row(line)
            if row is None and line.endswith(b"\n"):
                metrics.damaged_lines += 1
            elif row is None:
                metrics.has_half_line = True
            else:
                metrics.rows += 1
                images_seen = row[IMAGES_SEEN]
                metrics.images_seen = max(metrics.images_seen, images_seen)
                for name, value in _figures(row):
                    if name not in xs:
                        xs[name], ys[name] = array("q"), array("d")
                    xs[name].append(images_seen)
                    ys[name].append(value)
    metrics.curves = {name: _curve(xs[name], ys[name]) for name in xs}
    return metrics


def flattened(config: dict[str, Any]) -> dict[str, str]:
    """The settings by dotted key, as text without passwords and signatures."""
    return dict(islice(_settings(config, ""), _MAX_SETTINGS))


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    images_seen = row.get(IMAGES_SEEN) if isinstance(row, dict) else None
    is_whole = type(images_seen) is int and 0 <= images_seen < _MAX_IMAGES
    return row if is_whole else None


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name in _AXES:
            continue
        if isinstance(value, str):
            value = _NON_FINITE.get(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                yield name, float(value)
            except OverflowError:  # JSON's integers have no end
                yield name, math.inf if value > 0 else -math.inf
        elif isinstance(value, dict):
            yield from _percentiles(name, value)


def _percentiles(name: str, histogram: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """`NAME_p05` and so on of a histogram, as if its counts were spread evenly between edges."""
    try:
        counts = np.array(histogram.get("counts"), dtype=np.float64)
        edges = np.array(histogram.get("edges"), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return
    is_whole = counts.ndim == 1 and counts.size > 0 and edges.shape == (counts.size + 1,)
    if not is_whole or not counts.min() >= 0 or not 0 < counts.sum() < math.inf:
        return
    below = np.concatenate([[0.0], counts.cumsum()]) / counts.sum()
    for percent in _PERCENTS:
        yield f"{name}_p{percent:02}", float(np.interp(percent / 100, below, edges))


def _curve(xs: array, ys: array) -> Curve:
    x, y = np.array(xs, dtype=np.int64), np.array(ys, dtype=np.float64)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    is_last = np.append(x[1:] != x[:-1], True)
    return Curve(x[is_last], y[is_last])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _settings_text(text: str) -> str:
    """A config as it was written, but with secrets taken out of its values."""
    try:
        scalars = [each for each in yaml.scan(text) if isinstance(each, yaml.ScalarToken)]
    except (yaml.YAMLError, ValueError, RecursionError):
        return without_secrets(text)
    for each in reversed(scalars):  # a long one is folded over lines
        if (shown := without_secrets(each.value)) != each.value:
            start, end = each.start_mark.index, each.end_mark.index
            line_end = "\n" if text[start:end].endswith("\n") else ""
            text = text[:start] + json.dumps(shown, ensure_ascii=False) + line_end + text[end:]
    return text


def _config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = without_secrets(json.loads(_text(folder / "summary.json") or "{}"))
    except (ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _settings(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    if depth == _MAX_DEPTH:  # an alias may lead back to itself
        yield key, "..."
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _settings(inner, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for position, inner in enumerate(value):
            yield from _settings(inner, f"{key}[{position}]", depth + 1)
    else:
        yield key, "" if value is None else str(without_secrets(value))


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
