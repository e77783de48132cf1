"""What a run starts with: said in a few lines, and tried without training."""

import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d

from ganscale.cli.main import main
from ganscale.config import resolve
from ganscale.runtime import has_slow_bfloat16
from ganscale.training import start
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import Runs

LINES = """\
device:     1 rank on cpu
data:       {data}: 5,000 samples, 10 classes, 32 x 32 x 1 pixels
networks:   generator dcgan with 19,065 parameters, critic dcgan with 2,908 parameters
run:        {run} starts at 0 of 64 images
"""


@pytest.fixture
def lines(runs: Runs, digits: Path) -> str:
    return LINES.format(data=digits, run=runs.folder / "new")


def test_a_run_begins_with_what_it_trains_on_what_and_where(runs: Runs, lines: str) -> None:
    settings = ("new", "training.total_images=64")
    printed = runs.finish(*settings)
    assert printed.startswith(lines)
    assert "64 of 64 images" in printed
    assert lines.splitlines()[0] in (runs.folder / "new" / "log.txt").read_text()
    again = runs.finish("new", "training.total_images=90")
    assert f"run:        {runs.folder / 'new'} continues at 64 of 90 images\n" in again
    assert "96 of 96 images" in again  # a run ends with a whole cycle
    done = runs.finish(*settings)
    assert f"{runs.folder / 'new'} has 96 images already, and is asked for 64 images\n" in done


def test_a_dry_run_says_what_would_start_and_writes_nothing(
    runs: Runs, lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = runs.settings("new", "training.total_images=64")
    assert main(["train", *settings[:3], "--dry-run", *settings[3:]]) == 0
    assert capsys.readouterr().out == f"{lines}everything fits; nothing was written\n"
    assert not (runs.folder / "new").exists()
    assert main(["config", "--check", *settings]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{lines}everything fits\n"
    assert "total_images: 64" in printed.out


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ("abc", "is 'abc', which is not a whole number"),
        ("0", "is 0, but there is at least one rank"),
    ],
)
def test_a_dry_run_refuses_a_launcher_that_counts_no_ranks(
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ranks: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert main(["train", *runs.settings("new"), "--dry-run"]) == 2
    assert f"WORLD_SIZE {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "stages", "is_slow", "says_so"),
    [
        ("bfloat16", 0, True, True),
        ("float32", 1, True, True),
        ("float32", 0, True, False),
        ("bfloat16", 0, False, False),
    ],
)
def test_a_run_says_that_its_device_computes_bfloat16_in_software(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    stages: int,
    is_slow: bool,
    says_so: bool,
) -> None:
    monkeypatch.setattr(start, "has_slow_bfloat16", lambda device: is_slow)
    settings = [str(REPOSITORY / "configs" / "r3gan_emoji32.yaml")]
    settings += [f"data.path={digits}", "data.channels=1"]
    settings += [f"run.folder={tmp_path}", f"generator.options.bfloat16_stages={stages}"]
    settings += ["augmentation.pipeline=none", f"training.precision={precision}"]
    lines = start.try_start(resolve(settings))
    assert any("in software, often much more slowly" in line for line in lines) == says_so


def test_bfloat16_in_software_is_recognized_by_its_speed() -> None:
    images, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)

    def seconds(dtype: torch.dtype) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            conv2d(images.to(dtype), weight.to(dtype), padding=1)
            times.append(time.perf_counter() - started)
        return min(times)

    is_slow = seconds(torch.bfloat16) > 3 * seconds(torch.float32)
    assert has_slow_bfloat16(torch.device("cpu")) == is_slow


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("generator.options.widht=3", "has no option 'widht'"),
        ("data.resolution=52", "52"),
        ("data.path=nowhere", "no data set at nowhere"),
        ("objective.loss=wgann", "unknown loss 'wgann'"),
        ("optimizer.critic.learning_rate=0.5", "holds a run with other settings"),
        ("evaluation.metrics=[fdd]", "there is no `fdd`"),
        ("evaluation.reference=nowhere", "no data set at nowhere"),
        ("evaluation.reference=none.npz", "there is no file none.npz"),
        ("training.cuda_graphs='true'", "is not possible, since the device is cpu"),
        ("log.wandb=online", "API key"),
        ("evaluation.network=tests.helpers.feature_networks:Nothing", "Nothing"),
        ("checkpoint.best=eval/fid", "is not among the figures of this run's evaluations"),
        ("training.generator_real=fresh", "generator_real` must be critic: the generator's loss"),
        ("training.global_batch_size=15", "cannot be divided evenly among 2 ranks"),
    ],
)
def test_a_dry_run_refuses_what_training_would_refuse(
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    complaint: str,
) -> None:
    if "learning_rate" in setting:
        runs.finish("new", "training.total_images=64")
        capsys.readouterr()
    if "batch" in setting:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
    evaluated = "evaluation.every_images=64" if "eval" in setting else "samples.count=4"
    settings = runs.settings("new", "training.total_images=64", evaluated, setting)
    assert main(["train", "--dry-run", *settings]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert "everything fits" not in printed.out
