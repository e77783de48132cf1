"""Feature networks for tests: in float64, so that sums over any batches and ranks agree."""

import os
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ganscale.evaluation import evaluator


class Projection(nn.Module):
    """A fixed random projection of the pixels, and classes by the softmax of another one."""

    def __init__(self, sample_shape: tuple[int, int, int], dim: int = 8, classes: int = 5) -> None:
        super().__init__()
        channels, height, width = sample_shape
        random = torch.Generator().manual_seed(1)
        size = channels * height * width, dim + classes
        self.dim = dim
        self.weight = nn.Buffer(torch.randn(size, dtype=torch.float64, generator=random))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = (images.flatten(1).double() / 255) @ self.weight
        return found[:, : self.dim].tanh(), found[:, self.dim :].softmax(1)


class Stubborn(Projection):
    """Fails for what a generator makes, but not for digits, which have a black corner, nor for the
    images that try the network, of which every other one has."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if (images[:, 0, 0, 0] != 0).float().mean() > 0.9:
            raise ValueError("these images are not to my taste")
        return super().features(images)


class Breaking(Projection):
    """Makes a function of the evaluator fail on one rank, as a full GPU or a singular matrix do."""

    def __init__(self, sample_shape: tuple[int, int, int], function: str, rank: int) -> None:
        super().__init__(sample_shape)
        failing = _out_of_memory if function != "frechet_distance" else _no_eigenvalues
        if rank == int(os.environ.get("RANK", "0")):
            setattr(evaluator, function, failing)


def _out_of_memory(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _no_eigenvalues(*_: Any) -> NoReturn:
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
