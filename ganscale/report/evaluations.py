"""What a page says about the evaluations of runs: what they depend on, and the best figures."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ganscale.evaluation.figures import IDENTITY, Identity, is_lower_better, title_of
from ganscale.report.curves import all_names, format_number
from ganscale.report.run_reader import Run
from ganscale.secrets import without_secrets

_SHOWN = 200  # characters of one value
_PARTS = [field.name for field in fields(Identity) if field.name != "truncation"]  # runs have none


def dependences(runs: Sequence[Run]) -> list[str]:
    """What the figures of each run depend on, once if it is the same for all."""
    texts = {run.name: _text(_newest(run)) for run in runs if run.metrics.evaluations}
    if len({*texts.values()}) < 2:
        return [*texts.values()][:1]
    return [f"{name}: {text}" for name, text in texts.items()]


def incomparable(runs: Sequence[Run]) -> list[str]:
    """Sentences about figures that cannot be compared, within a run or between runs."""
    evaluated = [run for run in runs if run.metrics.evaluations]
    found = []
    for run in evaluated:
        if (since := _since(run)) > min(run.metrics.evaluations):
            before = max(seen for seen in run.metrics.evaluations if seen < since)
            differences = _differences(run.metrics.evaluations[before], _newest(run))
            of_run = f" of {run.name}" if len(runs) > 1 else ""
            found.append(
                f"Figures{of_run} from before {since:,} images cannot be compared with later ones: "
                f"{differences}."
            )
    for run in evaluated[1:]:
        if differences := _differences(_newest(evaluated[0]), _newest(run)):
            found.append(
                f"Figures of {evaluated[0].name} and {run.name} cannot be compared: {differences}."
            )
    return found


def best_figures(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(row name, for each run its best value and where), of what is comparable with the run's
    newest figures."""
    names = [name for name in dict.fromkeys(all_names(runs)) if is_lower_better(name) is not None]
    names.sort(key=title_of)
    return [(name, [_best(name, run) for run in runs]) for name in names]


def _best(name: str, run: Run) -> str:
    curve = run.metrics.curves.get(name)
    if curve is None:
        return ""
    x, y = curve.x[curve.x >= _since(run)], curve.y[curve.x >= _since(run)]
    x, y = x[y == y], y[y == y]  # without NaN
    if not len(y):
        return ""
    at = y.argmin() if is_lower_better(name) else y.argmax()
    return f"{format_number(y.item(at))} at {x.item(at):,} images"


def _newest(run: Run) -> dict[str, Any]:
    return run.metrics.evaluations[max(run.metrics.evaluations)]


def _since(run: Run) -> int:
    """The images seen at the first evaluation whose figures compare with the newest."""
    since = 0
    for seen in sorted(run.metrics.evaluations, reverse=True):
        if _differences(run.metrics.evaluations[seen], _newest(run)):
            break
        since = seen
    return since


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Such as "samples: 300, 5000"; "" if all that figures depend on is the same."""
    return "; ".join(
        f"{part.replace('_', ' ')}: {_value(one, part)}, {_value(other, part)}"
        for part in _PARTS
        if one.get(f"eval/{part}") != other.get(f"eval/{part}")
    )


def _text(row: dict[str, Any]) -> str:
    part = {name: _value(row, name) for name in _PARTS}
    return (
        f"Network {part['network']} (sha256 {part['checksum'][:16]}), {part['resize']}; "
        f"reference {part['reference']}, {part['reference_images']} images; {part['samples']} "
        f"samples; identity {without_secrets(str(row.get(IDENTITY)))[:_SHOWN]}"
    )


def _value(row: dict[str, Any], part: str) -> str:
    value = row.get(f"eval/{part}", "unknown")
    return f"{value:,}" if isinstance(value, int) else without_secrets(str(value))[:_SHOWN]
