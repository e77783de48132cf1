"""A process killed (-9) at any operation of a save costs at most that checkpoint, and its leftovers
are removed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import REPOSITORY, run_python


def run_and_kill(folder: Path, mode: str) -> list[dict[str, Any]]:
    program = str(Path(__file__).with_name("checkpoint_process.py"))
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = run_python(program, str(folder), mode, env=env)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", ["next", "again"])
def test_death_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, mode):
    reports = run_and_kill(tmp_path / "checkpoints", mode)
    kills, repaired = reports[0::2], reports[1::2]
    assert len(kills) > 20
    assert [kill["was_killed"] for kill in kills] == [True] * (len(kills) - 1) + [False]
    new = "images-000000192" if mode == "next" else "images-000000128"
    seen = [(kill["newest"], kill["values"]) for kill in kills]
    assert all(newest in (("images-000000128", [128.0]), (new, [7.0])) for newest in seen)
    assert seen[0] == ("images-000000128", [128.0])
    assert seen[-1] == (new, [7.0])
    # `keep_last` undamaged ones exist at any time, and the next save removes the leftovers.
    assert all(len(kill["whole"]) >= 2 for kill in kills)
    for kill, after in zip(kills, repaired, strict=True):
        assert after["left"] == after["whole"] == [kill["newest"], "images-000000256"]


def test_death_at_any_time_leaves_an_undamaged_checkpoint_no_older_than_before(tmp_path):
    reports = run_and_kill(tmp_path / "checkpoints", "anywhere")
    images = 1
    for kill in reports:
        assert kill["before"] == images
        images = int(kill["newest"].removeprefix("images-"))
        assert images >= kill["before"]
        assert kill["values"] == [images]
    assert images > 1
    assert any("unfinished" in name for kill in reports for name in kill["left"])
