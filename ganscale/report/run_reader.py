"""Reads run folders, complete or not, for the report.

A run may be in progress, killed, from an older version, or copied without half of its files. The
page names what is missing; only a folder without any run is a user's mistake.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ganscale.errors import UserError
from ganscale.evaluation.figures import IDENTITY
from ganscale.run_folder import RunFolder
from ganscale.secrets import without_secrets, yaml_without_secrets
from ganscale.tracking.record import IMAGES_SEEN, parse_row

_AXES = (IMAGES_SEEN, "progress/step")
_PERCENTS = (5, 50, 95)  # of a histogram, to draw it as curves
# Aliases can make a short YAML file endless.
_MAX_SETTINGS, _MAX_DEPTH = 10_000, 30


@dataclass
class Curve:
    """One metric of a run over time: x in images seen (int64, increasing), y (float64), both of
    shape (rows,); y may hold NaN and infinity."""

    x: np.ndarray
    y: np.ndarray

    @property
    def last(self) -> float:
        """The value that was logged last."""
        return float(self.y[-1])


@dataclass
class Metrics:
    """The content of `metrics.jsonl`."""

    curves: dict[str, Curve] = field(default_factory=dict)
    rows: int = 0
    damaged_lines: int = 0
    has_half_line: bool = False  # the last one: the run is writing, or was killed while it did
    images_seen: int = 0
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By images seen: what the figures of an evaluation there depend on."""


@dataclass
class Run:
    """The content of a run folder. `config` and `summary` are empty if missing or damaged.
    `config_text` and `summary` are without passwords and signatures."""

    name: str
    folder: RunFolder
    metrics: Metrics
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]

    @property
    def images_seen(self) -> int:
        """The most that the rows or the summary show."""
        at_end = self.summary.get("images_seen", 0)
        return max(self.metrics.images_seen, at_end if isinstance(at_end, int) else 0)

    @property
    def has_ended(self) -> bool:
        """Whether the summary is from after the last row, not from an earlier session."""
        return bool(self.summary) and self.summary.get("images_seen") == self.images_seen

    def summary_entries(self, key: str) -> list[dict[str, Any]]:
        """The dicts in one of the summary's lists."""
        entries = self.summary.get(key)
        return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []

    def setting(self, key: str) -> Any:
        """A setting by its dotted key, None if the config lacks it."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in the order given, with distinct names.

    Raises UserError for a folder that does not exist, is not a run folder, is given twice, or holds
    links to elsewhere.
    """
    resolved = [folder.resolve() for folder in folders]
    for position, folder in enumerate(folders):
        if resolved[position] in resolved[:position]:
            raise UserError(f"{folder} is given twice: name each run once")
    names = _names(resolved)
    return [_read_run(RunFolder(path), name) for path, name in zip(folders, names, strict=True)]


def _read_run(folder: RunFolder, name: str) -> Run:
    try:
        folder.check_has_no_links_outside()
        metrics = read_metrics(folder.record)
        if not metrics.rows:  # a copied record alone makes a page, too
            folder.check_exists()
        config_text = ""
        if folder.config.is_file():
            config_text = folder.config.read_text(encoding="utf-8", errors="replace")
        config, shown = _config(config_text), yaml_without_secrets(config_text)
        return Run(name, folder, metrics, config, shown, without_secrets(folder.read_summary()))
    except OSError as error:
        raise UserError(f"the run folder {folder.path} cannot be read: {error}") from error


def read_metrics(path: Path) -> Metrics:
    """The numbers of a record by name; damaged lines are skipped and counted.

    Each curve is sorted by images seen; of two values at the same images, the later one counts.
    """
    metrics = Metrics()
    columns: dict[str, tuple[array, array]] = defaultdict(lambda: (array("q"), array("d")))
    if not path.is_file():
        return metrics
    with path.open("rb") as file:
        for line in file:
            row = parse_row(line)
            if row is None and line.endswith(b"\n"):
                metrics.damaged_lines += 1
            elif row is None:
                metrics.has_half_line = True
            else:
                metrics.rows += 1
                images_seen = row[IMAGES_SEEN]
                metrics.images_seen = max(metrics.images_seen, images_seen)
                if IDENTITY in row:
                    parts = {k: v for k, v in row.items() if k.startswith("eval/")}
                    metrics.evaluations[images_seen] = parts
                for name, value in _numbers(row):
                    xs, ys = columns[name]
                    xs.append(images_seen)
                    ys.append(value)
    metrics.curves = {name: _curve(*column) for name, column in columns.items()}
    return metrics


def flattened(config: dict[str, Any]) -> dict[str, str]:
    """The settings by dotted key, as text without passwords and signatures."""
    return dict(islice(_settings(config, ""), _MAX_SETTINGS))


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name in _AXES:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                yield name, float(value)
            except OverflowError:  # JSON's integers have no limit
                yield name, math.inf if value > 0 else -math.inf
        elif isinstance(value, dict):
            yield from _percentiles(name, value)


def _percentiles(name: str, histogram: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """`NAME_p05` and so on of a histogram, with its counts spread evenly between edges."""
    try:
        columns = (histogram.get("counts"), histogram.get("edges"))
        counts, edges = (np.array(column, dtype=np.float64) for column in columns)
    except (TypeError, ValueError, OverflowError):
        return
    is_histogram = counts.ndim == 1 and counts.size > 0 and edges.shape == (counts.size + 1,)
    if not is_histogram or not counts.min() >= 0 or not 0 < counts.sum() < math.inf:
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


def _config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _settings(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    if depth == _MAX_DEPTH:  # an alias may refer back to itself
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
    """The shortest ends of the paths that distinguish the folders."""
    candidates = (["/".join(folder.parts[-n:]) for folder in folders] for n in count(1))
    return next(names for names in candidates if len(set(names)) == len(names))
