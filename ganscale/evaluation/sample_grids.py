"""The sample grids in a run's folder `samples`: `images-000123456.png` of the EMA generator and
`non_ema-000123456.jpg` of the weights as trained, for the same latents; `real.jpg`; and
`interpolation-000123456.jpg`, whose rows go from one latent to another.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ganscale.data.batch import Batch
from ganscale.data.images.grid import image_grid, to_pil_image
from ganscale.evaluation.sampling import (
    generate_uint8,
    interpolate_latents,
    interpolation_positions,
    sample_labels,
    sample_latents,
)
from ganscale.files import atomic_write
from ganscale.run_folder import RunFolder
from ganscale.schema import Config

INTERPOLATION_STEPS = 8
_FORMATS = {".png": ("PNG", {}), ".jpg": ("JPEG", {"quality": 90})}


class SampleGrids:
    """Makes the grids and writes them atomically, on rank 0 only."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        generator: nn.Module,
        ema: nn.Module,
        num_classes: int,
        images_seen: int,
        *,
        lacks_real: bool = True,
    ) -> None:
        """`lacks_real`: the record has no row yet with the grid of real images."""
        self._config = config.samples
        self._seed = config.seed
        self._latent_dim = config.generator.latent_dim
        self._folder = folder
        self._generator = generator
        self._ema = ema
        self._num_classes = num_classes
        self._columns = max(1, round(math.sqrt(self._config.count)))
        is_due = self._config.real and lacks_real
        self._real_images: list[np.ndarray] | None = [] if is_due else None
        self._keeps_real = images_seen > 0  # later images are not the first ones

    def make(self, images_seen: int, is_stopped: Callable[[], bool]) -> dict[str, Path]:
        """The files by their name in a row; {} when stopped meanwhile. Raises OSError if a file
        cannot be written."""
        config = self._config
        latents = sample_latents(self._seed, 0, config.count, self._latent_dim)
        labels = sample_labels(0, config.count, self._num_classes)
        positions = torch.arange(config.count)
        inputs: dict[str, tuple[nn.Module, Tensor, Tensor | None, Tensor, int]] = {
            "ema": (self._ema, latents, labels, positions, self._columns)
        }
        if config.non_ema:
            inputs["non_ema"] = (self._generator, latents, labels, positions, self._columns)
        if rows := config.interpolations:
            steps = INTERPOLATION_STEPS
            latents = interpolate_latents(self._seed, rows, steps, self._latent_dim)
            labels = sample_labels(0, rows, self._num_classes, steps)
            positions = interpolation_positions(rows, steps)
            inputs["interpolation"] = (self._ema, latents, labels, positions, steps)
        grids: dict[str, np.ndarray] = {}
        for kind, (generator, latents, labels, positions, columns) in inputs.items():
            images: list[np.ndarray] = []
            made = generate_uint8(generator, latents, labels, seed=self._seed, positions=positions)
            with closing(made) as chunks:
                for chunk in chunks:
                    images.append(chunk.numpy())
                    if is_stopped():
                        return {}
            grids[kind] = image_grid(np.concatenate(images), columns)
        return {
            f"samples/{kind}": _write(grid, self._folder.sample_grid(images_seen, kind))
            for kind, grid in grids.items()
        }

    def add_real_images(self, batches: Sequence[Batch]) -> Path | None:
        """The file of the first real images that this rank trains on, once there are enough, or of
        those of an earlier session."""
        if self._real_images is None:
            return None
        path = self._folder.real_samples
        if self._keeps_real and path.exists():
            self._real_images = None
            return path
        for batch in batches:
            self._real_images += list(batch.images.cpu().numpy().copy())
        if len(self._real_images) < self._config.count:
            return None
        images, self._real_images = np.stack(self._real_images[: self._config.count]), None
        return _write(image_grid(images, self._columns), path)


def _write(grid: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    name, options = _FORMATS[path.suffix]
    with atomic_write(path) as file:
        to_pil_image(grid).save(file, name, **options)
    return path
