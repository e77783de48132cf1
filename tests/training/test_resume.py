"""One process trains in a run folder, with the settings that its curve began with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ganscale.config import load_stored, resolve
from ganscale.errors import UserError
from ganscale.run_folder import RunFolder
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
FOLDERS = 8


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
    assert open_run(folder, running.settings(), "digits") is None


@pytest.fixture
def sessions(running):
    running.end()
    return running


def test_the_same_settings_continue_the_run_from_its_newest_checkpoint(sessions):
    folder, run_id = sessions.stopped_run()
    for images_seen in (64, 128):
        save_checkpoint(folder.checkpoints, images_seen, {"critic": {"w": torch.ones(2)}}, {})
    newest = folder.checkpoints / "images-000000128"
    assert open_run(folder, sessions.settings(), "digits") == newest
    assert folder.read_identity()["id"] == run_id


def test_free_settings_may_change_and_are_stored(sessions):
    folder, run_id = sessions.stopped_run()
    settings = sessions.settings("training.total_images=60k", "data.workers=0")
    open_run(folder, settings, "digits")
    assert accept_settings(folder, settings, "digits") == []
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
    open_run(folder, settings, "digits")
    assert folder.read_identity()["id"] == run_id
    assert load_stored(folder.config).seed == 0  # until the checkpoint has loaded
    changed = accept_settings(folder, settings, "digits")
    assert changed == ["seed"]  # for W&B, which keeps the rows from before
    assert load_stored(folder.config).seed == 1
    assert load_stored(folder.config).resume.allow == []  # to be given anew each time


def test_other_shards_are_refused_unless_the_data_may_change(sessions):
    folder, _ = sessions.stopped_run()
    with pytest.raises(UserError, match=r"data: the shards have changed.*resume\.allow=\[data\]"):
        open_run(folder, sessions.settings(), "faces")
    folder, run_id = sessions.stopped_run()
    settings = sessions.settings("resume.allow=[data]")
    open_run(folder, settings, "faces")
    assert accept_settings(folder, settings, "faces") == ["data"]
    assert json.loads(folder.identity.read_text()) == {"id": run_id, "fingerprint": "faces"}


def test_runs_have_distinct_ids_and_folders_are_made_as_needed(tmp_path, sessions):
    first, second = (RunFolder(tmp_path / "deep" / name) for name in ("first", "second"))
    for folder in (first, second):
        open_run(folder, sessions.settings(), "digits")
    assert first.read_identity()["id"] != second.read_identity()["id"]
    accept_settings(first, sessions.settings(), "digits")
    assert load_stored(first.config) == sessions.settings().config


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path, sessions):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the run folder"):
        open_run(RunFolder(tmp_path / "file" / "run"), sessions.settings(), "digits")
