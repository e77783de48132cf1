"""A feature network of which every result is checked, and which nothing around it can change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ganscale.errors import UserError
from ganscale.evaluation.feature_networks.feature_network import Features

_SUM_TOLERANCE = 1e-3
_PROBE_IMAGES = 2
_SMALLEST_BATCH = 16

Extract = Callable[[Tensor], Features]
"""(batch, channels, height, width) uint8 -> unchecked features."""


@dataclass
class CheckedNetwork:
    """A `FeatureNetwork` around a function."""

    name: str
    checksum: str
    resize: str
    dim: int
    num_classes: int
    extract: Extract

    def __call__(self, images: Tensor) -> Features:
        """The features of (batch, channels, height, width) uint8 images, one or more, without
        gradients.

        Raises UserError for features that are not (batch, dim) finite float32 or float64 numbers,
        and for probabilities that are not (batch, num_classes) ones with a sum of 1.
        """
        count, padded = len(images), _padded(images)
        found = _run(self.extract, padded)
        self.check(found, len(padded))
        if found.probabilities is None:
            return Features(found.features[:count])
        return Features(found.features[:count], found.probabilities[:count])

    def check(self, found: Features, count: int) -> None:
        """Raises UserError, as a call does, for what was found in `count` images."""
        _check(self.name, "features", found.features, (count, self.dim))
        if self.num_classes:
            _check(self.name, "probabilities", found.probabilities, (count, self.num_classes))
            _check_sums(self.name, found.probabilities)


def checked(
    name: str,
    checksum: str,
    resize: str,
    extract: Extract,
    *,
    device: torch.device,
    sample_shape: tuple[int, int, int],
) -> CheckedNetwork:
    """A network whose dimensions are those of what `extract` returns for two images."""
    images = probe_images(sample_shape).to(device)
    found = _run(extract, images)
    dim, num_classes = _columns(name, "features", found.features), 0
    if found.probabilities is not None:
        num_classes = _columns(name, "probabilities", found.probabilities)
    network = CheckedNetwork(name, checksum, resize, dim, num_classes, extract)
    network.check(found, len(images))
    return network


def probe_images(sample_shape: tuple[int, int, int]) -> Tensor:
    """Two different images without meaning."""
    count = _PROBE_IMAGES * sample_shape[0] * sample_shape[1] * sample_shape[2]
    values = torch.arange(count) * 7919 % 251
    return values.to(torch.uint8).view(_PROBE_IMAGES, *sample_shape)


def _padded(images: Tensor) -> Tensor:
    """Kernels for small batches round differently (2e-6 on a CPU). A small batch is filled up by
    repeating its images, so that an image's features do not depend on the rest of its batch."""
    if len(images) >= _SMALLEST_BATCH:
        return images
    return images[torch.arange(_SMALLEST_BATCH, device=images.device) % len(images)]


def _run(extract: Extract, images: Tensor) -> Features:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise TypeError(f"feature networks take a batch of uint8 images, not {_kind(images)}")
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), _exact_float32():
        return extract(images)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Neither TF32 nor kernels chosen by timing, which differ from call to call: a figure must not
    depend on how a run trains."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        torch.set_float32_matmul_precision(precision)


def _columns(name: str, what: str, tensor: object) -> int:
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise UserError(f"feature network {name} must return 2-D {what}, not {_kind(tensor)}")
    return tensor.shape[1]


def _check(name: str, what: str, tensor: object, shape: tuple[int, int]) -> None:
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype not in (torch.float32, torch.float64)
        or tensor.shape != shape
    ):
        raise UserError(
            f"feature network {name} must return float32 or float64 {what} of shape {shape}, not "
            f"{_kind(tensor)}"
        )
    if not tensor.isfinite().all():
        raise UserError(f"feature network {name} returned {what} that are NaN or infinite")


def _check_sums(name: str, probabilities: Tensor | None) -> None:
    assert probabilities is not None  # checked before
    off = (probabilities.sum(1) - 1).abs().max()
    if off > _SUM_TOLERANCE or probabilities.min() < 0:
        raise UserError(
            f"feature network {name} returned class probabilities that are negative or do not sum "
            "to 1: return the softmax of the logits"
        )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    return f"a {type(value).__name__}"
