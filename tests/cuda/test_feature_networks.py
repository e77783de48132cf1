"""Features on a GPU are those of the CPU, whatever the run allows its own networks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ganscale.evaluation.feature_networks.build import build_feature_network
from ganscale.runtime import set_tf32

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    set_tf32(True)
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = False
    set_tf32(False)


@pytest.mark.parametrize("size", [32, 128])
def test_features_are_those_of_the_cpu_and_the_same_bits_again(
    size: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8, generator=generator)
    on_cpu, on_device = (
        build_feature_network(
            "efficientnet_lite0",
            {},
            device=place,
            sample_shape=(3, size, size),
            cache=Path("unused"),
            retry_seconds=0.0,
        )
        for place in (torch.device("cpu"), device)
    )
    expected = on_cpu(images)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found, again = on_device(images.to(device)), on_device(images.to(device))
    assert on_cpu.checksum == on_device.checksum
    for ours, cpus, second in zip(found, expected, again, strict=True):
        assert ours is not None
        assert cpus is not None
        assert second is not None
        assert torch.equal(ours, second)
        assert torch.linalg.norm(ours.cpu() - cpus) < 1e-4 * torch.linalg.norm(cpus)
