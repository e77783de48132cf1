import pytest
import torch

from ganscale.errors import UserError
from ganscale.networks.build import parameter_count
from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.networks.shapes import require_positive


def test_points_are_unbounded_and_images_end_in_a_tanh():
    latents = 1e3 * torch.randn(64, 8)
    assert MLPGenerator(8, (2,))(latents).abs().max() > 1
    images = MLPGenerator(8, (3, 4, 5))(latents)
    assert images.shape == (64, 3, 4, 5)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("shape", [(2,), (1, 5, 7)])
def test_the_critic_scores_samples_of_any_shape(shape):
    assert MLPCritic(shape)(torch.randn(6, *shape)).shape == (6,)


def test_depth_counts_hidden_layers():
    critic = MLPCritic((2,), width=512, depth=3)  # the paper's critic of 2-D points
    assert parameter_count(critic) == (2 * 512 + 512) + 2 * (512 * 512 + 512) + (512 + 1)


def test_labels_are_refused():
    with pytest.raises(UserError, match="labels of 10 classes"):
        MLPCritic((2,), num_classes=10)


@pytest.mark.parametrize("width", [0, 1.5, "128", True])
def test_a_size_that_is_not_a_positive_integer_is_refused(width):
    with pytest.raises(UserError, match="width of mlp must be a whole number"):
        require_positive("mlp", depth=3, width=width)
