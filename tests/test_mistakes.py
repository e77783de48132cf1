"""Each mistake of a user's: one sentence that says what, where and what would be right; exit 2."""

import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ganscale.cli.main import main
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import Runs, read_rows


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process: the one sentence that it ends with, and exit code 2."""

    def complaint(*arguments: str) -> str:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return complaint


def last_words(output: str) -> str:
    """The one sentence that processes ended with; `launch` prints a traceback of its own."""
    # Of several ranks, the launcher may end some before they have said it.
    (said,) = {line.partition("error: ")[2] for line in output.splitlines() if "error: " in line}
    return said


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.totl_images=1", "command line: unknown key `training.totl_images`; did you mean "
         "`training.total_images`?"),
        ("training.total_images=many", "command line: `training.total_images` must be int, not "
         "'many'"),
        ("data.path=nowhere", "no data set at nowhere: there is no such folder"),
        ("data.resolution=52", "52"),
        ("generator.target=dcgann", "dcgann"),
        ("critic.options.widht=3", "widht"),
        ("objective.loss.name=wgann", "unknown loss 'wgann' (did you mean 'wgan'?)"),
        ("training.precision=float16", "`training.precision` must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_what_would_be_right(
    runs: Runs, complaint, setting: str, expected: str
) -> None:
    assert expected in complaint("train", *runs.settings("mistake", setting))
    assert not (runs.folder / "mistake").exists()


def test_a_process_ends_with_one_sentence_and_without_a_traceback(runs: Runs) -> None:
    output = runs.finish("mistake", "data.path=nowhere", exit_code=2)
    assert output == "error: no data set at nowhere: there is no such folder\n"
    assert not (runs.folder / "mistake").exists()


def test_an_exception_in_a_users_network_is_one_sentence_and_its_traceback_is_logged(
    runs: Runs, complaint
) -> None:
    target = "critic.target=tests.helpers.users_networks:FailingCritic"
    sentence = complaint("train", *runs.settings("exception", target))
    assert "Critic fails in its forward: KeyError: 'width' (" in sentence
    assert "users_networks.py:" in sentence
    log = (runs.folder / "exception" / "log.txt").read_text()
    assert "Traceback (most recent call last)" in log
    assert log.endswith("KeyError: 'width'\n")


def test_a_typing_error_in_a_file_names_the_file(runs: Runs, complaint, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trainning: {total_images: 3}\n")
    expected = f"{file}: unknown key `trainning`; did you mean `training`?"
    assert complaint("train", *runs.settings("mistake", str(file))) == expected


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_the_nearest(runs: Runs) -> None:
    settings = ("training.global_batch_size=15",)
    assert last_words(runs.finish("mistake", *settings, ranks=2, exit_code=2)) == (
        "`training.global_batch_size` of 15 cannot be divided evenly among 2 ranks of 1 "
        "micro-batch: choose 14 or 16; or, with this batch, 1 or 3 ranks"
    )


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED is not supported"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "the launcher asks for torch.compile"),
    ],
)
def test_a_launcher_that_asks_for_other_parallelism_is_refused(
    runs: Runs,
    complaint,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    expected: str,
) -> None:
    monkeypatch.setenv(variable, value)
    assert expected in complaint("train", *runs.settings("mistake"))


def test_labels_that_are_not_there_are_missed(runs: Runs, complaint, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(64):
        Image.new("L", (32, 32), i).save(pictures / f"{i}.png")
    assert main(["shards", "write", str(pictures), str(tmp_path / "unlabelled")]) == 0
    settings = (f"data.path={tmp_path / 'unlabelled'}", "training.conditional=true")
    assert "needs class labels" in complaint("train", *runs.settings("mistake", *settings))


def test_images_that_are_none_are_refused_when_written(complaint, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.png").write_text("not an image")
    said = complaint("shards", "write", str(texts), str(tmp_path / "s"))
    assert "the first 4 images cannot be decoded" in said
    assert "png cannot be decoded: unknown image format" in said


def test_a_missing_shard_is_named(runs: Runs, complaint, digits: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(digits, damaged)
    shard = sorted(damaged.glob("*.tar"))[2]
    shard.unlink()
    assert complaint("train", *runs.settings("mistake", f"data.path={damaged}")) == (
        f"the shard {shard} of the manifest is missing"
    )


def test_another_run_in_the_same_folder_is_refused_by_name(runs: Runs, complaint) -> None:
    runs.finish("mistake", "training.total_images=64")
    settings = ("training.total_images=64", "optimizer.critic.learning_rate=0.5")
    said = complaint("train", *runs.settings("mistake", *settings))
    assert "optimizer.critic.learning_rate: 0.0005 -> 0.5" in said
    assert "resume.allow=[optimizer.critic.learning_rate]" in said


def test_a_sample_of_no_run_is_refused(complaint, tmp_path: Path) -> None:
    said = complaint("sample", str(tmp_path), "--grid", "x.png")
    assert f"{tmp_path} is not a run folder" in said


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("data.path=~/digits", "~/digits"),
        ("data.path=~/digits-{0..3}.tar", "~/digits-{0..3}.tar"),
        ("data.path=http://127.0.0.1:9", "~/.cache/ganscale"),
    ],
)
def test_a_folder_below_a_home_that_is_not_known_is_named(
    runs: Runs, complaint, setting: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as for the user of a container
    sentence = complaint("train", *runs.settings("homeless", setting))
    assert sentence == (
        f"{name} begins with ~, but no home folder is known here: set HOME, or name the folder"
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_trains_whatever_streams_its_caller_has_closed(runs: Runs, closed: str) -> None:
    command = runs.command("silent", "training.total_images=64", "data.workers=2")
    subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *command], cwd=REPOSITORY, check=True, timeout=300
    )
    assert (runs.folder / "silent" / "checkpoints" / "images-000000064").is_dir()
    assert len([*read_rows(runs.folder / "silent" / "metrics.jsonl")]) > 0


# More than any machine has; the critic alone, so that a plan needs no memory for it.
_HUGE = ["critic.options.width=4000000", "critic.options.max_width=100000000"]


def test_too_little_memory_is_one_sentence_whatever_the_command(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = runs.settings("huge", *_HUGE)
    runs.finish("small", "training.total_images=32")
    stored = runs.folder / "small" / "config.yaml"
    generator = "    width: 4000000\n    max_width: 100000000\n"
    stored.write_text(stored.read_text().replace("    width: 4\n", generator))
    for command in (
        ["train", "--dry-run", *settings],
        ["config", "--check", *settings],
        ["checkpoint", "export", str(stored.parent), str(runs.folder / "exported")],
        ["sample", str(stored.parent), "--grid", str(runs.folder / "grid.png")],
    ):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: out of memory (no ")
    assert main(["train", *settings]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ran out of memory in `building the networks`" in line


def test_a_record_that_does_not_fit_into_memory_is_one_sentence(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real file is large enough everywhere, so the reader of the record raises the error."""

    def read(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ganscale.report.read_runs", read)
    assert main(["report", str(runs.folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: this machine or GPU")
