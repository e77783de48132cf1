"""The bundled image sets contain what their documentation states."""

from pathlib import Path

import numpy as np
import pytest

from ganscale.data.images.grid import image_grid
from ganscale.errors import UserError
from ganscale.shards import bundled


def test_mnist_is_five_hundred_of_each_digit_with_a_black_border():
    digits = bundled.load("mnist")
    assert digits.images.shape == (5000, 32, 32, 1)
    assert digits.images.dtype == np.uint8
    assert np.bincount(digits.labels).tolist() == [500] * 10
    assert digits.class_names == [str(digit) for digit in range(10)]
    inner = digits.images[:, 2:-2, 2:-2]
    assert inner.sum() == digits.images.sum() > 0


def test_emoji_are_different_colour_images_on_white_with_named_categories():
    emoji = bundled.load("emoji")
    assert emoji.images.shape == (3786, 32, 32, 3)
    assert len({image.tobytes() for image in emoji.images}) > 3700
    corners = emoji.images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.median(corners) == 255
    assert set(emoji.labels) == set(range(len(emoji.class_names)))
    flags = emoji.images[emoji.labels == emoji.class_names.index("Flags")]
    assert len(flags) == 270


def test_labels_belong_to_their_images():
    """A digit is nearest to the mean of its own class far more often than by chance."""
    digits = bundled.load("mnist")
    flat = digits.images.reshape(5000, -1).astype(np.float32)
    means = np.stack([flat[digits.labels == label].mean(0) for label in range(10)])
    distances = (means**2).sum(1) - 2 * flat @ means.T
    assert (distances.argmin(1) == digits.labels).mean() > 0.75


def test_each_set_comes_with_its_licence():
    for name in bundled.NAMES:
        licence = Path(bundled.__path__[0], f"{name}.LICENSE.txt")
        assert "made available under" in licence.read_text(encoding="utf-8")


def test_an_unknown_set_is_named_with_those_that_exist():
    with pytest.raises(UserError, match=r"'cats': choose from emoji, mnist"):
        bundled.load("cats")


def test_a_grid_lays_images_out_row_by_row_and_fills_up_with_black():
    images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    grid = image_grid(images, columns=3)
    assert grid.shape == (4, 9, 1)
    assert grid[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
