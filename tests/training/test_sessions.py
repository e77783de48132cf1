"""What sessions leave in the run folder, whatever ends them, and what the next one makes of it."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ganscale.config import resolve
from ganscale.report.history import faults_of, run_state
from ganscale.report.run_reader import read_runs
from ganscale.run_folder import in_its_folder
from ganscale.runtime import Runtime
from ganscale.tracking.alerts import read_alerts
from ganscale.training.trainer import Trainer
from tests.helpers.runs import TINY, read_rows

CYCLES_OF_8_IMAGES = (
    "training.global_batch_size=4",
    "training.total_images=80",
    "log.every_images=16",
    "objective.n_critic=2",
)


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    (tmp_path / "data").symlink_to(digits)
    return tmp_path


def trainer_of(folder: Path, runtime: Runtime, name: str, *more: str) -> Trainer:
    where = [f"data.path={folder / 'data'}", f"run.folder={folder / 'runs'}", f"run.name={name}"]
    return Trainer(resolve([*TINY, *CYCLES_OF_8_IMAGES, *where, *more]), runtime)


def interrupt_at(trainer: Trainer, images_seen: int, error: type[BaseException]) -> None:
    """As a kill: no checkpoint is saved."""
    trainer.cycle.run = partial(_run_until, trainer, trainer.cycle.run, images_seen, error)
    with pytest.raises(error):
        trainer.run()


def _run_until(trainer, run, images_seen, error, *arguments, **options):
    if trainer.state.images_seen >= images_seen:
        raise error
    return run(*arguments, **options)


def rows_of_pictures(trainer: Trainer) -> list[tuple[str, int]]:
    rows: list[dict[str, Any]] = list(read_rows(trainer.folder.record))
    return [
        (name, row["progress/images_seen"])
        for row in rows
        for name in ("samples/ema", "samples/real")
        if name in row
    ]


def test_the_rows_of_pictures_survive_a_kill_before_the_first_checkpoint(folder, runtime):
    more = ("samples.every_images=40", "training.total_images=48")
    killed = trainer_of(folder, runtime, "pictures", *more)
    interrupt_at(killed, 24, RuntimeError)
    assert killed.folder.sample_grid(0).exists()
    continued = trainer_of(folder, runtime, "pictures", *more)
    assert continued.run() == 0
    whole = trainer_of(folder, runtime, "whole-pictures", *more)
    assert whole.run() == 0
    assert rows_of_pictures(continued) == rows_of_pictures(whole)
    assert ("samples/ema", 0) in rows_of_pictures(whole)


def test_a_row_of_pictures_of_which_one_could_not_be_written_is_made_after_the_resume(
    folder, runtime
):
    more = ("samples.every_images=40", "checkpoint.every_images=40")
    failing = trainer_of(folder, runtime, "unwritten", *more)
    obstacle = failing.folder.sample_grid(40, "interpolation")
    obstacle.mkdir(parents=True)  # root may write into any folder
    interrupt_at(failing, 48, RuntimeError)
    assert failing.folder.sample_grid(40).exists()
    assert ("samples/ema", 40) not in rows_of_pictures(failing)
    obstacle.rmdir()
    continued = trainer_of(folder, runtime, "unwritten", *more)
    assert continued.resumed_at == 40
    assert continued.run() == 0
    assert ("samples/ema", 40) in rows_of_pictures(continued)


def test_a_row_of_real_pictures_after_the_checkpoint_survives_a_kill(folder, runtime):
    more = ("samples.count=20", "checkpoint.every_images=8")
    killed = trainer_of(folder, runtime, "real", *more)
    interrupt_at(killed, 24, RuntimeError)
    killed.writer.close()
    assert ("samples/real", 16) in rows_of_pictures(killed)
    picture = killed.folder.real_samples.read_bytes()
    for path in killed.folder.checkpoints.glob("images-*"):
        if path.name != "images-000000008":
            shutil.rmtree(path)
    continued = trainer_of(folder, runtime, "real", *more)
    assert continued.resumed_at == 8
    assert continued.run() == 0
    assert ("samples/real", 8) in rows_of_pictures(continued)
    assert killed.folder.real_samples.read_bytes() == picture


def test_a_run_that_trains_nothing_leaves_the_stored_settings_as_they_were(folder, runtime):
    more = ("optimizer.critic.learning_rate.to=0",)
    done = trainer_of(folder, runtime, "nothing", *more)
    assert done.run() == 0
    stored = done.folder.config.read_bytes()
    shorter = ("training.total_images=40", "resume.allow=[optimizer.critic.learning_rate]")
    again = trainer_of(folder, runtime, "nothing", *more, *shorter)
    assert again.run() == 0
    longer = ("training.total_images=96", "resume.allow=[optimizer.critic.learning_rate]")
    stopped = trainer_of(folder, runtime, "nothing", *more, *longer)
    stopped.stop.request()
    assert stopped.run() == 75
    assert done.folder.config.read_bytes() == stored
    assert trainer_of(folder, runtime, "nothing", *more).run() == 0


def test_a_run_whose_identity_was_deleted_continues_from_its_checkpoint(folder, runtime):
    more = ("checkpoint.every_images=40",)
    killed = trainer_of(folder, runtime, "no-identity", *more)
    interrupt_at(killed, 64, RuntimeError)
    before = killed.folder.record.read_bytes()
    killed.folder.identity.unlink()
    continued = trainer_of(folder, runtime, "no-identity", *more)
    assert continued.resumed_at == 40
    assert continued.run() == 0
    after = continued.folder.record.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n", 0, len(before) // 2)])


def test_the_config_in_a_copied_run_folder_means_the_copy(folder, runtime, monkeypatch):
    stopped = trainer_of(folder, runtime, "original", "training.total_images=40")
    assert stopped.run() == 0
    original = {path: path.read_bytes() for path in stopped.folder.path.rglob("*.json*")}
    shutil.copytree(stopped.folder.path, folder / "elsewhere" / "fork")
    monkeypatch.chdir(folder / "elsewhere" / "fork")
    for config in ("config.yaml", "../fork/config.yaml", str(Path.cwd() / "config.yaml")):
        resolved = in_its_folder(resolve([config, "training.total_images=80"]))
        assert Path(resolved.config.run.folder, resolved.config.run.name).samefile(Path.cwd())
    fork = Trainer(resolved, runtime)
    assert fork.resumed_at == 40
    assert fork.run() == 0
    assert f"is a copy of {stopped.folder.path}" in fork.folder.log.read_text()
    assert fork.folder.read_identity()["id"] != stopped.folder.read_identity()["id"]
    assert [alert.images_seen for alert in read_alerts(fork.folder)] == [80]
    assert {path: path.read_bytes() for path in original} == original
    named = in_its_folder(resolve(["config.yaml", "run.name=other"])).config.run
    assert named.name == "other"


def test_a_stop_of_ones_own_is_not_a_fault_in_the_report(folder, runtime):
    stopped = trainer_of(folder, runtime, "stopped")
    stopped.cycle.run = partial(_stop_after, stopped, stopped.cycle.run)
    assert stopped.run() == 75
    (run,) = read_runs([stopped.folder.path])
    assert run_state(run) == ("stopped; the same command continues it", "note")
    assert faults_of(run) == []
    assert "stopped on request at 16 images" in stopped.folder.log.read_text()


def _stop_after(trainer, run, *arguments, **options):
    trainer.stop.request()
    return run(*arguments, **options)
