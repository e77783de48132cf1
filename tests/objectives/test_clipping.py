"""Weight clipping bounds the weights in its scope, and nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from ganscale.errors import UserError
from ganscale.objectives.clipping import clip_weights, clipped_fraction, clipped_parameters


@pytest.fixture
def critic() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 1)
    )
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.copy_(3 * torch.randn(tensor.shape))
    return network


@pytest.mark.parametrize(
    ("scope", "clipped"),
    [
        ("weights", {"0.weight", "4.weight"}),
        (
            "all",
            {
                "0.weight",
                "0.bias",
                "1.weight",
                "1.bias",
                "2.weight",
                "2.bias",
                "4.weight",
                "4.bias",
            },
        ),
    ],
)
def test_exactly_the_parameters_of_the_scope_are_clipped_and_no_buffer(critic, scope, clipped):
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    clip_weights(clipped_parameters(critic, scope), 0.5)
    for name, tensor in critic.state_dict().items():
        expected = np.clip(before[name].numpy(), -0.5, 0.5) if name in clipped else before[name]
        assert np.array_equal(tensor.numpy(), expected), name


def test_frozen_parameters_are_not_clipped(critic):
    for parameter in critic[0].parameters():
        parameter.requires_grad_(False)
    clipped = {id(each) for each in clipped_parameters(critic, "all")}
    assert not clipped & {id(each) for each in critic[0].parameters()}
    assert clipped == {id(each) for each in critic.parameters() if each.requires_grad}
    critic.requires_grad_(False)
    with pytest.raises(UserError, match="has no weights to clip in that scope"):
        clipped_parameters(critic, "weights")


def test_clipping_again_changes_nothing_and_leaves_no_graph(critic):
    parameters = clipped_parameters(critic, "all")
    clip_weights(parameters, 0.5)
    once = [parameter.clone() for parameter in parameters]
    clip_weights(parameters, 0.5)
    for parameter, clipped in zip(parameters, once, strict=True):
        assert torch.equal(parameter, clipped)
        assert parameter.requires_grad
        assert parameter.is_leaf


def test_the_fraction_counts_the_elements_at_either_bound():
    parameters = [torch.tensor([[-0.5, 0.1, 0.5]]), torch.tensor([0.4999, -0.2, -0.7, 0.0, 0.0])]
    assert clipped_fraction(parameters, 0.5).item() == pytest.approx(3 / 8)


@pytest.mark.parametrize("value", [0.01, 0.1, 1 / 3])
def test_clipped_elements_count_as_at_the_bound_for_any_value(value):
    """0.01 has no exact float32, but the comparison must still find what the clamp put there."""
    parameters = [torch.linspace(-1, 1, 101), torch.full((3, 3), 7.0)]
    beyond = sum(int((p.double().abs() >= value).sum()) for p in parameters)
    clip_weights(parameters, value)
    assert clipped_fraction(parameters, value).item() == pytest.approx(beyond / 110)
