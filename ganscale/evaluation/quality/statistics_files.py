"""Files of a reference's statistics, `mu` (dim,) and `sigma` (dim, dim) in npz.

ADM, EDM, pytorch-fid and clean-fid write them; other arrays beside these two, such as ADM's
`mu_s`, `sigma_s` and `arr_0`, are not read. Ours also hold `num_images`, as EDM2 names it.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ganscale.errors import UserError
from ganscale.evaluation.quality.frechet import GaussianStatistics
from ganscale.files import atomic_write

_ROUNDING = 1e-4
"""Of the largest variance; a covariance of float32 stays below it."""


def save_statistics(path: Path, statistics: GaussianStatistics) -> None:
    """Replaces the file at once."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    if statistics.count is not None:
        arrays["num_images"] = np.array(statistics.count)
    with atomic_write(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_statistics(path: Path, dim: int) -> GaussianStatistics:
    """The statistics of features of `dim` dimensions. Nothing in the file is executed.

    Raises UserError for a file that is missing or damaged, is of another dimension, or whose
    `sigma` is not a covariance.
    """
    try:
        arrays = _read(path)
    except OSError as error:
        raise UserError(f"the statistics {path} cannot be read: {error}") from error
    except (
        ValueError, EOFError, OverflowError, MemoryError, zipfile.BadZipFile, zlib.error,
        NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip
        raise UserError(f"the statistics {path} are not an npz file of plain arrays") from error
    if missing := {"mu", "sigma"} - arrays.keys():
        raise UserError(f"the statistics {path} have no {' and no '.join(sorted(missing))}")
    shapes = {"mu": (dim,), "sigma": (dim, dim), "num_images": ()}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise UserError(f"{name} of the statistics {path} is of type {array.dtype}")
        if not np.isfinite(array).all():
            raise UserError(f"{name} of the statistics {path} is NaN or infinite in places")
        if array.shape != shapes[name]:
            raise UserError(
                f"{name} of the statistics {path} has the shape {array.shape}, not {shapes[name]}: "
                f"the feature network has {dim:,} features"
            )
    mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    tolerance = _ROUNDING * np.abs(covariance).max()
    symmetric = (covariance + covariance.T) / 2
    if np.abs(covariance - covariance.T).max() > tolerance:
        raise UserError(f"sigma of the statistics {path} is not symmetric")
    if np.linalg.eigvalsh(symmetric)[0] < -tolerance:
        raise UserError(
            f"sigma of the statistics {path} is not a covariance: a variance is below 0"
        )
    count = int(arrays["num_images"]) if "num_images" in arrays else None
    if count is not None and count < 2:
        raise UserError(f"the statistics {path} are of {count} images, but a covariance needs 2")
    return GaussianStatistics(torch.from_numpy(mean), torch.from_numpy(symmetric), count)


def _read(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("a single array")
        with arrays:
            return {name: arrays[name] for name in ("mu", "sigma", "num_images") if name in arrays}
