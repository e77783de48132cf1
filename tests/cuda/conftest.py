"""The device of these tests: a GPU; with GANSCALE_DEVICE=cpu, the CPU. `make gpu` runs them.

Training processes and ranks get it by `environment`, since helpers hide GPUs from them otherwise.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import run_ranks
from tests.cuda.cases import Records


@pytest.fixture(scope="session")
def any_device() -> torch.device:
    """A GPU if there is one: for tests that are worth their time on any machine."""
    is_cuda = torch.cuda.is_available() and os.environ.get("GANSCALE_DEVICE") != "cpu"
    return torch.device("cuda" if is_cuda else "cpu")


@pytest.fixture(scope="session")
def device(any_device: torch.device) -> torch.device:
    if any_device.type == "cpu" and os.environ.get("GANSCALE_DEVICE") != "cpu":
        pytest.skip("no GPU (`make gpu` needs one; GANSCALE_DEVICE=cpu runs this on the CPU)")
    return any_device


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """For what a CPU does not have."""
    if device.type != "cuda":
        pytest.skip("a CPU has no streams, graphs, NCCL or memory of its own")
    return device


@pytest.fixture(scope="session")
def environment(any_device: torch.device) -> Mapping[str, str]:
    """Of processes that use the device."""
    visible = os.environ.get(
        "CUDA_VISIBLE_DEVICES", "0,1" if torch.cuda.device_count() > 1 else "0"
    )
    return {"CUDA_VISIBLE_DEVICES": visible if any_device.type == "cuda" else ""}


@pytest.fixture(scope="session")
def of_cpu(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Records:
    return records_of(tmp_path_factory.mktemp("cpu"), 1, {})


@pytest.fixture(scope="session")
def of_device(
    device: torch.device,
    environment: Mapping[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Records:
    return records_of(tmp_path_factory.mktemp("device"), 1, environment)


def records_of(folder: Path, ranks: int, environment: Mapping[str, str]) -> Records:
    """What `record_cycles` finds in processes of its own."""
    run_ranks("tests.cuda.cases:record_cycles", folder, ranks, 300, environment)
    return torch.load(folder / "records.pt")
