"""A picture of what each transformation of a pipeline does to images of a data set."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ganscale.augmentation.pipelines import PIPELINES, build_pipeline
from ganscale.data.images.grid import image_grid
from ganscale.data.images.preprocessing import to_bytes, to_network_range
from ganscale.data.manifest import Manifest
from ganscale.random import drawing, normal_like
from ganscale.shards.sample_sheet import read_samples

_LABEL_PIXELS = 96  # the longest name takes 70


def write_contact_sheet(manifest: Manifest, path: Path, pipeline: str, columns: int) -> int:
    """Writes a PNG: a row for the images as they are, and one for each transformation, applied to
    all of them at full strength; a last one for the pipeline's default with probability 1. Returns
    how many of the images are bad, and left black.

    Where all images are gray, transformations that need color are left out.
    """
    images, bad_samples = read_samples(manifest, columns)
    if (images == images[..., :1]).all():
        images = images[..., :1]
    rows = list(_rows(pipeline, torch.from_numpy(images)))
    cells = np.concatenate([row for _, row in rows])
    grid = np.broadcast_to(cells, (*cells.shape[:3], 3))
    sheet = Image.fromarray(image_grid(grid, len(images)))
    height, labeled = sheet.height, Image.new("RGB", (sheet.width + _LABEL_PIXELS, sheet.height))
    labeled.paste(sheet, (_LABEL_PIXELS, 0))
    draw = ImageDraw.Draw(labeled)
    for row, (name, _) in enumerate(rows):
        middle = (row + 0.5) * height / len(rows)
        draw.text((4, middle), name, fill="white", anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    labeled.save(path, "PNG")
    return bad_samples


def _rows(pipeline: str, images: torch.Tensor) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (columns, height, width, channels) uint8)."""
    is_gray = images.shape[-1] == 1
    yield "original", images.numpy()
    shown = [t for t in PIPELINES[pipeline].transformations if not (t.needs_color and is_gray)]
    for name in dict.fromkeys(each.name for each in shown):
        yield name, _augmented(pipeline, {name: 1.0}, images)
    yield "the default", _augmented(pipeline, {}, images)


def _augmented(name: str, strengths: dict[str, float], images: torch.Tensor) -> np.ndarray:
    pipeline = build_pipeline(name, strengths, images.shape[-1])
    real, slots = to_network_range(images), torch.arange(len(images))
    numbers = pipeline.draw("contact sheet").at(0, slots)
    drawn = {"parameters": pipeline.parameters(numbers, 1.0)}
    if pipeline.adds_noise:
        with drawing(0, ("contact sheet",), slots):
            drawn["noise"] = normal_like(real, "noise")
    return to_bytes(pipeline(real, drawn)).numpy()
