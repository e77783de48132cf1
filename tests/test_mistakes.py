"""Each mistake of a user's: one sentence that says what, where and what would be right; exit 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Runs

_DEMO = str(REPOSITORY / "configs" / "demo.yaml")


def complaint(runs: Runs, *settings: str, ranks: int = 1) -> str:
    """What `ganscale train` says to these settings; asserts that it is a sentence and exit 2."""
    output = runs.finish("mistake", *settings, ranks=ranks, exit_code=2 if ranks == 1 else 1)
    assert ranks > 1 or "Traceback" not in output  # accelerate's launcher prints one of its own
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
        ("data.resolution=48", "48"),
        ("generator.target=dcgann", "dcgann"),
        ("critic.options.widht=3", "widht"),
        ("objective.loss.name=wgann", "unknown loss 'wgann' (did you mean 'wgan'?)"),
        ("training.precision=float16", "`training.precision` must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_what_would_be_right(
    runs: Runs, setting: str, expected: str
) -> None:
    assert expected in complaint(runs, setting)
    assert not (runs.folder / "mistake").exists()


def test_a_typing_error_in_a_file_names_the_file(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trainning: {total_images: 3}\n")
    expected = f"{file}: unknown key `trainning`; did you mean `training`?"
    assert complaint(runs, str(file)) == expected


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_the_nearest(runs: Runs) -> None:
    message = complaint(runs, "training.global_batch_size=15", ranks=2)
    assert message == (
        "`training.global_batch_size` of 15 cannot be dealt evenly to 2 ranks of 1 micro-batches: "
        "choose 14 or 16"
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
    runs: Runs, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert expected in complaint(runs)


def test_labels_that_are_not_there_are_missed(runs: Runs, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from PIL import Image

    for i in range(64):
        Image.new("L", (32, 32), i).save(pictures / f"{i}.png")
    write = [sys.executable, "-m", "ganscale", "shards", "write", str(pictures)]
    subprocess.run([*write, str(tmp_path / "unlabelled")], check=True, timeout=60)
    settings = (f"data.path={tmp_path / 'unlabelled'}", "training.conditional=true")
    assert "needs class labels" in complaint(runs, *settings)


def test_images_that_are_none_are_refused_when_written(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.png").write_text("not an image")
    command = [sys.executable, "-m", "ganscale", "shards", "write", str(texts), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "can be decoded" in done.stderr
    assert "png cannot be decoded: its format is none that is known" in done.stderr


def test_a_missing_shard_is_named(runs: Runs, digits: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(digits, damaged)
    shard = sorted(damaged.glob("*.tar"))[2]
    shard.unlink()
    assert complaint(runs, f"data.path={damaged}") == (
        f"the shard {shard} of the manifest is missing"
    )


def test_another_run_in_the_same_folder_is_refused_by_name(runs: Runs) -> None:
    runs.finish("mistake", "training.total_images=64")
    message = complaint(runs, "training.total_images=64", "optimizer.critic.learning_rate=0.5")
    assert "optimizer.critic.learning_rate: 0.0005 -> 0.5" in message
    assert "resume.allow=[optimizer.critic.learning_rate]" in message


def test_a_sample_of_no_run_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ganscale", "sample", str(tmp_path), "--grid", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{tmp_path} is not a run folder" in done.stderr
