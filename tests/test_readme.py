"""The README's commands work in their order, as printed."""

import re
import shlex

import pytest

from ganscale.config import resolve
from tests.helpers.processes import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
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
