"""The size of a network's groups, and the deviation within them, by its equation."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from ganscale.errors import UserError
from ganscale.networks.batch_groups import MinibatchStdDev, batch_group_size
from tests.helpers.networks import draw


def declaring(*sizes: object) -> nn.Module:
    modules = [nn.Linear(2, 2) for _ in sizes]
    for module, size in zip(modules, sizes, strict=True):
        module.batch_group_size = size  # type: ignore[assignment]
    return nn.Sequential(*modules, nn.ReLU())


def test_the_group_of_networks_is_a_whole_number_of_each_of_their_modules_groups():
    assert batch_group_size(declaring()) == 1
    assert batch_group_size(declaring(4, 6)) == 12
    assert batch_group_size(declaring(4), declaring(1, 6), declaring(8)) == 24
    assert batch_group_size(nn.Sequential(nn.Sequential(MinibatchStdDev(3)))) == 3


@pytest.mark.parametrize("size", [0, -4, 2.0, True, None, "4"])
def test_a_declared_size_that_is_not_a_positive_int_is_refused(size):
    with pytest.raises(UserError, match=r"`batch_group_size` of Linear must be a positive int, no"):
        batch_group_size(declaring(4, size))


def test_a_declaration_that_fails_is_the_users_error_and_says_where():
    class Failing(nn.Module):
        @property
        def batch_group_size(self) -> int:
            return [1, 2][2]

    with pytest.raises(UserError, match=r"`batch_group_size` of Failing fails: IndexError.*\.py:"):
        batch_group_size(nn.Sequential(Failing()))


def deviations(images: Tensor, group_size: int, features: int) -> Tensor:
    """Equation by equation: (batch, features)"""
    batch, channels, height, width = images.shape
    output = torch.zeros(batch, features, dtype=images.dtype)
    width_of_part = channels // features
    for image in range(batch):
        first = image // group_size * group_size
        for feature in range(features):
            total = 0.0
            for channel in range(feature * width_of_part, (feature + 1) * width_of_part):
                for y in range(height):
                    for x in range(width):
                        values = images[first : first + group_size, channel, y, x]
                        mean = values.sum() / group_size
                        total += ((values - mean).square().sum() / group_size + 1e-8).sqrt()
            output[image, feature] = total / (width_of_part * height * width)
    return output


@pytest.mark.parametrize(("group_size", "features"), [(4, 1), (2, 3), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_deviation_of_each_run_of_images_is_appended_as_constant_channels(
    group_size, features, layout
):
    images = draw(8, 6, 2, 3).contiguous(memory_format=layout)
    output = MinibatchStdDev(group_size, features)(images)
    expected = deviations(images, group_size, features)[:, :, None, None].expand(-1, -1, 2, 3)
    assert torch.equal(output[:, :6], images)
    torch.testing.assert_close(output[:, 6:], expected, rtol=1e-13, atol=1e-15)
    assert output.is_contiguous(memory_format=layout)


def test_vectors_without_pixels_get_features_too():
    vectors = draw(6, 4)
    expected = MinibatchStdDev(3, 2)(vectors[:, :, None, None])[:, :, 0, 0]
    assert torch.equal(MinibatchStdDev(3, 2)(vectors), expected)


@pytest.mark.parametrize("features", [1, 2])
def test_first_and_second_derivatives_match_finite_differences(features):
    images = draw(6, 4, 2, 2).requires_grad_()
    layer = MinibatchStdDev(3, features)
    assert gradcheck(layer, images)
    assert gradgradcheck(layer, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_are_the_same_have_a_derivative_of_zero_and_a_finite_second_one(dtype):
    images = draw(1, 2, 2, 2).to(dtype).expand(4, -1, -1, -1).clone().requires_grad_()

    def gradient(images: Tensor) -> Tensor:
        deviation = MinibatchStdDev(4)(images)[0, -1, 0, 0]
        return torch.autograd.grad(deviation, images, create_graph=True)[0]

    first = gradient(images)
    torch.testing.assert_close(first, torch.zeros_like(first), rtol=0, atol=1e-4)
    direction = draw(4, 2, 2, 2, seed=1).to(dtype)
    (second,) = torch.autograd.grad((first * direction).sum(), images)
    # sqrt(v + e) at v = 0: v / (2 sqrt(e)), a quadratic form; the mean of 8 such.
    centred = direction - direction.mean(0)
    torch.testing.assert_close(second, centred / (4 * 8 * 1e-4), rtol=1e-5, atol=1e-3)


def test_the_deviation_of_bfloat16_features_is_rounded_once():
    features = draw(64, 3, 2, 2).bfloat16()
    expected = MinibatchStdDev(4)(features.double())[:, -1, 0, 0]
    output = MinibatchStdDev(4)(features)[:, -1, 0, 0]
    assert torch.equal(output, expected.bfloat16())


def test_a_batch_or_channels_that_cannot_be_divided_are_refused():
    sentence = "of groups of 4 images and 2 features cannot divide {} images of {} channels evenly"
    for batch, channels in ((6, 2), (4, 3), (1, 2)):
        with pytest.raises(UserError, match=sentence.format(batch, channels)):
            MinibatchStdDev(4, 2)(draw(batch, channels, 1, 1))
    with pytest.raises(ValueError, match="both must be positive"):
        MinibatchStdDev(0)
