"""`ganscale evaluate` of images, data sets and exported generators, and what it refuses."""

import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ganscale.checkpoints.checkpoint import checkpoint_folders
from ganscale.cli.evaluate import as_json
from ganscale.cli.main import main
from ganscale.data.manifest import Manifest
from ganscale.evaluation.figures import Figures, Identity
from ganscale.evaluation.quality.frechet import GaussianStatistics
from ganscale.evaluation.quality.statistics_files import save_statistics
from ganscale.shards.sources import image_reader, list_images
from tests.helpers.images import encoded
from tests.helpers.runs import Runs
from tests.helpers.tars import truncate

COUNT = 60
NETWORK = ("--network", "tests.helpers.feature_networks:Projection")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of the first digits."""
    source = list_images("bundled:mnist")
    read = image_reader(source.kind, source.path)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(source.images[:COUNT]):
        (tmp_path / "images" / f"{number:03d}.png").write_bytes(read(image))
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is printed for arguments that are refused."""
    assert main(["evaluate", *map(str, arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") or "error: " in printed.splitlines()[-1]
    return printed.splitlines()[-1].removeprefix("error: ")


def test_a_folder_a_zip_and_a_data_set_of_the_same_images_have_the_same_figures(
    images: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted(images.iterdir()):
            archive.write(file, file.name)
    assert main(["shards", "write", str(images), str(tmp_path / "set")]) == 0
    capsys.readouterr()
    sources = [str(path) for path in (images, tmp_path / "images.zip", tmp_path / "set")]
    asked = ["--reference", str(digits), *NETWORK, "--metrics", "fd, precision", "--json"]
    assert main(["evaluate", *sources, *asked]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.pop("source") for row in rows] == sources
    for row in rows:
        assert row.keys() == rows[0].keys()
        assert row["eval/identity"] == rows[0]["eval/identity"]
        for name in ("eval/fd_Projection", "eval/precision_Projection"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-9)
    assert rows[0]["eval/samples"] == COUNT
    assert rows[0]["eval/precision_Projection"] == 1  # they are among the reference


def test_a_figure_that_is_not_finite_is_valid_json() -> None:
    identity = Identity("lite", "ab", "none", "data", 9, 9)
    found = Figures({"eval/fd_lite": math.nan, "eval/class_kl_lite": math.inf}, identity, 1.0)
    row = json.loads(as_json([("images", found)]), parse_constant=pytest.fail)[0]
    assert (row["eval/fd_lite"], row["eval/class_kl_lite"]) == ("nan", "inf")


def test_what_cannot_be_judged_is_refused_in_one_sentence(
    images: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = ("--reference", digits)
    (tmp_path / "empty").mkdir()
    for sources, options, complaint in (
        ([tmp_path / "nowhere"], reference, "there is no"),
        ([tmp_path / "empty"], reference, "no images in"),
        ([images], (), "give --reference"),
        ([images], ("--reference", images), "ganscale shards write"),
        ([images], (*reference, "--samples", str(COUNT + 1)), f"has {COUNT} images, not 61"),
        ([images], (*reference, "--samples", "1"), "at least 2 samples"),
        ([images], (*reference, "--metrics", "precison"), "did you mean"),
        ([images], (*reference, "--metrics", "fid"), "ask for `fd`"),
        ([images], (*reference, "--option", "path"), "write KEY=VALUE"),
        ([images], (*reference, "--checkpoint", "all"), "are for runs"),
        ([images], (*reference, "--weights", "generator"), "are for runs"),
    ):
        printed = mistake(capsys, *sources, *options, *NETWORK)
        assert complaint in printed, printed
    (images / "000.png").write_bytes(b"not an image")
    assert "000.png in " in mistake(capsys, images, *reference, *NETWORK)
    (images / "000.png").write_bytes(encoded(np.zeros((8, 9), np.uint8)))
    complaint = "have 32 x 32 pixels, those that are evaluated 8 x 9: write the reference in that"
    assert complaint in mistake(capsys, images, *reference, *NETWORK)
    (images / "000.png").write_bytes(encoded(np.zeros((32, 32), np.uint8)))
    (images / "001.png").write_bytes(encoded(np.zeros((8, 9), np.uint8)))
    assert "8 x 9 pixels, not 32 x 32" in mistake(capsys, images, *reference, *NETWORK)


def test_a_reference_of_another_size_or_without_the_colors_is_refused(
    images: Path, digits: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the run's own data are stored like it, and so converted in the same way."""
    small, colored = tmp_path / "small", tmp_path / "colored"
    assert main(["shards", "write", str(images), str(small), "--resolution", "16"]) == 0
    (tmp_path / "red").mkdir()
    for number in range(COUNT):
        red = encoded(np.full((32, 32, 3), (200, number, 0), np.uint8))
        (tmp_path / "red" / f"{number:03d}.png").write_bytes(red)
    assert main(["shards", "write", str(tmp_path / "red"), str(colored)]) == 0
    runs.finish("run", "training.total_images=160", "checkpoint.every_images=160")
    run, samples = runs.folder / "run", ("--samples", "20")
    for reference, problem in (
        (small, "have 16 x 16 pixels, those that are evaluated 32 x 32"),
        (colored, "are in color, those that are evaluated gray"),
    ):
        for source in (run, images):
            options = "--reference", reference, *samples, *NETWORK
            assert problem in mistake(capsys, source, *options)
        evaluation = f"evaluation.reference={reference}", "evaluation.every_images=160"
        network = f"evaluation.network={NETWORK[1]}", "evaluation.samples=20"
        assert problem in runs.finish("other", *evaluation, *network, exit_code=2)
    assert main(["evaluate", str(images), "--reference", str(digits), *samples, *NETWORK]) == 0
    data = f"data.path={small}", "training.total_images=160", "checkpoint.every_images=160"
    runs.finish("enlarged", *data)
    reference = "--reference", str(small), *samples, *NETWORK
    assert main(["evaluate", str(runs.folder / "enlarged"), *reference]) == 0


def test_a_run_is_evaluated_against_other_data_when_its_own_are_gone(
    digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits, tmp_path / "own")
    runs = Runs(tmp_path / "runs", tmp_path / "own")
    runs.finish("run", "training.total_images=160", "checkpoint.every_images=160")
    reference = "--reference", str(digits), "--samples", "20", *NETWORK
    for shard in (tmp_path / "own").glob("*.tar"):
        shard.unlink()
    assert main(["evaluate", str(runs.folder / "run"), *reference]) == 0
    (tmp_path / "own" / "manifest.json").write_text("{")
    assert main(["evaluate", str(runs.folder / "run"), *reference]) == 0
    shutil.rmtree(tmp_path / "own")
    assert main(["evaluate", str(runs.folder / "run"), *reference]) == 0


def test_statistics_of_another_network_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(dim: int) -> Path:
        statistics = GaussianStatistics(torch.zeros(dim).double(), torch.eye(dim).double(), 99)
        save_statistics(tmp_path / f"{dim}.npz", statistics)
        return tmp_path / f"{dim}.npz"

    asked = [str(images), *NETWORK, "--metrics", "fd,is"]
    assert "has 8 features" in mistake(capsys, *asked, "--reference", file(2048))
    kernel = ("--metrics", "kid", "--reference", file(8))
    assert "needs the images" in mistake(capsys, images, *NETWORK, *kernel)
    assert main(["evaluate", *asked, "--reference", str(file(8))]) == 0
    assert "8.npz (sha256 " in capsys.readouterr().out


def test_saved_statistics_of_a_reference_stand_in_for_it(
    images: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "digits.npz"
    asked = [str(images), *NETWORK, "--metrics", "fd,fd64", "--json"]
    saved = ("--save-statistics", str(file))
    assert main(["evaluate", *asked, "--reference", str(digits), *saved]) == 0
    (expected,) = json.loads(capsys.readouterr().out)
    assert main(["evaluate", *asked, "--reference", str(file)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    for name in ("eval/fd_Projection", "eval/reference_images"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
    elsewhere = ("--reference", file, "--save-statistics", tmp_path / "nowhere" / "x.npz")
    assert "cannot be written" in mistake(capsys, *asked, *elsewhere)
    assert "must end with .npz" in mistake(capsys, *asked, "--save-statistics", "digits.txt")


def test_an_exported_generator_has_the_figures_of_its_run(
    runs: Runs, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.finish("run", "training.total_images=64", f"data.cache={tmp_path}/cache", "seed=3")
    run, exported = str(runs.folder / "run"), str(tmp_path / "exported")
    assert main(["checkpoint", "export", run, exported]) == 0
    capsys.readouterr()
    common = ["--reference", str(digits), "--samples", "50", "--json", *NETWORK, "--seed", "3"]
    assert main(["evaluate", run, exported, *common]) == 0
    one, other = json.loads(capsys.readouterr().out)
    assert one["eval/fd_Projection"] == pytest.approx(other["eval/fd_Projection"], rel=1e-9)
    assert one["eval/identity"] == other["eval/identity"]


def test_one_damaged_checkpoint_does_not_lose_the_figures_of_the_others(
    runs: Runs, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("training.total_images=96", "checkpoint.every_images=32", "checkpoint.keep_last=9")
    runs.finish("run", *settings, f"data.cache={tmp_path}/cache")
    checkpoints = checkpoint_folders(runs.folder / "run" / "checkpoints")
    assert len(checkpoints) == 3
    truncate(checkpoints[1] / "ema.safetensors", 100)
    capsys.readouterr()
    common = ["--reference", str(digits), "--samples", "50", "--json", *NETWORK]
    assert main(["evaluate", str(runs.folder / "run"), "--checkpoint", "all", *common]) == 2
    printed = capsys.readouterr()
    names = [Path(row["source"]).name for row in json.loads(printed.out)]
    assert names == [checkpoints[0].name, checkpoints[2].name]
    assert "error: 1 of 3 checkpoints could not be evaluated: " in printed.err
    assert f"{checkpoints[1].name} is damaged or no longer there" in printed.err


def test_weights_that_do_not_fit_the_code_get_one_sentence(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.finish("run", "training.total_images=32")
    config = runs.folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("width: 4", "width: 8"))
    capsys.readouterr()
    grid = str(tmp_path / "grid.png")
    assert main(["sample", str(runs.folder / "run"), "--grid", grid]) == 2
    assert "the weights do not fit dcgan" in capsys.readouterr().err


def test_figures_against_other_data_do_not_share_a_table(
    runs: Runs, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "write", "bundled:emoji", str(tmp_path / "emoji")]) == 0
    settings = ("training.total_images=64", f"evaluation.network={NETWORK[1]}")
    runs.finish("digits", *settings)
    runs.finish("emoji", *settings, f"data.path={tmp_path}/emoji")
    capsys.readouterr()
    folders = [runs.folder / name for name in ("digits", "emoji")]
    printed = mistake(capsys, *folders, "--samples", "50")
    prints = [Manifest.load(path).fingerprint[:16] for path in (digits, tmp_path / "emoji")]
    assert "are not comparable (reference: data " in printed
    assert all(each in printed for each in prints)
