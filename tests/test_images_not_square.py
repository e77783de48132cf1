"""Images of another height than width, through everything that a user does with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ganscale
from ganscale.cli.main import main
from ganscale.data.manifest import Manifest
from tests.helpers.images import encoded
from tests.helpers.runs import Runs, checkpoint_bits

HEIGHT, WIDTH = 16, 32
SETTINGS = (
    f"data.resolution=[{HEIGHT}, {WIDTH}]",
    "data.channels=3",
    "data.flip=true",
    "training.precision=float64",
    "training.total_images=64",  # two cycles
    "augmentation={pipeline: ada, probability: 0.5}",
    "evaluation.every_images=64",
    "evaluation.samples=20",
    "evaluation.network=tests.helpers.feature_networks:Projection",
)


def size_of(file: Path) -> tuple[int, int]:
    """Width and height."""
    with Image.open(file) as image:
        return image.size


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, high and wide ones."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, size in enumerate([(24, 40), (50, 30), (16, 32), (33, 97)] * 12):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        (folder / f"{number:02d}.png").write_bytes(encoded(pixels))
    return folder


@pytest.fixture(scope="module")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["shards", "write", str(photos), str(folder), "--resolution", "16x32"]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a run named `one`, of one process."""
    folder = tmp_path_factory.mktemp("runs")
    runs = Runs(folder, data)
    runs.finish("one", *SETTINGS, f"data.cache={folder}/cache")
    return runs


def test_shards_hold_and_show_them(
    data: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Manifest.load(data).resolution == (HEIGHT, WIDTH)
    sheets = ["--sheet", str(tmp_path / "sheet.png"), "--augment", str(tmp_path / "augmented.png")]
    assert main(["shards", "show", str(data), *sheets, "--count", "4"]) == 0
    assert "resolution   16 x 32\n" in capsys.readouterr().out
    assert size_of(tmp_path / "sheet.png") == (2 * WIDTH, 2 * HEIGHT)
    assert size_of(tmp_path / "augmented.png")[1] % HEIGHT == 0
    again = ["shards", "write", str(photos), str(data), "--resolution", "32x16"]
    assert main(again) == 2
    assert "with a different resolution" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*again[:-1], "16x32x3"])
    assert "not a size, such as 64 or 64x128" in capsys.readouterr().err


def test_two_ranks_train_the_run_of_one(runs: Runs) -> None:
    runs.finish("two", *SETTINGS, f"data.cache={runs.folder}/cache", ranks=2)
    for name in ("loss/critic", "loss/generator", "penalty/wgan_gp"):
        one, two = ([row[name] for row in runs.rows(run)] for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-10)
        assert len(one) == 2


def test_a_run_continues_with_the_same_size_written_otherwise_only(
    runs: Runs, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint_bits(runs.checkpoints("one")[-1])
    command = ["train", str(runs.folder / "one" / "config.yaml"), "training.total_images=64"]
    assert main([*command, f"data.resolution=[{HEIGHT},{WIDTH}]", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "16 x 32 x 3 pixels" in printed
    assert "has 64 images already" in printed
    assert checkpoint_bits(runs.checkpoints("one")[-1]) == before
    assert main([*command, f"data.resolution={HEIGHT}", "--dry-run"]) == 2
    assert "data.resolution: [16, 32] -> 16" in capsys.readouterr().err


def test_samples_and_exports_have_their_size(runs: Runs, tmp_path: Path) -> None:
    run = runs.folder / "one"
    grid = run / "samples" / "images-000000064.png"
    assert size_of(grid) == (2 * WIDTH, 2 * HEIGHT)  # of four
    where = ["--folder", str(tmp_path / "png"), "--shards", str(tmp_path / "shards")]
    where += ["--grid", str(tmp_path / "grid.png"), "--columns", "3"]
    assert main(["sample", str(run), "--count", "5", *where]) == 0
    assert size_of(tmp_path / "grid.png") == (3 * WIDTH, 2 * HEIGHT)
    assert {size_of(file) for file in (tmp_path / "png").iterdir()} == {(WIDTH, HEIGHT)}
    assert Manifest.load(tmp_path / "shards").resolution == (HEIGHT, WIDTH)
    assert main(["checkpoint", "export", str(run), str(tmp_path / "exported")]) == 0
    images = ganscale.load_generator(tmp_path / "exported").sample(2)
    assert images.shape == (2, 3, HEIGHT, WIDTH)


def test_evaluations_read_the_reference_in_their_size(
    runs: Runs, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.folder / "one"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (identity,) = [row["eval/identity"] for row in rows if "eval/identity" in row]
    assert identity
    asked = ["--metrics", "fd", "--samples", "20", "--json"]
    network = ["--network", "tests.helpers.feature_networks:Projection"]
    exported = tmp_path / "exported"
    assert main(["checkpoint", "export", str(run), str(exported)]) == 0
    capsys.readouterr()
    sources = [str(run), str(exported), str(data)]
    assert main(["evaluate", *sources, "--reference", str(data), *network, *asked]) == 0
    of_run, of_export, of_data = json.loads(capsys.readouterr().out)
    assert of_run["eval/reference"].endswith("at 16 x 32 x 3")
    assert of_run["eval/fd_Projection"] == pytest.approx(of_export["eval/fd_Projection"])
    assert of_data["eval/fd_Projection"] < of_run["eval/fd_Projection"]


def test_a_report_shows_their_grids(runs: Runs, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(runs.folder / "one"), "--output", str(page)]) == 0
    assert f'width="{2 * WIDTH}" height="{2 * HEIGHT}"' in page.read_text()


def test_a_plan_counts_their_bytes(runs: Runs, tmp_path: Path) -> None:
    def planned(resolution: str) -> dict:
        settings = runs.settings("planned", *SETTINGS, f"data.resolution={resolution}")
        assert main(["plan", *settings, "--json", str(tmp_path / "plan.json")]) == 0
        return json.loads((tmp_path / "plan.json").read_text())

    wide, square = planned("[16, 32]"), planned("32")
    of_wide, of_square = wide["host_memory"], square["host_memory"]
    numbers = 16 * of_wide["batches"]  # labels and slots of 8 bytes
    assert of_wide["batches_bytes"] == numbers * (HEIGHT * WIDTH * 3 + 16)
    assert of_square["batches_bytes"] == numbers * (32 * 32 * 3 + 16)
    ratio = square["device_memory"]["bytes_per_image"] / wide["device_memory"]["bytes_per_image"]
    assert 1.8 < ratio < 2.1
