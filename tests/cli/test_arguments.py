"""How the command line is read: settings and options in any order, and what is not understood."""

from pathlib import Path

import pytest
import yaml

from ganscale.cli.main import main
from tests.helpers.runs import MINIMAL


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_an_error_needs_no_rank_where_only_a_world_size_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["shards", "show", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_settings_may_stand_before_and_after_options(
    config: str, capsys: pytest.CaptureFixture[str], before: int
) -> None:
    settings = [config, "seed=3", "data.flip=true"]
    assert main(["config", *settings[:before], "--explain", *settings[before:], "seed=4"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["data"]["flip"]) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "command", "sentence"),
    [
        ("plan C --nodess 2", "plan", "unknown option --nodess (did you mean '--nodes'?)"),
        ("plan C --seed=3", "plan", "unknown option --seed (settings have no dashes: key=value)"),
        ("train C --seed 3", "train", "unknown option --seed (settings have no dashes: key=value)"),
        ("shards write a b --qualty 3", "shards write", "unknown option --qualty (did you mean "),
        ("shards write a b c", "shards write", "unknown argument c"),
        ("checkpoint list a b", "checkpoint list", "unknown argument b"),
        ("sample a --weigths ema", "sample", "unknown option --weigths (did you mean '--weights'"),
        ("sample a --wei ema", "sample", "unknown option --wei (did you mean '--weights'"),
    ],
)
def test_what_is_not_understood_is_named_with_the_usage_of_its_command(
    config: str,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    command: str,
    sentence: str,
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.replace("C", config).split())
    assert raised.value.code == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"usage: ganscale {command} ")
    assert last.startswith(f"ganscale {command}: error: {sentence}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("trian C", "argument COMMAND: invalid choice: 'trian' (did you mean 'train'?)"),
        ("shards wrte a b", "argument COMMAND: invalid choice: 'wrte' (did you mean 'write'?)"),
        ("sample a --weights emma", "argument --weights: invalid choice: 'emma' (did you mean 'em"),
        ("zzz", "argument COMMAND: invalid choice: 'zzz' (choose from train, "),
    ],
)
def test_a_command_or_choice_that_does_not_exist_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    assert sentence in capsys.readouterr().err
