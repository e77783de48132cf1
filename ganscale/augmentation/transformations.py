"""Transformations that are applied to each image with a probability, and their random parameters.

A pipeline is a table of transformations. An image takes one random number in [0, 1) for each of
them, which decides whether it is applied, and one for each of its parameters. A parameter of zero
means no change, so whatever is not applied has zeros.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.randomness import Draw
from ganscale.runtime import at_least_float32
from ganscale.tensor_cache import cached_tensors

Probability = float | Float[Tensor, ""]
Parameters = Mapping[str, Float[Tensor, "batch values"]]
"""By the transformation's name; of transformations of the same name in a row, side by side."""
Drawn = dict[str, Tensor]
"""What was drawn for a batch: `parameters` (batch, columns), and `noise` (batch, *sample) if the
pipeline adds some."""


class Value(NamedTuple):
    """The distribution of a parameter: `low + span * x`, x uniform in [0, 1) or standard normal;
    rounded down if it is an integer."""

    low: float = 0.0
    span: float = 1.0
    is_normal: bool = False
    is_integer: bool = False


def uniform_between(low: float, high: float) -> Value:
    return Value(low, high - low)


def normal_with(deviation: float) -> Value:
    return Value(0.0, deviation, is_normal=True)


def integer_below(count: int) -> Value:
    return Value(0.0, count, is_integer=True)


ALWAYS_ONE = Value(1.0, 0.0)


@dataclass(frozen=True)
class Transformation:
    """values: the distributions of its parameters
    is_twice: applied twice, with a probability such that either happens with the configured one
    needs_color: acts on images of three channels only
    """

    name: str
    category: str
    values: tuple[Value, ...]
    is_twice: bool = False
    needs_color: bool = False


Apply = Callable[[Tensor, Parameters, frozenset[str], Tensor | None], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """Transformations, the factor of the probability of each, and what they do.

    apply: (images, parameters, names of the transformations that are on, noise) -> images
    """

    transformations: tuple[Transformation, ...]
    strengths: tuple[float, ...]
    apply: Apply

    @property
    def columns(self) -> int:
        """Random numbers per image: the same ones for a transformation, whichever are on."""
        return len(self.transformations) + len(self._values)

    def draw(self, purpose: str) -> Draw:
        return Draw(purpose, self.columns)

    @property
    def adds_noise(self) -> bool:
        return "noise" in self.is_on

    @cached_property
    def is_on(self) -> frozenset[str]:
        """The names of the transformations whose strength is above 0."""
        each = zip(self.transformations, self.strengths, strict=True)
        return frozenset(t.name for t, strength in each if strength > 0)

    @torch.no_grad()
    def parameters(
        self, numbers: Float[Tensor, "batch columns"], probability: Probability
    ) -> Float[Tensor, "batch parameters"]:
        """The parameters of each image, zeros for what is not applied to it.

        numbers: uniform in [0, 1); probability: of each transformation, times its strength
        """
        constants = _constants(self, numbers.dtype, numbers.device)
        chances = (constants.strengths * probability).clamp(0, 1)
        # Of two rotations in a row, either is applied with this probability.
        chances = torch.where(constants.is_twice, 1 - (1 - chances).sqrt(), chances)
        decisions, values = numbers.split([len(self.transformations), len(self._values)], dim=1)
        is_applied = (decisions < chances)[:, constants.owners]
        values = torch.where(constants.is_normal, _normal_quantile(values), values)
        values = torch.addcmul(constants.low, values, constants.span)
        values = torch.where(constants.is_integer, values.floor(), values)
        return values * is_applied

    def __call__(
        self, images: Float[Tensor, "batch *sample"], drawn: Drawn
    ) -> Float[Tensor, "batch *sample"]:
        """The augmented images: (batch, channels, height, width) in [-1, 1], differentiable any
        number of times. In float32 or better, also under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            images = at_least_float32(images)
            columns = drawn["parameters"].to(images.dtype).split(list(self._widths.values()), 1)
            parameters = dict(zip(self._widths, columns, strict=True))
            augmented = self.apply(images, parameters, self.is_on, drawn.get("noise"))
        is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_channels_last else torch.contiguous_format
        return augmented.contiguous(memory_format=layout)

    @cached_property
    def _values(self) -> tuple[Value, ...]:
        return tuple(value for each in self.transformations for value in each.values)

    @cached_property
    def _widths(self) -> dict[str, int]:
        """The number of parameters by name."""
        widths: Counter[str] = Counter()
        for each in self.transformations:
            widths[each.name] += len(each.values)
        return widths

    def _owners(self) -> Iterator[int]:
        """For each parameter, the number of its transformation."""
        for number, each in enumerate(self.transformations):
            yield from [number] * len(each.values)


class _Constants(NamedTuple):
    strengths: Tensor
    is_twice: Tensor
    owners: Tensor
    low: Tensor
    span: Tensor
    is_normal: Tensor
    is_integer: Tensor


@cached_tensors(maxsize=32)
def _constants(pipeline: Pipeline, dtype: torch.dtype, device: torch.device) -> _Constants:
    """On the device, copied there once."""
    values = pipeline._values

    def tensor(numbers: list, dtype: torch.dtype = dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    return _Constants(
        tensor(list(pipeline.strengths)),
        tensor([each.is_twice for each in pipeline.transformations], torch.bool),
        tensor(list(pipeline._owners()), torch.int64),
        tensor([value.low for value in values]),
        tensor([value.span for value in values]),
        tensor([value.is_normal for value in values], torch.bool),
        tensor([value.is_integer for value in values], torch.bool),
    )


def _normal_quantile(uniform: Tensor) -> Tensor:
    """A standard normal number for each uniform one of 24 bits, which is never infinite."""
    return torch.erfinv(2 * uniform + (2**-24 - 1)) * math.sqrt(2)
