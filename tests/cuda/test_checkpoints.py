"""A run goes on where it was not begun: on the CPU after a GPU, and the other way round."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.runs import Runs

CPU = {"CUDA_VISIBLE_DEVICES": ""}
# With the usual epsilon, gradients that are nothing but rounding would become whole steps.
SETTINGS = (
    "training.precision=float64",
    "optimizer.critic.eps=1e-2",
    "optimizer.generator.eps=1e-2",
)


def tensors(runs: Runs, name: str) -> dict[str, torch.Tensor]:
    (*_, newest) = runs.checkpoints(name)
    return {
        f"{file.stem}.{key}": tensor.double()
        for file in newest.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


def train(runs: Runs, name: str, images: int, environment: Mapping[str, str]) -> str:
    length = f"training.total_images={images}"
    return runs.finish(name, *SETTINGS, length, environment=environment)


@pytest.mark.parametrize("first", ["device", "cpu"])
def test_a_run_continues_on_the_other_device(
    any_device: torch.device,
    environment: Mapping[str, str],
    runs: Runs,
    first: str,
    tmp_path: Path,
) -> None:
    begun, continued = (environment, CPU) if first == "device" else (CPU, environment)
    printed = train(runs, "run", 64, begun)
    assert f"1 rank on {any_device.type if first == 'device' else 'cpu'}" in printed
    shutil.copytree(runs.folder / "run", tmp_path / "begun")
    printed = train(runs, "run", 128, continued)
    assert f"1 rank on {'cpu' if first == 'device' else any_device.type}" in printed
    assert "continues at 64 of 128 images" in printed
    train(runs, "cpu", 128, CPU)
    found, expected = tensors(runs, "run"), tensors(runs, "cpu")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-3)
        assert float((found[name] - tensor).abs().max()) <= 1e-9 * scale, name
