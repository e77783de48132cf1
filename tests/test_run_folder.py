"""One process trains in a run folder, and only under the settings that its curve began with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ganscale.config import load_stored, resolve
from ganscale.errors import UserError
from ganscale.run_folder import RunFolder, write_text
from tests.checkpoints.helpers import save_checkpoint
from tests.helpers.runs import MINIMAL

FOLDERS = 8


class Sessions:
    """Runs that another process has begun. Each is for one test: a lock lasts as long as its
    process, so this one can open each folder once."""

    def __init__(self, root: Path) -> None:
        self.config = root / "config.yaml"
        self.config.write_text(MINIMAL)
        self._unused = [root / f"run-{number}" for number in range(FOLDERS)]
        self._process = self.start(*self._unused)
        said = self._process.stdout
        assert said is not None
        self._identities = {folder: said.readline().split()[0] for folder in self._unused}
        self.held = self._unused.pop()

    def start(self, *folders: Path) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("run_folder_process.py")
        return subprocess.Popen(
            [sys.executable, str(program), str(self.config), "digits", *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=300)

    def begun(self) -> tuple[RunFolder, str]:
        """A run that was begun and whose process has died, and its id."""
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
        folder.open(running.settings("log.every_images=7"), "digits")
    assert {path: path.read_bytes() for path in running.held.iterdir()} == before
    running.end()
    run_id, checkpoint = folder.open(running.settings(), "digits")
    assert run_id == json.loads(folder.identity.read_text())["id"]
    assert checkpoint is None


@pytest.fixture
def sessions(running):
    running.end()
    return running


def test_the_same_settings_continue_the_run_from_its_newest_checkpoint(sessions):
    folder, run_id = sessions.begun()
    for images_seen in (64, 128):
        save_checkpoint(folder.checkpoints, images_seen, {"critic": {"w": torch.ones(2)}}, {})
    newest = folder.checkpoints / "images-000000128"
    assert folder.open(sessions.settings(), "digits") == (run_id, newest)


def test_free_settings_may_change_and_are_stored(sessions):
    folder, run_id = sessions.begun()
    settings = sessions.settings("training.total_images=60k", "data.workers=0")
    assert folder.open(settings, "digits")[0] == run_id
    folder.accept(settings, "digits")
    assert load_stored(folder.config) == settings.config
    assert folder.changes == []


def test_a_changed_setting_is_refused_by_its_name_and_nothing_is_written(sessions):
    folder, _ = sessions.begun()
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    settings = sessions.settings("seed=1", "optimizer.critic.learning_rate=1")
    with pytest.raises(UserError) as raised:
        folder.open(settings, "digits")
    sentence = str(raised.value)
    assert "optimizer.critic.learning_rate: 0.0001 -> 1.0; seed: 0 -> 1" in sentence
    assert "resume.allow=[optimizer.critic.learning_rate,seed]" in sentence
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_what_the_refusal_says_to_type_continues_the_run_and_holds_from_then_on(sessions):
    folder, run_id = sessions.begun()
    settings = sessions.settings("seed=1", "resume.allow=[seed]")
    assert folder.open(settings, "digits")[0] == run_id
    assert load_stored(folder.config).seed == 0  # until it is known to load
    folder.accept(settings, "digits")
    assert load_stored(folder.config).seed == 1
    assert load_stored(folder.config).resume.allow == []  # to be named anew each time
    assert folder.changes == ["seed"]  # for W&B, which keeps the rows from before


def test_other_shards_are_refused_unless_the_data_may_change(sessions):
    folder, _ = sessions.begun()
    with pytest.raises(UserError, match=r"data: the shards are others.*resume\.allow=\[data\]"):
        folder.open(sessions.settings(), "faces")
    folder, run_id = sessions.begun()
    settings = sessions.settings("resume.allow=[data]")
    assert folder.open(settings, "faces")[0] == run_id
    folder.accept(settings, "faces")
    assert folder.changes == ["data"]
    assert json.loads(folder.identity.read_text()) == {"id": run_id, "fingerprint": "faces"}


def test_runs_have_ids_of_their_own_and_folders_are_made_as_needed(tmp_path, sessions):
    first, second = (RunFolder(tmp_path / "deep" / name) for name in ("first", "second"))
    ids = [folder.open(sessions.settings(), "digits")[0] for folder in (first, second)]
    assert ids[0] != ids[1]
    first.accept(sessions.settings(), "digits")
    assert load_stored(first.config) == sessions.settings().config


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path, sessions):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the run folder"):
        RunFolder(tmp_path / "file" / "run").open(sessions.settings(), "digits")


def test_names_in_the_folder_sort_by_images(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.samples(123_456) == tmp_path / "samples" / "images-000123456.png"
    assert folder.checkpoints == tmp_path / "checkpoints"


def test_a_small_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    before = path.stat().st_ino
    write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_ino != before  # renamed into place: who had it open reads the old one
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
