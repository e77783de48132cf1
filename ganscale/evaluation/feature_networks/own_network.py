"""A feature network of the user's own, as `package.module:Class`."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ganscale import importing
from ganscale.errors import GanscaleError, UserCodeError, UserError
from ganscale.evaluation.feature_networks.checked import CheckedNetwork, checked, probe_images
from ganscale.evaluation.feature_networks.feature_network import Features
from ganscale.evaluation.feature_networks.recipe import Place


@runtime_checkable
class ExtractsFeatures(Protocol):
    """What the user's class has. Both methods take (batch, channels, height, width) uint8 images on
    the evaluation's device, as large as they are.

    `features` returns (batch, dim) float32 or float64 numbers or, if the network classifies, the
    pair of them and (batch, classes) probabilities. These can also have a method of their own,
    `probabilities`. An attribute `resize` may name how images reach the network's size.
    """

    def features(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class OwnNetwork:
    """The class `target`, constructed with `options` and, if it accepts them, `sample_shape` and
    `device`."""

    target: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.target

    def check(self, place: Place) -> None:
        importing.check_options(
            self._find(), self.options, self._what, self._run_options(place, torch.device("cpu"))
        )

    def build(self, place: Place, device: torch.device) -> CheckedNetwork:
        constructor = self._find()
        run_options = self._run_options(place, device)
        network = importing.call(constructor, self.options, self._what, run_options)
        if isinstance(network, nn.Module):
            network.to(device).eval().requires_grad_(False)

        def extract(images: Tensor) -> Features:
            try:
                return _extract(network, images)
            except (GanscaleError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UserCodeError(f"{self._what} fails: {importing.describe(error)}") from error

        found = checked(
            self.target,
            _checksum(self.target, self.options, network),
            _resize(network),
            extract,
            device=device,
            sample_shape=place.sample_shape,
        )
        self._check_repeats(found, probe_images(place.sample_shape).to(device))
        return found

    @property
    def _what(self) -> str:
        return f"feature network {self.target}"

    def _find(self) -> Callable[..., Any]:
        requirement = "a class with a method `features`"
        known: Mapping[str, Callable[..., Any]] = {}
        return importing.find(self.target, known, "feature network", ExtractsFeatures, requirement)

    def _run_options(self, place: Place, device: torch.device) -> dict[str, Any]:
        return {"sample_shape": place.sample_shape, "device": device}

    def _check_repeats(self, network: CheckedNetwork, images: Tensor) -> None:
        if not torch.equal(network(images).features, network(images).features):
            raise UserError(
                f"{self._what} returns other features when it is given the same images again: it "
                "must not draw random numbers or change itself"
            )


def _extract(network: Any, images: Tensor) -> Features:
    found = network.features(images)
    if isinstance(found, tuple) and len(found) == 2:
        return Features(found[0], found[1])
    if callable(getattr(network, "probabilities", None)):
        return Features(cast(Tensor, found), network.probabilities(images))
    return Features(cast(Tensor, found))


def _resize(network: Any) -> str:
    resize = getattr(network, "resize", None)
    return resize if isinstance(resize, str) else "its own"  # it may be a method


def _checksum(target: str, options: Mapping[str, Any], network: Any) -> str:
    """Of the class's source, its options, and its weights if it has any."""
    digest = hashlib.sha256(
        json.dumps([target, dict(options)], default=str, sort_keys=True).encode()
    )
    with suppress(OSError, TypeError):  # a class without a file
        digest.update(inspect.getsource(type(network)).encode())
    state = network.state_dict() if isinstance(network, nn.Module) else {}
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()
