"""What W&B gets for the values of a row, as the real client's types, without a server."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganscale.run_folder import RunFolder
from ganscale.tracking.wandb_run import WandbValues


def save(path: Path, width: int, height: int) -> str:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((height, width), 7, np.uint8)).save(path)
    return f"samples/{path.name}"


def test_a_value_that_wandb_cannot_take_is_left_out_with_one_warning(tmp_path, caplog):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "damaged.png").write_bytes(b"not an image")
    row = {
        "samples/gone": "samples/gone.png",
        "samples/damaged": "samples/damaged.png",
        "logits/real_histogram": {"counts": [1, 2, 3], "edges": [0.0, 1.0]},
        "logits/fake_histogram": {"edges": [0.0, 1.0]},
        "loss/critic": 0.5,
    }
    values = WandbValues(RunFolder(tmp_path))
    assert values.convert(row) == values.convert(row) == {"loss/critic": 0.5}
    assert len(caplog.records) == 1
    assert "samples/gone" in caplog.text


@pytest.mark.parametrize("name", ["grid.png", "grid.jpg"])
def test_an_image_beyond_pillows_limit_is_shrunk(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are an error
    path = save(tmp_path / "samples" / name, 4096, 1024)
    image = WandbValues(RunFolder(tmp_path)).convert({"samples/ema": path})["samples/ema"]
    assert (image._width, image._height, image.format) == (2048, 512, "jpg")
    assert not caplog.records
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_small_jpeg_is_given_as_it_is(tmp_path):
    path = save(tmp_path / "samples" / "raw.jpg", 64, 32)
    image = WandbValues(RunFolder(tmp_path)).convert({"samples/non_ema": path})["samples/non_ema"]
    assert Path(image._path) == tmp_path / path


def test_pictures_that_lie_elsewhere_are_left_out(tmp_path, caplog):
    """As in a run of someone else's: absolute and relative paths, and links."""
    save(tmp_path / "private.png", 8, 8)
    save(tmp_path / "private.jpg", 8, 8)
    run = tmp_path / "run"
    run.mkdir()
    own = save(run / "samples" / "own.jpg", 8, 8)
    (run / "samples" / "link.jpg").symlink_to(tmp_path / "private.jpg")
    (run / "samples" / "folder").symlink_to(tmp_path)
    os.mkfifo(run / "samples" / "pipe.png")
    row = {
        f"samples/{number}": path
        for number, path in enumerate(
            [
                str(tmp_path / "private.png"),
                "../private.png",
                "samples/../../private.jpg",
                "samples/link.jpg",
                "samples/folder/private.png",
                "samples/pipe.png",
            ]
        )
    }
    values = WandbValues(RunFolder(run)).convert({**row, "samples/own": own})
    assert [*values] == ["samples/own"]
    assert "W&B cannot take samples/0 (ValueError: " in caplog.text
