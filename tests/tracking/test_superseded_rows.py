"""A run that is resumed under other settings: what W&B has is not what the record has."""

import logging
from pathlib import Path

import pytest

from ganscale.tracking import Tracker
from ganscale.tracking.record_tail import RecordTail
from ganscale.tracking.superseded_rows import count_superseded, note_connection
from ganscale.tracking.uploader_messages import WandbIdentity


def train(run_folder: Path, images: range, resumed_at: int | None, changes: list[str]) -> None:
    identity = WandbIdentity("id", "project", "name", {})
    tracker = Tracker(run_folder, identity, "disabled", resumed_at, changes=changes)
    for seen in images:
        tracker.log({"loss/critic": 1.0}, step=seen, images_seen=seen)
    tracker.finish({}, exit_code=0)


def replaced(run_folder: Path, location: str = "there") -> int:
    moments = ((seen, step) for seen, step, _ in RecordTail(run_folder / "metrics.jsonl").lines())
    return count_superseded(run_folder, location, moments)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_rows_that_wandb_had_before_the_settings_changed_are_counted(run_folder, caplog):
    train(run_folder, range(1, 21), None, [])
    (run_folder / "wandb").mkdir()
    note_connection(run_folder, "there", 16)  # it has 15 rows
    assert replaced(run_folder) == 0

    train(run_folder, range(11, 31), 10, ["optimizer.critic.lr"])
    assert "optimizer.critic.lr" in caplog.text
    note_connection(run_folder, "there", 16)
    note_connection(run_folder, "there", 31)  # has got the new ones since
    assert replaced(run_folder) == 5  # 11 to 15
    note_connection(run_folder, "elsewhere", 0)  # another project
    assert replaced(run_folder, "elsewhere") == 0


def test_rows_that_come_again_under_the_same_settings_are_no_others(run_folder, caplog):
    train(run_folder, range(1, 21), None, [])
    (run_folder / "wandb").mkdir()
    train(run_folder, range(11, 31), 10, [])
    note_connection(run_folder, "there", 16)
    assert replaced(run_folder) == 0
    assert warnings(caplog) == []


def test_a_run_that_wandb_was_never_told_of_needs_no_warning(run_folder, caplog):
    train(run_folder, range(1, 21), None, [])
    train(run_folder, range(11, 31), 10, ["optimizer.critic.lr"])
    assert not (run_folder / "wandb").exists()
    assert warnings(caplog) == []
