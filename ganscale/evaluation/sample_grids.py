"""Pictures of a run, files in its folder `samples`: what the generators make, and real images.

`images-000123456.png` shows the EMA generator, `non_ema-000123456.jpg` the weights as trained, for
the same latents; each row of `interpolation-000123456.jpg` goes from one latent to another;
`real.jpg` shows real images.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ganscale.data.batch import Batch
from ganscale.data.images.grid import image_grid, to_pil_image
from ganscale.evaluation.sampling import (
    generate,
    interpolated_latents,
    sample_labels,
    sample_latents,
)
from ganscale.files import atomic_write
from ganscale.run_folder import RunFolder
from ganscale.schema import Config
from ganscale.training.state import TrainingState

INTERPOLATION_STEPS = 8
_FORMATS = {".png": ("PNG", {}), ".jpg": ("JPEG", {"quality": 90})}

Grid = np.ndarray
"""(height, width, channels) uint8"""


class SampleGrids:
    """Makes and writes them, on rank 0 only. What is written is whole."""

    def __init__(self, config: Config, folder: RunFolder, state: TrainingState) -> None:
        self._config = config.samples
        self._seed = config.seed
        self._latent_dim = config.generator.latent_dim
        self._folder = folder
        self._state = state
        self._real: list[np.ndarray] | None = None
        if config.samples.real and (state.images_seen == 0 or not self._real_path.exists()):
            self._real = []

    def are_missing(self) -> bool:
        """Whether the grid for the images seen so far is not there."""
        return not self._folder.samples(self._state.images_seen).exists()

    def make(self, is_stopped: Callable[[], bool]) -> dict[str, Path]:
        """The files by name of their row; none of them when stopped meanwhile.

        Raises OSError where they cannot be written.
        """
        config, state = self._config, self._state
        columns = max(1, round(math.sqrt(config.count)))
        latents = sample_latents(self._seed, 0, config.count, self._latent_dim)
        labels = sample_labels(0, config.count, state.num_classes)
        wanted: dict[str, tuple[nn.Module, Tensor, Tensor | None, int]] = {
            "ema": (state.ema, latents, labels, columns)
        }
        if config.non_ema:
            wanted["non_ema"] = (state.generator, latents, labels, columns)
        if config.interpolations:
            latents = interpolated_latents(
                self._seed, config.interpolations, INTERPOLATION_STEPS, self._latent_dim
            )
            labels = sample_labels(0, config.interpolations, state.num_classes)
            if labels is not None:
                labels = labels.repeat_interleave(INTERPOLATION_STEPS)
            wanted["interpolation"] = (state.ema, latents, labels, INTERPOLATION_STEPS)
        grids: dict[str, Grid] = {}
        for kind, (generator, latents, labels, columns) in wanted.items():
            grid = _grid(generator, latents, labels, columns, is_stopped)
            if grid is None:
                return {}
            grids[kind] = grid
        return {f"samples/{k}": _written(grid, self._path(k)) for k, grid in grids.items()}

    def real(self, batches: Sequence[Batch]) -> Path | None:
        """The file of the first real images that this rank trains on, once there are enough."""
        if self._real is None:
            return None
        self._real += [image for batch in batches for image in batch.images.cpu().numpy().copy()]
        count = self._config.count
        if len(self._real) < count:
            return None
        images, self._real = np.stack(self._real[:count]), None
        return _written(image_grid(images, max(1, round(math.sqrt(count)))), self._real_path)

    @property
    def _real_path(self) -> Path:
        return self._folder.path / "samples" / "real.jpg"

    def _path(self, kind: str) -> Path:
        ema_path = self._folder.samples(self._state.images_seen)
        if kind == "ema":
            return ema_path
        return ema_path.with_name(ema_path.name.replace("images", kind)).with_suffix(".jpg")


def _grid(
    generator: nn.Module,
    latents: Tensor,
    labels: Tensor | None,
    columns: int,
    is_stopped: Callable[[], bool],
) -> Grid | None:
    """The images of `latents` as one; None when stopped."""
    images: list[np.ndarray] = []
    with closing(generate(generator, latents, labels)) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            images += list(chunk.numpy())
            if is_stopped():
                return None
    return image_grid(np.stack(images), columns)


def _written(grid: Grid, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    name, options = _FORMATS[path.suffix]
    with atomic_write(path) as file:
        to_pil_image(grid).save(file, name, **options)
    return path
