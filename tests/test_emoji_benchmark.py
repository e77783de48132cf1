"""The benchmark of emoji: a run of seconds, and the rows of several seeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.emoji import Result, rows_of
from tests.helpers.processes import HANG_SECONDS, REPOSITORY


def test_a_row_has_the_mean_over_the_seeds_and_their_range() -> None:
    figures = {"kid": [4.0, 2.0], "fd64": [10.0, 9.0]}, {"kid": [8.0, 3.0], "fd64": [20.0, 7.0]}
    results = [Result("r3gan", seed, each, 100, 60.0) for seed, each in enumerate(figures)]
    found = {row.name: (row.ratio, row.low, row.high) for row in rows_of(results)}
    assert found["r3gan/kid/1/2"] == pytest.approx((6.0, 4.0, 8.0))
    assert found["r3gan/fd64/2/2"] == pytest.approx((8.0, 7.0, 9.0))
    assert found["r3gan/minutes"][0] == pytest.approx(1.0)


def test_the_quick_form_trains_and_judges_and_continues_what_it_has_begun(tmp_path: Path) -> None:
    file, sheets = tmp_path / "rows.json", tmp_path / "sheets"
    options = ["--json", str(file), "--sheets", str(sheets), "--folder", str(tmp_path / "kept")]
    short = ["--images", "64", "--set", "training.global_batch_size=16"]
    short += ["--set", "training.precision=float32"]
    command = [sys.executable, "-m", "benchmarks.emoji", "--quick", *short, *options]
    figures = []
    for is_finished in (False, True):
        ended = subprocess.run(
            command, cwd=REPOSITORY, check=True, timeout=HANG_SECONDS, stderr=subprocess.PIPE
        )
        assert (b"finished already" in ended.stderr) == is_finished
        rows = {row["name"]: row["ratio"] for row in json.loads(file.read_text())["rows"]}
        figures.append((rows["r3gan/kid/1/1"], rows["r3gan/fd64/1/1"]))
    assert figures[0] == figures[1]
    assert figures[0][0] > 0.1  # nothing like the images after some seconds
    assert len([*sheets.glob("r3gan-0-*.png")]) == 2
