"""The feature network that a config names: one of ours, or the user's own by import path."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ganscale.errors import UserError
from ganscale.evaluation.feature_networks import dinov2, efficientnet_lite0, inception
from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork
from ganscale.evaluation.feature_networks.own_network import OwnNetwork
from ganscale.evaluation.feature_networks.recipe import Place, Recipe
from ganscale.importing import call, nearest

FEATURE_NETWORKS: dict[str, Callable[..., Recipe]] = {
    inception.NAME: inception.Inception,
    dinov2.NAME: dinov2.DINOv2,
    efficientnet_lite0.NAME: efficientnet_lite0.EfficientNetLite0,
}


def network_name(name: str, options: Mapping[str, Any]) -> str:
    """After which its figures are named. Raises UserError for a name or options that do not
    exist."""
    return _recipe(name, options).name


def check_feature_network(
    name: str,
    options: Mapping[str, Any],
    *,
    sample_shape: tuple[int, int, int],
    cache: Path,
    retry_seconds: float,
) -> None:
    """Raises UserError if the network cannot be built, for lack of a package or file, say, and
    UnavailableError if a file cannot be fetched. Loads no weights, and is quick unless a file has
    to be fetched into `cache`."""
    place = Place(sample_shape, cache, retry_seconds)
    _recipe(name, options).check(place)


def build_feature_network(
    name: str,
    options: Mapping[str, Any],
    *,
    device: torch.device,
    sample_shape: tuple[int, int, int],
    cache: Path,
    retry_seconds: float,
) -> FeatureNetwork:
    """The network `name`, "inception" or "package.module:Class", with its `options`.

    sample_shape: (channels, height, width) of the images
    cache: the folder on a disk of this machine, shared by its ranks, for weights that are fetched
    retry_seconds: how long a network may fail meanwhile

    The same options give the same network in every process, and torch's generator stays as it is.
    Raises UserError and UnavailableError as `check_feature_network`, and UserError for weights of
    another checksum and for a class of the user's that does not return features.
    """
    place = Place(sample_shape, cache, retry_seconds)
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(0)
    try:
        return _recipe(name, options).build(place, device)
    finally:
        generator.set_state(before)


def _recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    if name in FEATURE_NETWORKS:
        return call(FEATURE_NETWORKS[name], options, f"feature network {name}")
    if ":" not in name:
        raise UserError(
            f"unknown feature network {name!r}{nearest(name, FEATURE_NETWORKS)}; choose from "
            f"{', '.join(FEATURE_NETWORKS)}, or your own as package.module:Class"
        )
    return OwnNetwork(name, options)
