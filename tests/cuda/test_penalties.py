"""The fast double backward against autograd's on the device, in float64."""

import pytest
import torch

from tests.helpers.networks import draw
from tests.objectives.test_double_backward import (
    BATCH,
    CRITICS,
    LAYERS,
    SHAPE,
    around,
    assert_matches_autograd,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# A GPU's kernels add in another order for each form.
TOLERANCE = 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CRITICS)
def test_penalties_of_every_critic_match_autograd(
    device: torch.device, name: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    critic = CRITICS[name]().double().to(device, memory_format=layout).eval()  # type: ignore[call-overload]
    if "dcgan" in name:
        for parameter in critic.parameters():  # N(0, 0.02) would make gradients vanish
            parameter.data *= 10
    images = (2 * draw(BATCH, *SHAPE)).to(device, memory_format=layout)
    labels = torch.tensor([0, 2, 1, 1, 0], device=device)
    assert_matches_autograd(critic, images, labels, takes_labels=True, tolerance=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_penalties_through_every_layer_match_autograd(
    device: torch.device, name: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    critic = around(LAYERS[name]()).to(device, memory_format=layout)  # type: ignore[call-overload]
    images = draw(BATCH, 3, 11, 11).to(device, memory_format=layout)
    assert_matches_autograd(critic, images, tolerance=TOLERANCE)
