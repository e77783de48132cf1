"""The table of R3GAN's presets in docs/networks.md says what `ganscale plan` does."""

import re

import pytest

from ganscale.config import resolve
from ganscale.objectives.objective import build_objective
from ganscale.plan.computation import computation
from ganscale.plan.device_memory import peak_bytes
from ganscale.plan.networks import planned_networks
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


@pytest.mark.parametrize("name", rows())
def test_operations_days_and_parameters_are_as_planned(name: str) -> None:
    config, classes = resolve([name, "data.path=x"]).config, CLASSES.get(name, 0)
    networks = planned_networks(config, classes)
    parameters, ranks, _, _, operations, days = rows()[name]
    counted = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    documented = [float(number) for number in re.findall(r"[\d.]+", parameters)]
    assert documented == pytest.approx(counted, rel=0.005)
    objective = build_objective(config.objective)
    plan = computation(config, objective, *networks, classes, int(ranks), gpu_tflops=None)
    assert plan is not None
    gigaflops = float(operations.replace(",", ""))
    assert gigaflops == pytest.approx(plan.flops_per_image / 1e9, rel=0.005)
    if days:
        (planned,) = plan.days_if_a_gpu_reaches.values()
        assert float(days) == pytest.approx(planned, rel=0.05)


def test_operations_on_the_meta_device_are_those_that_are_counted_in_a_run() -> None:
    config = resolve(["r3gan_emoji32", "data.path=x"]).config
    objective = build_objective(config.objective)
    flops = count_cycle_flops(config, objective, *build_unchecked_networks(config, 0), 0)
    plan = computation(config, objective, *planned_networks(config, 0), 0, 2, gpu_tflops=0.5)
    assert flops is not None
    assert plan is not None
    assert plan.flops_per_image == flops / config.training.global_batch_size
    assert plan.flops == plan.flops_per_image * 1_000_000
    seconds = plan.flops / (2 * 0.5e12)
    assert plan.days_if_a_gpu_reaches == {"0.5 TFLOP/s": pytest.approx(seconds / 86_400)}
