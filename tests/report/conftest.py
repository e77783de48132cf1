"""A browser for the tests of this folder, and run folders to report on."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.report import chromium
from tests.report.made_rows import MakeRun, row


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """One headless Chromium for all tests: it takes a second to start."""
    if reason := chromium.is_missing():
        if os.environ.get("GANSCALE_REQUIRE_ALL_TESTS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    browser = chromium.Chromium(tmp_path_factory.mktemp("chromium"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder as training does: rows, a config, a log, a summary and sample grids."""

    def make(name: str, *, loss: str = "wgan", rows: int = 40, grids: int = 3) -> Path:
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for number in range(1, rows + 1):
                file.write(json.dumps(row(number, loss)) + "\n")
        (folder / "config.yaml").write_text(
            f"run: {{name: {json.dumps(name)}}}\n"
            f"objective: {{loss: {{name: {loss}}}, penalties: {{}}, n_critic: 2}}\n"
            f"training: {{total_images: {rows * 640}, global_batch_size: 64}}\n"
        )
        (folder / "log.txt").write_text("2026-01-01 10:00:00 640 of 25,600 images\n")
        summary = {
            "images_seen": rows * 640,
            "training_seconds": 20.0,
            "images_per_second": rows * 32.0,
            "exit_code": 0,
            "bad_samples": 0,
            "sessions": [{"images_seen": 0, "world_size": 1}],
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        for number in range(grids):
            grid = Image.new("RGB", (64, 64), (80 * number, 40, 200))
            grid.save(folder / "samples" / f"images-{number * 6400:09d}.png")
        return folder

    return make
