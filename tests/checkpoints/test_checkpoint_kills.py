"""A process killed (-9) at any operation of a save costs that checkpoint at most, never an older
one, and leaves nothing that stays."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import REPOSITORY


def killed(folder: Path, what: str) -> list[dict[str, Any]]:
    program = [sys.executable, str(Path(__file__).with_name("checkpoint_process.py"))]
    done = subprocess.run(
        [*program, str(folder), what],
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("what", ["next", "again"])
def test_death_at_any_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, what):
    found = killed(tmp_path / "checkpoints", what)
    kills, repaired = found[0::2], found[1::2]
    assert len(kills) > 20
    assert [kill["was_killed"] for kill in kills] == [True] * (len(kills) - 1) + [False]
    new = "images-000000192" if what == "next" else "images-000000128"
    seen = [(kill["newest"], kill["values"]) for kill in kills]
    assert all(each in (("images-000000128", [128.0]), (new, [7.0])) for each in seen)
    assert seen[0] == ("images-000000128", [128.0])
    assert seen[-1] == (new, [7.0])
    # As many as are kept are whole at any time, and the next save clears up.
    assert all(len(kill["whole"]) >= 2 for kill in kills)
    for kill, after in zip(kills, repaired, strict=True):
        assert after["left"] == after["whole"] == [kill["newest"], "images-000000256"]


def test_death_at_any_time_leaves_a_whole_checkpoint_no_older_than_before(tmp_path):
    found = killed(tmp_path / "checkpoints", "anywhere")
    images = 1
    for kill in found:
        assert kill["before"] == images
        images = int(kill["newest"].removeprefix("images-"))
        assert images >= kill["before"]
        assert kill["values"] == [images]
    assert images > 1
    assert any("unfinished" in name for kill in found for name in kill["left"])
