"""Compares a run that had faults with the undisturbed one: weights, rows, checkpoints, samples."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.faults.inflicting import newest_whole
from benchmarks.faults.plan import CHECKPOINT, KEEP_LAST, KEPT
from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage, images_seen_of
from ganscale.checkpoints.retention import first_of_multiples

# These depend on the machine and the moment; every stop also makes an audit.
_VARYING = ("perf/", "audit/passed", "eval/seconds")


@dataclass
class Judgement:
    """weight_difference: the largest one, relative to the largest element of its tensor
    where: the name of that tensor
    rows, checkpoints, sample_grids: a sentence for each that is missing, duplicate or different
    """

    weight_difference: float
    where: str
    rows: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    sample_grids: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[str]:
        return self.rows + self.checkpoints + self.sample_grids


def judged(
    run: Path, undisturbed: Path, tolerance: float, full: Sequence[tuple[int, int]]
) -> Judgement:
    """tolerance: of rows, relative, or absolute below 1
    full: ranges of images in which the disk was full: checkpoints and sample grids may be missing
    """
    judgement = Judgement(*largest_difference(last(run), last(undisturbed)))

    def is_excused(images: int) -> bool:
        return any(begin <= images <= end for begin, end in full)

    expected, rows = (rows_by_time(folder) for folder in (undisturbed, run))
    for key in sorted(expected.keys() | rows.keys()):
        is_missing = key not in rows
        if is_missing and key[1] == "samples" and is_excused(key[0]):
            continue
        problem = (
            "is missing" if is_missing else problem_of(rows[key], expected.get(key), tolerance)
        )
        if problem:
            judgement.rows.append(f"the row of {key[1]} at {key[0]:,} images {problem}")

    for images in checkpoints_expected(last_images := newest_whole(undisturbed)):
        folder = run / "checkpoints" / f"images-{images:09d}"
        is_last = images > last_images - KEEP_LAST * CHECKPOINT
        if is_excused(images) and not is_last and not folder.exists():
            continue
        if reason := find_damage(folder):
            judgement.checkpoints.append(f"checkpoint at {images:,} images: {reason}")
    extra = {*map(images_seen_of, checkpoint_folders(run / "checkpoints"))} - {
        *checkpoints_expected(last_images)
    }
    judgement.checkpoints += [f"checkpoint at {images:,} images is kept" for images in extra]

    for grid in sorted((undisturbed / "samples").iterdir()):
        other = run / "samples" / grid.name
        images = grid.stem.rpartition("-")[2]
        if not other.exists() and not (images.isdecimal() and is_excused(int(images))):
            judgement.sample_grids.append(f"{grid.name} is missing")
        elif other.exists() and tolerance == 0 and other.read_bytes() != grid.read_bytes():
            judgement.sample_grids.append(f"{grid.name} differs")
    return judgement


def checkpoints_expected(total_images: int) -> list[int]:
    """The images seen of the checkpoints that are kept to the end."""
    saved = [*range(CHECKPOINT, total_images, CHECKPOINT), total_images]
    kept = first_of_multiples(saved, KEPT) | {*saved[-KEEP_LAST:]}
    return [images for images in saved if images in kept]


def last(run: Path) -> Path:
    return run / "checkpoints" / f"images-{newest_whole(run):09d}"


def largest_difference(checkpoint: Path, expected: Path) -> tuple[float, str]:
    """(the largest difference, relative to the largest element of its tensor; the tensor's name).

    0 for the same bits, infinite if anything is missing.
    """
    if checkpoint.name != expected.name:
        return math.inf, f"the last whole one is {checkpoint.name} instead of {expected.name}"
    worst = (0.0, "nowhere")
    actual, reference = dict(tensors(checkpoint)), dict(tensors(expected))
    if actual.keys() != reference.keys():
        return math.inf, "different names"
    for name, tensor in reference.items():
        if actual[name].numpy().tobytes() == tensor.numpy().tobytes():
            continue
        size = tensor.double().abs().max().item()
        difference = (actual[name].double() - tensor.double()).abs().max().item()
        worst = max(worst, (difference / size if size else math.inf, name))
    return worst


def tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            yield f"{file.stem}.{name}", tensor


def rows_by_time(run: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The rows by (images seen, "samples", "evaluation" or "figures"); invalid lines are at -1
    images."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = {"progress/images_seen": -1}
        kind = "figures"
        if any(name.startswith("samples/") for name in row):
            kind = "samples"
        elif "eval/failed" in row:
            kind = "evaluation"
        rows.setdefault((row["progress/images_seen"], kind), []).append(row)
    return rows


def problem_of(
    rows: list[dict[str, Any]], expected: list[dict[str, Any]] | None, tolerance: float
) -> str | None:
    """What is wrong with the rows of one time, or None."""
    if expected is None:
        return "is not in the undisturbed run"
    if len(rows) != len(expected):
        return f"occurs {len(rows)} times"
    for row, other in zip(rows, expected, strict=True):
        figures, reference = dict(_figures(row)), dict(_figures(other))
        if figures.keys() != reference.keys():
            names = ", ".join(sorted(figures.keys() ^ reference.keys()))
            return f"has different names: {names}"
        for name, figure in figures.items():
            if not _is_same(figure, reference[name], tolerance):
                return f"has {name} = {figure!r} instead of {reference[name]!r}"
    return None


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; a histogram is several."""
    for name, value in row.items():
        if name.startswith(_VARYING):
            continue
        if isinstance(value, dict):
            for key, numbers in value.items():
                yield from ((f"{name} {key} {i}", number) for i, number in enumerate(numbers))
        else:
            yield name, value


def _is_same(figure: Any, other: Any, tolerance: float) -> bool:
    if isinstance(figure, str) or isinstance(other, str):
        return figure == other
    return math.isclose(figure, other, rel_tol=tolerance, abs_tol=tolerance)
