"""What W&B is given for the values of a row; by the real client's types, without a server."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganscale.tracking.wandb_values import WandbValues


def save(path: Path, width: int, height: int) -> str:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((height, width), 7, np.uint8)).save(path)
    return f"samples/{path.name}"


def test_a_value_that_wandb_cannot_take_is_left_out_and_told_of_once(tmp_path, caplog):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "damaged.png").write_bytes(b"no picture")
    row = {
        "samples/gone": "samples/gone.png",
        "samples/damaged": "samples/damaged.png",
        "logits/real_histogram": {"counts": [1, 2, 3], "edges": [0.0, 1.0]},
        "logits/fake_histogram": {"edges": [0.0, 1.0]},
        "loss/critic": 0.5,
    }
    values = WandbValues(tmp_path)
    assert values.of(row) == values.of(row) == {"loss/critic": 0.5}
    assert len(caplog.records) == 1
    assert "samples/gone" in caplog.text


@pytest.mark.parametrize("name", ["grid.png", "grid.jpg"])
def test_a_picture_beyond_pillows_limit_is_shrunk(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are an error
    path = save(tmp_path / "samples" / name, 4096, 1024)
    picture = WandbValues(tmp_path).of({"samples/ema": path})["samples/ema"]
    assert (picture._width, picture._height, picture.format) == (2048, 512, "jpg")
    assert not caplog.records
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_small_jpeg_is_given_as_it_is(tmp_path):
    path = save(tmp_path / "samples" / "raw.jpg", 64, 32)
    picture = WandbValues(tmp_path).of({"samples/non_ema": path})["samples/non_ema"]
    assert Path(picture._path) == tmp_path / path
