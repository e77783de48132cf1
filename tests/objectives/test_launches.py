"""Operators that a GPU would launch for a gradient penalty: ours against autograd's.

A GPU computes small networks faster than the host launches their operators, so derivatives that
save multiplications must not cost launches. They are counted on a CPU, on a GPU's path.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.launches import OperatorCounter, gpu_path
from ganscale.objectives.penalties import input_gradients
from tests.helpers.networks import draw
from tests.objectives.test_double_backward import (
    BATCH,
    CRITICS,
    LAYERS,
    SHAPE,
    around,
    autograd_input_gradients,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]
LABELS = torch.tensor([0, 2, 1, 1, 0])
# The layers that have derivatives of our own.
KINDS = "average pool", "convolution", "pooled", "transposed", "upsampled"
OF_OURS = [name for name in LAYERS if name.startswith(KINDS)]
OF_OURS += ["relu", "relu in place", "leaky relu", "leaky relu in place", "strides", "depthwise"]
WITHOUT_NORMS = ("mlp", "dcgan", "dcgan, no slope", "resnet", "r3gan", "patches")


def operators(
    gradients_of: Callable[..., Tensor], critic: nn.Module, images: Tensor, labels: Tensor | None
) -> int:
    """Of a penalty's forward, backward and double backward, once its constants have been made."""

    def score(images: Tensor, labels: Tensor | None) -> Tensor:
        return critic(images) if labels is None else critic(images, labels)

    weights = [weight for weight in critic.parameters() if weight.requires_grad]
    counted = 0
    for _ in range(2):
        with gpu_path(), OperatorCounter() as counter:
            penalty = gradients_of(score, images, labels).square().sum()
            torch.autograd.grad(penalty, weights, allow_unused=True)
        counted = counter.counts.total()
    return counted


def ours_and_autograds(
    critic: nn.Module, images: Tensor, layout: torch.memory_format, labels: Tensor | None = None
) -> tuple[int, int]:
    critic = critic.float().to(memory_format=layout)  # type: ignore[call-overload]
    images = images.float().to(memory_format=layout)
    ours = operators(input_gradients, critic, images, labels)
    return ours, operators(autograd_input_gradients, critic, images, labels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CRITICS)
def test_penalties_of_critics_launch_fewer_operators_than_with_autograd(
    name: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    ours, autograds = ours_and_autograds(
        CRITICS[name]().eval(), draw(BATCH, *SHAPE), layout, LABELS
    )
    assert ours < (0.7 if name in WITHOUT_NORMS else 0.95) * autograds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_penalties_through_a_layer_launch_no_more_operators_than_with_autograd(
    name: str, layout: torch.memory_format
) -> None:
    images = draw(BATCH, 3, 11, 11)
    ours, autograds = ours_and_autograds(around(LAYERS[name]()), images, layout)
    assert ours <= autograds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OF_OURS)
def test_a_layer_with_derivatives_of_ours_adds_fewer_operators_than_with_autograd(
    name: str, layout: torch.memory_format
) -> None:
    """To those of the network around it, which has such layers, too."""
    images = draw(BATCH, 3, 11, 11)
    with_layer = ours_and_autograds(around(LAYERS[name]()), images, layout)
    without = ours_and_autograds(around(nn.Identity()), images, layout)
    ours, autograds = (a - b for a, b in zip(with_layer, without, strict=True))
    assert 0 < ours < autograds
