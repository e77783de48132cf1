"""The table of R3GAN's presets in docs/networks.md says what `ganscale plan` does."""

import re

import pytest

from ganscale.config import resolve
from ganscale.objectives.objective import build_objective
from ganscale.plan.device_memory import peak_bytes
from ganscale.training.flops import count_cycle_flops
from ganscale.training.network_setup import build_unchecked_networks
from tests.helpers.processes import REPOSITORY

PAGE = (REPOSITORY / "docs" / "networks.md").read_text()
CLASSES = {"r3gan_cifar10": 10, "r3gan_imagenet32": 1000, "r3gan_imagenet64": 1000}
UNITS = {"MiB": 2**20, "GiB": 2**30}


def rows() -> dict[str, list[str]]:
    found = re.findall(r"^\| `(r3gan_\w+)` \|(.*)\|$", PAGE, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def test_the_table_has_every_preset() -> None:
    presets = {path.stem for path in (REPOSITORY / "configs").glob("r3gan_*.yaml")}
    assert rows().keys() == presets


@pytest.mark.parametrize("name", rows())
def test_memory_is_as_planned(name: str) -> None:
    config = resolve([name, "data.path=x"]).config
    _, ranks, memory, *_ = rows()[name]
    number, unit = memory.split()
    peak = peak_bytes(config, build_objective(config.objective), CLASSES.get(name, 0), int(ranks))
    assert float(number) * UNITS[unit] == pytest.approx(peak, rel=0.015)


@pytest.mark.parametrize("name", ["r3gan_emoji32", "r3gan_cifar10"])
def test_operations_and_parameters_are_as_counted(name: str) -> None:
    config, classes = resolve([name, "data.path=x"]).config, CLASSES.get(name, 0)
    networks = build_unchecked_networks(config, classes)
    parameters, _, _, _, operations, _ = rows()[name]
    counted = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    documented = [float(number) for number in re.findall(r"[\d.]+", parameters)]
    assert documented == pytest.approx(counted, rel=0.005)
    flops = count_cycle_flops(config, build_objective(config.objective), *networks, classes)
    assert flops is not None
    per_image = flops / config.training.global_batch_size / 1e9
    assert float(operations) == pytest.approx(per_image, rel=0.005)
