"""Finds what a forward of a network changes: buffers, attributes, random generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganscale.randomness import derived_seed

_GLOBAL_GENERATORS = {
    "torch": "random numbers in its forward (dropout, noise, rrelu)",
    "random": "from Python's `random` in its forward",
    "numpy": "from `numpy.random` in its forward",
}
_OWN_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_PLAIN = (bool, int, float, complex, str, type(None))


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seeds the default generators of torch, Python and NumPy with (seed, purpose), and restores
    them afterwards."""
    derived = derived_seed(seed, purpose)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(derived)
        random.seed(derived)
        np.random.seed(derived & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class HiddenState:
    """What a forward of `network` must not change, as it is now."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._tensors = {name: tensor.clone() for name, tensor in _tensors(network)}
        self._attributes = dict(_attributes(network))
        self._generators = dict(_generators(network))

    def change(self, *, with_attributes: bool = True) -> str | None:
        """What has changed since: "draws random numbers in its forward", "changes `norm.mean` in
        its forward"; None if nothing has.

        with_attributes: plain values too, which a first forward may still set
        """
        generators = dict(_generators(self._network))
        for name, state in self._generators.items():
            if not _is_equal(generators.get(name), state):
                return f"draws {_GLOBAL_GENERATORS.get(name, f'from its generator `{name}`')}"
        for name, tensor in _tensors(self._network):
            before = self._tensors.get(name)
            if before is None or not torch.equal(_bits(before), _bits(tensor)):
                return f"changes `{name}` in its forward"
        attributes = dict(_attributes(self._network)) if with_attributes else self._attributes
        for name in sorted(attributes.keys() | self._attributes.keys()):
            if attributes.get(name) != self._attributes.get(name):
                return f"changes `{name}` in its forward"
        return None


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        yield name, tensor.detach()


def _attributes(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain values in the attributes of all layers, such as counters."""
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN):
                yield f"{path}.{name}".removeprefix("."), value


def _generators(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The state of each generator: the default ones, and those in the attributes of layers."""
    states: list[Any] = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    yield "torch", states
    yield "random", random.getstate()
    yield "numpy", np.random.get_state()
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, _OWN_GENERATORS):
                yield f"{path}.{name}".removeprefix("."), _state_of(value)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return [generator.get_state()]
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def _is_equal(first: Any, second: Any) -> bool:
    """`==` that looks into tuples, lists and dictionaries of tensors and arrays."""
    if isinstance(first, (Tensor, np.ndarray)):
        return type(first) is type(second) and bool((first == second).all())
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_is_equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _is_equal(value, second[key]) for key, value in first.items()
        )
    return first == second


def _bits(tensor: Tensor) -> Tensor:
    """For a comparison in which NaN equals NaN."""
    return tensor.nan_to_num(nan=7.0) if tensor.is_floating_point() else tensor
