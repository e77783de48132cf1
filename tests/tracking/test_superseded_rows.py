"""When a run resumes under other settings, W&B keeps rows that the record no longer has."""

import logging

import pytest

from ganscale.run_folder import RunFolder
from ganscale.tracking.record import RecordTail
from ganscale.tracking.superseded_rows import count_superseded, note_connection
from ganscale.tracking.tracker import Tracker
from ganscale.tracking.uploader_messages import WandbIdentity


def train(folder: RunFolder, images: range, resumed_at: int | None, changed: list[str]) -> None:
    identity = WandbIdentity("id", "name", {})
    tracker = Tracker(folder, identity, "disabled", resumed_at, changed_settings=changed)
    for seen in images:
        tracker.log({"loss/critic": 1.0}, step=seen, images_seen=seen)
    tracker.finish({}, exit_code=0)


def superseded(folder: RunFolder, location: str = "there") -> int:
    positions = ((seen, step) for seen, step, _ in RecordTail(folder.record).lines())
    return count_superseded(folder, location, positions)


@pytest.fixture
def folder(run_folder) -> RunFolder:
    return RunFolder(run_folder)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_rows_that_wandb_had_before_the_settings_changed_are_counted(folder, caplog):
    train(folder, range(1, 21), None, [])
    folder.wandb.mkdir()
    note_connection(folder, "there", 16)  # it has 15 rows
    assert superseded(folder) == 0

    train(folder, range(11, 31), 10, ["optimizer.critic.lr"])
    assert "optimizer.critic.lr" in caplog.text
    note_connection(folder, "there", 16)
    note_connection(folder, "there", 31)  # has got the new ones since
    assert superseded(folder) == 5  # 11 to 15
    note_connection(folder, "elsewhere", 0)  # another project
    assert superseded(folder, "elsewhere") == 0


def test_rows_repeated_under_the_same_settings_are_not_superseded(folder, caplog):
    train(folder, range(1, 21), None, [])
    folder.wandb.mkdir()
    train(folder, range(11, 31), 10, [])
    note_connection(folder, "there", 16)
    assert superseded(folder) == 0
    assert warnings(caplog) == []


def test_a_run_without_wandb_needs_no_warning(folder, caplog):
    train(folder, range(1, 21), None, [])
    train(folder, range(11, 31), 10, ["optimizer.critic.lr"])
    assert not folder.wandb.exists()
    assert warnings(caplog) == []
