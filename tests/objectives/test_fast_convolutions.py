"""Convolutions in other fast_convolutions against torch's own, in float64."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.resnet import ResNetCritic, ResNetGenerator
from ganscale.objectives import fast_convolutions
from ganscale.objectives.double_backward import FastDerivatives
from ganscale.objectives.fast_convolutions import (
    Settings,
    as_matrix_product,
    convolve,
    gradients,
    unpool,
)
from tests.helpers.networks import draw

aten = torch.ops.aten
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def strided(*, is_transposed: bool) -> Iterator[tuple[Settings, tuple[int, int]]]:
    """Settings with a stride and kernels, square and not, that the stride divides and not."""
    for stride, padding, kernel in product((2, 3), (0, 1, 2), ((2, 2), (3, 3), (4, 4), (5, 3))):
        for more in range(stride if is_transposed else 1):
            paddings = [padding, max(0, padding - 1)]
            yield (
                Settings([stride] * 2, paddings, [1, 1], is_transposed, [more, 0], 1),
                kernel,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_made_as_transposed_convolutions_make_them(
    channels: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watched(monkeypatch)
    for settings, kernel in strided(is_transposed=True):
        x = draw(2, 5, 6, 7).contiguous(memory_format=layout)
        weight = draw(5, channels, *kernel, seed=1).contiguous(memory_format=layout)
        bias = draw(channels, seed=2)
        if min(aten.convolution(x, weight, bias, *settings).shape) > 0:
            found = convolve(x, weight, bias, settings)
            expected = aten.convolution(x, weight, bias, *settings)
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
            assert channels == 1 or found.is_contiguous(memory_format=layout)
    assert taken.count(True) > 40


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_gradients_of_images_are_autograds(
    size: tuple[int, int], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = watched(monkeypatch)
    for settings, kernel in strided(is_transposed=False):
        x = draw(2, 3, *size).contiguous(memory_format=layout)
        weight = draw(5, 3, *kernel, seed=1).contiguous(memory_format=layout)
        gradient = draw(*aten.convolution(x, weight, None, *settings).shape, seed=2)
        gradient = gradient.contiguous(memory_format=layout)
        for asked in ([True, False, False], [True, True, True]):
            arguments = gradient, x, weight, [5], settings
            found = gradients(*arguments, asked)
            expected = aten.convolution_backward(gradient, x, weight, [5], *settings, asked)
            for mine, theirs in zip(found, expected, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None and theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-12)
    assert taken.count(True) > 20


def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each sum by phases could be done so: it grows."""
    original, taken = fast_convolutions._by_phases, []

    def by_phases(*arguments: object) -> Tensor | None:
        output = original(*arguments)  # type: ignore[arg-type]
        taken.append(output is not None)
        return output

    monkeypatch.setattr(fast_convolutions, "_by_phases", by_phases)
    return taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_weights_by_patches_are_autograds(layout: torch.memory_format) -> None:
    only_weight = [False, True, False]
    for settings, kernel in strided(is_transposed=False):
        fine = draw(2, 6, 9, 8).contiguous(memory_format=layout)
        weight = draw(5, 6, *kernel, seed=1).contiguous(memory_format=layout)
        coarse = draw(*aten.convolution(fine, weight, None, *settings).shape, seed=2)
        found = fast_convolutions._by_patches(coarse, fine, weight, settings)
        arguments = coarse, fine, weight, None, *settings
        expected = aten.convolution_backward(*arguments, only_weight)[1]
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)
        assert found.is_contiguous(memory_format=layout)
        # A transposed convolution goes the other way between the same two maps.
        if settings.padding == [0, 0]:
            back = aten.convolution(coarse, weight, None, *settings[:3], True, [0, 0], 1)
            up = settings._replace(is_transposed=True)
            other = draw(*back.shape, seed=3)
            found = fast_convolutions._by_patches(coarse, other, weight, up)
            arguments = other, coarse, weight, None, *up
            expected = aten.convolution_backward(*arguments, only_weight)[1]
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_by_patches_err_no_more_than_torchs(is_transposed: bool) -> None:
    settings = Settings([2, 2], [1, 1], [1, 1], is_transposed, [0, 0], 1)
    x, weight = draw(4, 64, 8, 8), draw(64, 64, 4, 4, seed=1)
    gradient = draw(*aten.convolution(x, weight, None, *settings).shape, seed=2)
    asked = [True, True, True]
    exact = aten.convolution_backward(gradient, x, weight, [64], *settings, asked)
    gradient, x, weight = gradient.bfloat16(), x.bfloat16(), weight.bfloat16()
    assert fast_convolutions.has_patches(weight, weight.dtype, settings)
    found = gradients(gradient, x, weight, [64], settings, asked)
    torchs = aten.convolution_backward(gradient, x, weight, [64], *settings, asked)
    for mine, theirs, true in zip(found, torchs, exact, strict=True):
        assert mine is not None
        assert mine.dtype == torch.bfloat16
        errors = [(each.double() - true).norm() / true.norm() for each in (mine, theirs)]
        assert errors[0] < 1.05 * errors[1] < 0.02


PRODUCTS = {
    "critic's last": (draw(4, 6, 4, 4), draw(2, 6, 4, 4, seed=1), False),
    "generator's first": (draw(4, 6, 1, 1), draw(6, 3, 4, 4, seed=1), True),
    "one dimension": (draw(4, 6, 5), draw(2, 6, 5, seed=1), False),
    "three dimensions": (draw(4, 6, 1, 1, 1), draw(6, 2, 2, 3, 2, seed=1), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_convolutions(name: str, layout: torch.memory_format) -> None:
    x, weight, is_transposed = PRODUCTS[name]
    if x.ndim == 4:
        x, weight = (each.contiguous(memory_format=layout) for each in (x, weight))
    bias = draw(weight.shape[1 if is_transposed else 0], seed=2)
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    settings = Settings(ones, zeros, ones, is_transposed, zeros, 1)
    x, weight, bias = leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    found = as_matrix_product(x, weight, bias, settings)
    expected = aten.convolution(x, weight, bias, *settings)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    weights = draw(*found.shape, seed=3)
    for mine, theirs in zip(
        *(torch.autograd.grad((each * weights).sum(), leaves) for each in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-12)


def test_what_is_no_product_is_none() -> None:
    plain = Settings([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    x, weight = draw(2, 4, 4, 4), draw(3, 4, 4, 4)
    assert as_matrix_product(x, weight, None, plain) is not None
    assert as_matrix_product(x, weight, None, plain._replace(padding=[1, 1])) is None
    assert as_matrix_product(x, draw(4, 2, 4, 4), None, plain._replace(groups=2)) is None
    assert as_matrix_product(x, draw(3, 4, 3, 4), None, plain) is None
    assert as_matrix_product(draw(2, 4, 1, 1), draw(3, 4, 1, 1), None, plain) is None


@pytest.mark.parametrize("window", [2, 3])
def test_what_a_pool_averaged_gets_equal_shares(window: int) -> None:
    x = draw(2, 3, 12, 12).requires_grad_()
    gradient = draw(2, 3, 12 // window, 12 // window, seed=1)
    (expected,) = torch.autograd.grad(F.avg_pool2d(x, window), x, gradient)
    torch.testing.assert_close(unpool(gradient, window), expected, rtol=1e-15, atol=0)


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dcgan generator": (DCGANGenerator(6, (3, 32, 32), width=4), (4, 6)),
    "dcgan critic": (DCGANCritic((3, 32, 32), width=4), (4, 3, 32, 32)),
    "resnet generator": (ResNetGenerator(6, (1, 16, 16), width=4), (4, 6)),
    "resnet critic": (ResNetCritic((1, 16, 16), width=4), (4, 1, 16, 16)),
    "pools": (
        nn.Sequential(nn.AvgPool2d((2, 3), 1, padding=1), nn.AvgPool2d(3), nn.AvgPool2d(2, 2)),
        (2, 1, 20, 20),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_first_derivatives_of_whole_networks_are_autograds(
    name: str, layout: torch.memory_format
) -> None:
    network, shape = NETWORKS[name]
    network = network.double().to(memory_format=layout)  # type: ignore[call-overload]
    inputs = draw(*shape).requires_grad_()
    leaves = [inputs, *network.parameters()]
    found = []
    for context in (FastDerivatives(), torch.enable_grad()):
        with context:
            output = network(inputs)
        gradients_of = torch.autograd.grad(output.square().sum(), leaves)
        found.append((output.detach(), *gradients_of))
    for mine, theirs in zip(*found, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert (mine - theirs).abs().max().item() <= 1e-13 * scale
    with torch.no_grad(), FastDerivatives():
        torch.testing.assert_close(network(inputs), found[1][0], rtol=1e-12, atol=1e-12)


def test_layers_at_both_ends_of_a_gan_are_taken() -> None:
    """And, of those between them, none in float32: autograd's are as fast."""
    critic = DCGANCritic((3, 32, 32), width=64).layers
    generator = DCGANGenerator(6, (3, 32, 32), width=64).layers
    with FastDerivatives():
        image = torch.zeros(2, 3, 32, 32, requires_grad=True)
        first, middle = critic[0](image), critic[2](torch.zeros(2, 64, 16, 16))
        last = critic[-1](torch.zeros(2, 256, 4, 4))
        made = generator[-2](torch.zeros(2, 64, 16, 16))
        with torch.autocast("cpu", torch.bfloat16):
            low = critic[2](torch.zeros(2, 64, 16, 16))
    assert [type(each.grad_fn).__name__ for each in (first, middle, made, low)] == [
        "_ConvolutionBackward",
        "ConvolutionBackward0",
        "_ConvolutionBackward",
        "_ConvolutionBackward",
    ]
    assert "Convolution" not in type(last.grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]


def test_derivatives_are_differences() -> None:
    x, weight = draw(2, 2, 5, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1).requires_grad_()

    def make(x: Tensor, weight: Tensor) -> Tensor:
        with FastDerivatives():
            return F.avg_pool2d(F.conv_transpose2d(x, weight, stride=2, padding=1), 2)

    assert gradcheck(make, (x, weight))
