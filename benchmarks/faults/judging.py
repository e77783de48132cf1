"""A run that had faults beside the same run without: weights, rows, checkpoints, pictures."""

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

# What tells about the machine and the moment; an audit is made at every stop, too.
_OF_THE_MOMENT = ("perf/", "audit/passed")


@dataclass
class Judgement:
    """weight_difference: the largest of a tensor, relative to its largest element
    where: it is
    rows, checkpoints, pictures: that are missing, twice, or others; what is wrong with each
    """

    weight_difference: float
    where: str
    rows: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[str]:
        return self.rows + self.checkpoints + self.pictures


def judged(
    run: Path, undisturbed: Path, tolerance: float, full: Sequence[tuple[int, int]]
) -> Judgement:
    """tolerance: of rows, relative, or absolute below 1

    full: while the disk was full, checkpoints and pictures are given up, which the log says
    """
    judgement = Judgement(*largest_difference(last(run), last(undisturbed)))

    def is_excused(images: int) -> bool:
        return any(begin <= images <= end for begin, end in full)

    expected, found = (rows_by_time(each) for each in (undisturbed, run))
    for key in sorted(expected.keys() | found.keys()):
        is_missing = key not in found
        if is_missing and key[1] == "samples" and is_excused(key[0]):
            continue
        problem = (
            "is missing" if is_missing else problem_of(found[key], expected.get(key), tolerance)
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

    for picture in sorted((undisturbed / "samples").iterdir()):
        other = run / "samples" / picture.name
        images = picture.stem.rpartition("-")[2]
        if not other.exists() and not (images.isdecimal() and is_excused(int(images))):
            judgement.pictures.append(f"{picture.name} is missing")
        elif other.exists() and tolerance == 0 and other.read_bytes() != picture.read_bytes():
            judgement.pictures.append(f"{picture.name} shows something else")
    return judgement


def checkpoints_expected(total_images: int) -> list[int]:
    """The images seen of those that stay to the end."""
    saved = [*range(CHECKPOINT, total_images, CHECKPOINT), total_images]
    return [images for images in saved if images % KEPT == 0 or images in saved[-KEEP_LAST:]]


def last(run: Path) -> Path:
    return run / "checkpoints" / f"images-{newest_whole(run):09d}"


def largest_difference(checkpoint: Path, expected: Path) -> tuple[float, str]:
    """(of all tensors, relative to the largest element of each; where it is).

    0 is for the same bits; infinite where something is missing.
    """
    if checkpoint.name != expected.name:
        return math.inf, f"the last whole one is {checkpoint.name} instead of {expected.name}"
    worst = (0.0, "nowhere")
    found, wanted = dict(tensors(checkpoint)), dict(tensors(expected))
    if found.keys() != wanted.keys():
        return math.inf, "other names"
    for name, tensor in wanted.items():
        if found[name].numpy().tobytes() == tensor.numpy().tobytes():
            continue
        size = tensor.double().abs().max().item()
        difference = (found[name].double() - tensor.double()).abs().max().item()
        worst = max(worst, (difference / size if size else math.inf, name))
    return worst


def tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            yield f"{file.stem}.{name}", tensor


def rows_by_time(run: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The rows by (images seen, what they are of); a line that is no row is one at -1 images."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = {"progress/images_seen": -1}
        kind = "samples" if any(name.startswith("samples/") for name in row) else "figures"
        rows.setdefault((row["progress/images_seen"], kind), []).append(row)
    return rows


def problem_of(
    found: list[dict[str, Any]], expected: list[dict[str, Any]] | None, tolerance: float
) -> str | None:
    """What is wrong with the rows that were found of one time, None for nothing."""
    if expected is None:
        return "is none of the undisturbed run's"
    if len(found) != len(expected):
        return f"is there {len(found)} times"
    for row, other in zip(found, expected, strict=True):
        mine, theirs = dict(_figures(row)), dict(_figures(other))
        if mine.keys() != theirs.keys():
            return f"has other names: {', '.join(sorted(mine.keys() ^ theirs.keys()))}"
        for name, figure in mine.items():
            if not _is_same(figure, theirs[name], tolerance):
                return f"has {name} = {figure!r} instead of {theirs[name]!r}"
    return None


def _figures(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """By name, a histogram as its figures."""
    for name, value in row.items():
        if name.startswith(_OF_THE_MOMENT):
            continue
        if isinstance(value, dict):
            for part, numbers in value.items():
                yield from ((f"{name} {part} {i}", each) for i, each in enumerate(numbers))
        else:
            yield name, value


def _is_same(figure: Any, other: Any, tolerance: float) -> bool:
    if isinstance(figure, str) or isinstance(other, str):
        return figure == other
    return math.isclose(figure, other, rel_tol=tolerance, abs_tol=tolerance)
