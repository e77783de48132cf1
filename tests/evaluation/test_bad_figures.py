"""Evaluations of what cannot be judged, or hardly, and where nothing can be cached."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from ganscale.cli.main import main
from tests.helpers.disks import remount, small_disk
from tests.helpers.runs import Runs, read_rows

NETWORK = "tests.helpers.feature_networks:Projection"
FD = "eval/fd_Projection"
NAN = "the generator makes images with NaN or infinite pixels"


@pytest.fixture(autouse=True)
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the command caches references."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "ganscale" / "references"


def asked(digits: Path) -> list[str]:
    """Arguments for figures of 60 digits beside 200."""
    reference = ["--reference", str(digits), "--reference-images", "200"]
    figures = ["--samples", "60", "--network", NETWORK, "--metrics", "fd,kid"]
    return [str(digits), *reference, *figures, "--json"]


@pytest.fixture(scope="module")
def of_nan(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, str]:
    """A run whose EMA generator makes NaN, to its end, and what it printed."""
    runs = Runs(tmp_path_factory.mktemp("nan"), digits)
    printed = runs.finish(
        "run",
        "generator.target=tests.evaluation.bad_networks:NaNWhenEvaluated",
        "training.total_images=64",
        "evaluation={every_images: 32, samples: 20, reference_images: 200}",
        f"evaluation.network={NETWORK}",
        f"data.cache={runs.folder}/cache",
    )
    return runs.folder / "run", printed


def test_evaluations_of_a_generator_that_makes_nan_are_counted_and_the_run_goes_on(
    of_nan: tuple[Path, str],
) -> None:
    folder, printed = of_nan
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval/failed" in row]
    assert [(row["progress/images_seen"], row["eval/failed"]) for row in rows] == [(32, 1), (64, 2)]
    assert not any(FD in row for row in rows)
    assert f"the evaluation at 64 images failed: {NAN}\n" in printed
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["images-000000064"]


def test_a_checkpoint_whose_generator_makes_nan_is_refused_in_one_sentence(
    of_nan: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(of_nan[0])]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"error: {NAN}\n")


@contextmanager
def _file_in_place_of(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True)
    folder.write_text("not a folder")
    yield


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    with small_disk(folder, "4k"):
        yield


@contextmanager
def _read_only_disk(folder: Path) -> Iterator[None]:
    with small_disk(folder.parent, "64k"):
        remount(folder.parent, "ro")
        yield


@pytest.mark.parametrize(
    "obstacle",
    [
        _full_disk,
        _read_only_disk,
        _file_in_place_of,
    ],
)
def test_a_reference_that_cannot_be_cached_costs_a_warning_but_no_figure(
    obstacle: Callable[[Path], AbstractContextManager[None]],
    digits: Path,
    references: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(["evaluate", *asked(digits)]) == 0
    (expected,) = json.loads(capsys.readouterr().out)
    assert not caplog.messages
    shutil.rmtree(references.parent)
    with obstacle(references):
        assert main(["evaluate", *asked(digits)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    (warning,) = caplog.messages
    assert warning.startswith(f"the reference's features cannot be cached in {references}: ")
    assert found[FD] == expected[FD] > 0


def test_the_command_warns_of_fewer_samples_than_features(
    digits: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["evaluate", *asked(digits), "--option", "dim=59"]) == 0
    assert not caplog.messages
    assert main(["evaluate", *asked(digits), "--option", "dim=60"]) == 0
    (warning,) = caplog.messages
    assert "60 samples are too few for a Fréchet distance of 60 features" in warning
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.rindex("[") :])[0][FD] > 0
