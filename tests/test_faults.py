"""A small fault campaign, and what campaigns say of a run that has lost something."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.faults.__main__ import measure
from benchmarks.faults.campaign import WORLDS
from benchmarks.faults.judging import Judgement, judged
from benchmarks.faults.plan import CHECKPOINT, KEPT, KINDS, ROW, planned
from tests.checkpoints.helpers import save_checkpoint

TOTAL = KEPT + 3 * CHECKPOINT
STAYING = (KEPT, KEPT + CHECKPOINT, KEPT + 2 * CHECKPOINT, TOTAL)


def test_three_faults_are_survived_with_the_same_bits() -> None:
    rows, wrong = measure(3, seed=1, worlds=WORLDS[:1])
    assert wrong == []
    figures = {row.name: row.ratio for row in rows}
    assert figures["faults"] == figures["survived"] == 3
    assert figures["rows_lost"] == figures["checkpoints_lost"] == figures["pictures_lost"] == 0
    assert figures["largest_weight_difference"] == 0
    # A checkpoint is always in sight: one interval at a fault, and one that was being written.
    assert figures["images_lost"] < 3 * 2 * CHECKPOINT


def test_a_plan_follows_from_its_seed_and_has_as_much_of_each_kind() -> None:
    worlds = [world.ranks for world in WORLDS]
    plans = planned(50, 1, worlds)
    assert plans == planned(50, 1, worlds) != planned(50, 2, worlds)
    assert [len(plan) for plan in plans] == [25, 25]
    assert {fault.ranks for fault in plans[0]} == {2}
    assert {fault.ranks for fault in plans[1]} == {1, 2}
    found = Counter(fault.kind for plan in plans for fault in plan)
    assert set(found) == set(KINDS)
    assert max(found.values()) - min(found.values()) <= 1


def write_run(folder: Path) -> Path:
    """What a run in peace leaves that judges look at."""
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / f"images-{KEPT:09d}.png").write_bytes(b"picture")
    for images in STAYING:
        weights = {"weight": torch.full((3,), float(images))}
        save_checkpoint(folder / "checkpoints", images, {"critic": weights}, {})
    rows = [
        {"loss/critic": 0.5 * images, "perf/tflops": 1.0, "logits/real_histogram": {"counts": [1]},
         "progress/images_seen": images}
        for images in range(ROW, TOTAL + 1, ROW)
    ]  # fmt: skip
    rows.append({"samples/ema": "samples/images.png", "progress/images_seen": KEPT})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """(the same as the other, that in peace)"""
    undisturbed = write_run(tmp_path / "undisturbed")
    return shutil.copytree(undisturbed, tmp_path / "run"), undisturbed


def change_rows(run: Path, change: Callable[[list[str]], object]) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    change(lines)
    file.write_text("".join(line + "\n" for line in lines))


def judgement_of(runs: tuple[Path, Path], *full: tuple[int, int]) -> Judgement:
    return judged(*runs, tolerance=1e-12, full=full)


def test_the_same_run_has_lost_nothing(runs: tuple[Path, Path]) -> None:
    def other_speed(lines: list[str]) -> None:
        lines[2] = lines[2].replace('"perf/tflops": 1.0', '"perf/tflops": 2.0')

    change_rows(runs[0], other_speed)
    judgement = judgement_of(runs)
    assert (judgement.weight_difference, judgement.losses) == (0.0, [])


def test_rows_that_are_missing_twice_torn_or_others_are_lost(runs: tuple[Path, Path]) -> None:
    def change(lines: list[str]) -> None:
        other = json.loads(lines[3])
        lines[3] = json.dumps({**other, "loss/critic": other["loss/critic"] * (1 + 1e-9)})
        lines[4] = lines[4].replace("[1]", "[2]")
        lines.append(lines[0])
        lines.append(lines[1][:20])
        del lines[5]

    change_rows(runs[0], change)
    rows = sorted(judgement_of(runs).rows)
    assert [row.partition(" images ")[2].partition(" = ")[0] for row in rows] == [
        "is none of the undisturbed run's",
        "has loss/critic",
        "has logits/real_histogram counts 0",
        "is missing",
        "is there 2 times",
    ]
    assert f"at {6 * ROW:,} images is missing" in rows[3]


def test_a_row_of_pictures_may_be_missing_while_the_disk_was_full(runs: tuple[Path, Path]) -> None:
    change_rows(runs[0], lambda lines: lines.pop())
    (runs[0] / "samples" / f"images-{KEPT:09d}.png").unlink()
    assert len(judgement_of(runs).rows) == len(judgement_of(runs).pictures) == 1
    assert judgement_of(runs, (KEPT - ROW, KEPT + ROW)).losses == []


def test_checkpoints_that_are_missing_damaged_or_too_many_are_lost(
    runs: tuple[Path, Path],
) -> None:
    checkpoints = runs[0] / "checkpoints"
    shutil.copytree(checkpoints / f"images-{KEPT:09d}", checkpoints / "images-000000007")
    shutil.rmtree(checkpoints / f"images-{KEPT:09d}")
    file = checkpoints / f"images-{KEPT + CHECKPOINT:09d}" / "critic.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    gone, cut, extra = judgement_of(runs).checkpoints
    assert gone.startswith(f"checkpoint at {KEPT:,} images: FileNotFoundError")
    assert cut == f"checkpoint at {KEPT + CHECKPOINT:,} images: critic.safetensors is not as it " \
        "was written"  # fmt: skip
    assert extra == "checkpoint at 7 images is kept"
    assert len(judgement_of(runs, (KEPT, KEPT)).checkpoints) == 2


def test_other_weights_are_told_by_how_much_and_where(runs: tuple[Path, Path]) -> None:
    shutil.rmtree(runs[0] / "checkpoints" / f"images-{TOTAL:09d}")
    assert judgement_of(runs).weight_difference == math.inf
    weights = {"weight": torch.tensor([1.0, 1.0, 1.0 + 2**-10]) * TOTAL}
    save_checkpoint(runs[0] / "checkpoints", TOTAL, {"critic": weights}, {})
    judgement = judgement_of(runs)
    assert judgement.weight_difference == pytest.approx(2**-10)
    assert judgement.where == "critic.weight"
