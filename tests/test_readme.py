"""The README's commands work in their order, as printed."""

import re
import shlex

import pytest

from ganscale.config import resolve
from tests.helpers.processes import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = REPOSITORY / "docs"


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    blocks = [block.replace("\\\n", " ") for block in blocks]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line[2:], comments=True) for line in lines]


def test_only_make_is_used_before_the_environment_is_explained() -> None:
    before, _, after = README.partition("source .venv/bin/activate")
    assert {command[0] for command in commands(before)} == {"make"}
    assert "ganscale" in {command[0] for command in commands(after)}


def test_every_config_that_is_trained_has_the_data_that_an_earlier_command_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    made, trained = {"data/mnist"}, 0  # by `make demo`
    for command in commands(README):
        if command[1:3] == ["shards", "write"]:
            made.add(command[4])
        elif "sweep" not in " ".join(command):
            is_setting = [word for word in command if re.match(r"configs/|[a-z_.]+=", word)]
            if any(word.startswith("configs/") for word in is_setting):
                trained += 1
                assert resolve(is_setting).config.data.path in made, command
    assert trained > 5


def test_no_command_meets_a_run_of_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is kept under its name: with the same name and other settings, it would be refused."""
    monkeypatch.chdir(REPOSITORY)
    compared = 0
    for page in [README, *(path.read_text() for path in sorted(PAGES.glob("*.md")))]:
        runs = {"demo": resolve(["configs/demo.yaml"]).config}  # by `make demo`
        for command in commands(page):
            if settings := settings_of(command):
                config = resolve(settings).config
                assert runs.setdefault(config.run.name, config) == config, command
                compared += 1
    assert compared > 15


def settings_of(command: list[str]) -> list[str]:
    """The configs and settings of a command that trains; none of one that continues a run, and of
    a sweep."""
    is_training = command[:2] == ["ganscale", "train"] or command[0] in ("accelerate", "sbatch")
    words = [w for w in command if w.endswith(".yaml") or re.match(r"[a-z_.]+=", w)]
    words = [w for w in words if not w.startswith(("launch/", "training.total_images="))]
    if command[:2] == ["ganscale", "train"]:
        words = [w for w in command[2:] if not w.startswith(("--", "training.total_images="))]
    is_placeholder = any(not re.fullmatch(r"[\w./=,-]+", w) or w.isupper() for w in words)
    if not is_training or is_placeholder or any("runs/" in w or "sweeps/" in w for w in words):
        return []
    return words
