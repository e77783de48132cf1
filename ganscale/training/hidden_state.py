"""Finds what a forward of a network changes: buffers, attributes, random generators."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.randomness import derived_seed

_GLOBAL_GENERATORS = {
    "torch": "random numbers in its forward (dropout, noise, rrelu)",
    "random": "from Python's `random` in its forward",
    "numpy": "from `numpy.random` in its forward",
}
_OWN_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_PLAIN = (bool, int, float, complex, str, type(None))
_OF_TORCH = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_LARGEST_CONTAINER = 100


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seeds the default generators of torch, Python and NumPy with (seed, purpose), and restores
    them afterwards."""
    derived = derived_seed(seed, purpose)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
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
            if repr(attributes.get(name)) != repr(self._attributes.get(name)):  # NaN is not NaN
                return f"changes `{name}` in its forward"
        return None


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers but the running statistics of batch norms."""
    norms = {
        id(buffer)
        for module in network.modules()
        if isinstance(module, GlobalBatchNorm)
        for buffer in module.buffers()
    }
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if id(tensor) not in norms:
            yield name, tensor.detach()


def _attributes(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain values in the attributes of all layers, such as counters."""
    for name, value in _values(network):
        is_counter = (
            isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
        )
        if isinstance(value, _PLAIN) or is_counter:
            yield name, value.item() if isinstance(value, Tensor) else value


def _values(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of all layers, and what small containers among them hold."""
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            dotted = f"{path}.{name}".removeprefix(".")
            yield dotted, value
            if isinstance(value, (dict, list, tuple)) and len(value) <= _LARGEST_CONTAINER:
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in [*items] if name not in _OF_TORCH else ():
                    yield f"{dotted}[{key!r}]", item


def _generators(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The state of each generator: the default ones, and those in the attributes of layers."""
    states: list[Any] = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    yield "torch", states
    yield "random", random.getstate()
    yield "numpy", np.random.get_state()
    for name, value in _values(network):
        if isinstance(value, _OWN_GENERATORS):
            yield name, _state_of(value)
    for module in {type(layer).__module__ for layer in network.modules()}:
        for name, value in [*vars(sys.modules.get(module, random)).items()]:
            if isinstance(value, _OWN_GENERATORS) and module.partition(".")[0] != "torch":
                yield f"{module}.{name}", _state_of(value)


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
