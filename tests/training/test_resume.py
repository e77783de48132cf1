"""One process trains in a run folder, with the settings that its curve began with."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ganscale.config import load_stored, resolve
from ganscale.errors import UserError
from ganscale.run_folder import RunFolder, append_json_line
from ganscale.settings_reference import annotated_yaml
from ganscale.tracking.record import newest_images_seen
from ganscale.training.resume import accept_settings, open_run
from tests.checkpoints.helpers import save_checkpoint

CONFIG = """
data: {path: data/x, resolution: 8}
generator: {target: mlp}
critic: {target: mlp}
objective: {loss: {name: wgan}}
optimizer: {critic: {learning_rate: 1e-4}, generator: {learning_rate: 1e-4}}
training: {total_images: 50k}
"""
FOLDERS = 12


class Sessions:
    """Runs that another process has started, each for one test: a lock lasts as long as its
    process, so this process can open each folder once."""

    def __init__(self, root: Path) -> None:
        self.config = root / "config.yaml"
        self.config.write_text(CONFIG)
        self._unused = [root / f"run-{number}" for number in range(FOLDERS)]
        self._process = self.start(*self._unused)
        output = self._process.stdout
        assert output is not None
        self._identities = {folder: output.readline().strip() for folder in self._unused}
        self.held = self._unused.pop()

    def start(self, *folders: Path) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("resume_process.py")
        return subprocess.Popen(
            [sys.executable, str(program), str(self.config), "digits", *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=60)

    def stopped_run(self) -> tuple[RunFolder, str]:
        """A run whose process has died, and its id."""
        folder = self._unused.pop()
        return RunFolder(folder), self._identities[folder]

    def settings(self, *overrides: str):
        return resolve([str(self.config), *overrides])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    sessions = Sessions(tmp_path_factory.mktemp("runs"))
    yield sessions
    sessions.end()


def test_a_second_process_is_refused_until_the_first_is_dead(running):
    folder = RunFolder(running.held)
    before = {path: path.read_bytes() for path in running.held.iterdir()}
    with pytest.raises(UserError, match=f"another process is training in {running.held}"):
        open_run(folder, running.settings("log.every_images=7"), "digits")
    assert {path: path.read_bytes() for path in running.held.iterdir()} == before
    running.end()
    assert open_run(folder, running.settings(), "digits") == (None, [])


@pytest.fixture
def sessions(running):
    running.end()
    return running


def test_the_same_settings_continue_the_run_from_its_newest_checkpoint(sessions):
    folder, run_id = sessions.stopped_run()
    for images_seen in (64, 128):
        save_checkpoint(folder.checkpoints, images_seen, {"critic": {"w": torch.ones(2)}}, {})
    newest = folder.checkpoints / "images-000000128"
    assert open_run(folder, sessions.settings(), "digits").checkpoint == newest
    assert folder.read_identity()["id"] == run_id


def test_free_settings_may_change_and_are_stored(sessions):
    folder, run_id = sessions.stopped_run()
    settings = sessions.settings("training.total_images=60k", "data.workers=0")
    assert open_run(folder, settings, "digits").changed_settings == []
    accept_settings(folder, settings, "digits")
    assert load_stored(folder.config) == settings.config
    assert folder.read_identity()["id"] == run_id


def test_a_changed_setting_is_refused_by_its_name_and_nothing_is_written(sessions):
    folder, _ = sessions.stopped_run()
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    settings = sessions.settings("seed=1", "optimizer.critic.learning_rate=1")
    with pytest.raises(UserError) as raised:
        open_run(folder, settings, "digits")
    sentence = str(raised.value)
    assert "optimizer.critic.learning_rate: 0.0001 -> 1.0; seed: 0 -> 1" in sentence
    assert "resume.allow=[optimizer.critic.learning_rate,seed]" in sentence
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_the_suggested_override_continues_the_run_and_is_stored(sessions):
    folder, run_id = sessions.stopped_run()
    settings = sessions.settings("seed=1", "resume.allow=[seed]")
    opened = open_run(folder, settings, "digits")
    assert opened.changed_settings == ["seed"]  # for W&B, which keeps the rows from before
    assert folder.read_identity()["id"] == run_id
    assert load_stored(folder.config).seed == 0  # until it trains with the new one
    accept_settings(folder, settings, "digits")
    assert load_stored(folder.config).seed == 1
    assert load_stored(folder.config).resume.allow == []  # to be given anew each time


def test_another_experiment_is_refused_in_one_line_that_asks_for_a_name(sessions, tmp_path):
    folder, _ = sessions.stopped_run()
    other = tmp_path / "other.yaml"
    other.write_text(
        "objective: {loss: {name: lsgan}, penalties: {r1: {weight: 3}}, n_critic: 2}\n"
        "optimizer: {critic: {name: sgd, learning_rate: 3}, generator: {learning_rate: 4}}\n"
    )
    with pytest.raises(UserError) as raised:
        open_run(folder, resolve([str(sessions.config), str(other)]), "digits")
    sentence = str(raised.value)
    assert "and 5 more in objective, optimizer): give this one another run.name" in sentence
    assert len(sentence) < 300 + len(str(folder.path))


def test_the_stored_settings_are_readable_by_their_owner_only(sessions):
    folder, _ = sessions.stopped_run()
    assert folder.config.stat().st_mode & 0o777 == 0o600
    folder.config.chmod(0o644)
    open_run(folder, sessions.settings(), "digits")
    accept_settings(folder, sessions.settings(), "digits")
    assert folder.config.stat().st_mode & 0o777 == 0o600


def add_checkpoint(folder: RunFolder, images_seen: int) -> Path:
    return save_checkpoint(folder.checkpoints, images_seen, {"critic": {"w": torch.ones(2)}}, {})


def add_rows(folder: RunFolder, *counts: int) -> None:
    rows = (f'{{"progress/images_seen": {images_seen}}}\n' for images_seen in counts)
    folder.record.write_text("".join(rows))


def test_without_its_identity_a_run_continues_as_another_in_wandb(sessions, caplog):
    folder, run_id = sessions.stopped_run()
    newest = add_checkpoint(folder, 64)
    add_rows(folder, 32, 64, 96)
    append_json_line(folder.sessions, {"images_seen": 0, "data_fingerprint": "digits"})
    folder.identity.unlink()
    with pytest.raises(UserError, match="the shards have changed"):
        open_run(folder, sessions.settings(), "faces")
    assert open_run(folder, sessions.settings(), "digits").checkpoint == newest
    new_id = folder.read_identity()["id"]
    assert new_id != run_id
    sentence = f"run.json is missing: the run continues as a new one in W&B ({new_id})"
    assert sentence in caplog.text


@pytest.mark.parametrize("made", ["rows", "checkpoint", "samples"])
def test_a_run_without_its_settings_is_refused_with_the_way_to_go_on(tmp_path, sessions, made):
    folder = RunFolder(tmp_path / "run")
    folder.samples.mkdir(parents=True)
    if made == "rows":
        add_rows(folder, 32)
    elif made == "checkpoint":
        add_checkpoint(folder, 64)
    else:
        folder.sample_grid(0).write_text("a picture")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    with pytest.raises(UserError, match=r"holds a run without config\.yaml.*`ganscale config"):
        open_run(folder, sessions.settings(), "digits")
    after = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    after.pop(folder.path / ".lock")
    assert after == before
    folder.config.write_text(annotated_yaml(sessions.settings()))  # as `ganscale config` prints it
    open_run(folder, sessions.settings(), "digits")


@pytest.mark.parametrize("text", ["", "{", "[]", "seed: no", "x: 1", "training: {schedule: warp}"])
def test_damaged_settings_are_named_with_the_way_to_go_on(sessions, tmp_path, text):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(text)
    with pytest.raises(UserError) as raised:
        open_run(folder, sessions.settings(), "digits")
    assert str(folder.config) in str(raised.value)
    assert "repair the file, or write it anew with `ganscale config" in str(raised.value)
    assert folder.config.read_text() == text


def test_a_long_record_without_a_checkpoint_is_kept(sessions, caplog):
    folder, _ = sessions.stopped_run()
    settings = sessions.settings("checkpoint.every_images=100")
    accept_settings(folder, settings, "digits")
    add_rows(folder, 50, 100, 150)  # killed while it wrote the first one
    assert open_run(folder, settings, "digits").checkpoint is None
    assert "no whole checkpoint: the run starts again" in caplog.text
    folder.close()
    add_rows(folder, 50, 100, 150, 200, 250, 300, 350)  # of cycles of 64
    damaged = add_checkpoint(folder, 200)
    (damaged / "state.json").write_text("half")
    assert open_run(folder, settings, "digits").checkpoint is None
    assert "its rows up to 350 images are kept" in caplog.text
    assert newest_images_seen(folder.path / "metrics-until-000000350.jsonl") == 350
    assert (folder.checkpoints / "damaged-images-000000200" / "state.json").exists()


def test_other_shards_are_refused_unless_the_data_may_change(sessions):
    folder, _ = sessions.stopped_run()
    with pytest.raises(UserError, match=r"data: the shards have changed.*resume\.allow=\[data\]"):
        open_run(folder, sessions.settings(), "faces")
    folder, run_id = sessions.stopped_run()
    settings = sessions.settings("resume.allow=[data]")
    assert open_run(folder, settings, "faces").changed_settings == ["data"]
    assert folder.read_identity()["fingerprint"] == "digits"
    accept_settings(folder, settings, "faces")
    assert folder.read_identity()["fingerprint"] == "faces"
    assert folder.read_identity()["id"] == run_id


def test_runs_have_distinct_ids_and_folders_are_made_as_needed(tmp_path, sessions):
    first, second = (RunFolder(tmp_path / "deep" / name) for name in ("first", "second"))
    for folder in (first, second):
        open_run(folder, sessions.settings(), "digits")
    assert first.read_identity()["id"] != second.read_identity()["id"]
    assert load_stored(first.config) == sessions.settings().config


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, sessions):
    (tmp_path / "file").write_text("")
    for path in ("file/run", "n" * 300):
        with pytest.raises(UserError, match="cannot use the run folder"):
            open_run(RunFolder(tmp_path / path), sessions.settings(), "digits")
