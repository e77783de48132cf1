"""Faster convolutions against torch's own, in float64."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.r3gan import R3GANGenerator
from ganscale.networks.resnet import ResNetCritic, ResNetGenerator
from ganscale.objectives import fast_convolutions
from ganscale.objectives.double_backward import _Unpool
from ganscale.objectives.fast_convolutions import (
    ConvolutionSettings,
    as_matrix_product,
    convolution_gradients,
    convolve,
)
from ganscale.objectives.fast_derivatives import FastDerivatives
from tests.helpers.networks import draw, small_r3gan_critic, without_zeros

aten = torch.ops.aten
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def strided(*, is_transposed: bool) -> Iterator[tuple[ConvolutionSettings, tuple[int, int]]]:
    """Settings with a stride, and kernel sizes, square or not, that it divides or not."""
    for stride, padding, kernel in product((2, 3), (0, 1, 2), ((2, 2), (3, 3), (4, 4), (5, 3))):
        for extra in range(stride if is_transposed else 1):
            paddings = [padding, max(0, padding - 1)]
            yield (
                ConvolutionSettings([stride] * 2, paddings, [1, 1], is_transposed, [extra, 0], 1),
                kernel,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_transposed_convolutions_match_torch(
    channels: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = watch_subpixel(monkeypatch)
    for settings, kernel in strided(is_transposed=True):
        x = draw(2, 5, 6, 7).contiguous(memory_format=layout)
        weight = draw(5, channels, *kernel, seed=1).contiguous(memory_format=layout)
        bias = draw(channels, seed=2)
        if min(aten.convolution(x, weight, bias, *settings).shape) > 0:
            actual = convolve(x, weight, bias, settings)
            expected = aten.convolution(x, weight, bias, *settings)
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
            assert channels == 1 or actual.is_contiguous(memory_format=layout)
    assert used.count(True) > 40


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_gradients_match_torch(
    size: tuple[int, int], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = watch_subpixel(monkeypatch)
    for settings, kernel in strided(is_transposed=False):
        x = draw(2, 3, *size).contiguous(memory_format=layout)
        weight = draw(5, 3, *kernel, seed=1).contiguous(memory_format=layout)
        gradient = draw(*aten.convolution(x, weight, None, *settings).shape, seed=2)
        gradient = gradient.contiguous(memory_format=layout)
        for output_mask in ([True, False, False], [True, True, True]):
            arguments = gradient, x, weight, [5], settings
            actual = convolution_gradients(*arguments, output_mask)
            expected = aten.convolution_backward(gradient, x, weight, [5], *settings, output_mask)
            for ours, torchs in zip(actual, expected, strict=True):
                assert (ours is None) == (torchs is None)
                if ours is not None and torchs is not None:
                    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-12)
    assert used.count(True) > 20


def watch_subpixel(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows: whether each sub-pixel convolution that was tried was possible."""
    original, used = fast_convolutions._subpixel_convolution, []

    def subpixel_convolution(*arguments: object) -> Tensor | None:
        output = original(*arguments)  # type: ignore[arg-type]
        used.append(output is not None)
        return output

    monkeypatch.setattr(fast_convolutions, "_subpixel_convolution", subpixel_convolution)
    return used


@pytest.mark.parametrize("layout", LAYOUTS)
def test_im2col_weight_gradients_match_torch(
    layout: torch.memory_format,
) -> None:
    only_weight = [False, True, False]
    for settings, kernel in strided(is_transposed=False):
        fine = draw(2, 6, 9, 8).contiguous(memory_format=layout)
        weight = draw(5, 6, *kernel, seed=1).contiguous(memory_format=layout)
        coarse = draw(*aten.convolution(fine, weight, None, *settings).shape, seed=2)
        actual = fast_convolutions._im2col_weight_gradient(coarse, fine, weight, settings)
        arguments = coarse, fine, weight, None, *settings
        expected = aten.convolution_backward(*arguments, only_weight)[1]
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-12)
        assert actual.is_contiguous(memory_format=layout)
        # The transposed convolution maps the coarse one to the fine one.
        if settings.padding == [0, 0]:
            back = aten.convolution(coarse, weight, None, *settings[:3], True, [0, 0], 1)
            up = settings._replace(is_transposed=True)
            other = draw(*back.shape, seed=3)
            actual = fast_convolutions._im2col_weight_gradient(coarse, other, weight, up)
            arguments = other, coarse, weight, None, *up
            expected = aten.convolution_backward(*arguments, only_weight)[1]
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_im2col_weight_gradients_err_no_more_than_torchs(is_transposed: bool) -> None:
    settings = ConvolutionSettings([2, 2], [1, 1], [1, 1], is_transposed, [0, 0], 1)
    x, weight = draw(4, 64, 8, 8), draw(64, 64, 4, 4, seed=1)
    gradient = draw(*aten.convolution(x, weight, None, *settings).shape, seed=2)
    output_mask = [True, True, True]
    exact = aten.convolution_backward(gradient, x, weight, [64], *settings, output_mask)
    gradient, x, weight = gradient.bfloat16(), x.bfloat16(), weight.bfloat16()
    assert fast_convolutions.is_im2col_faster(weight, weight.dtype, settings)
    actual = convolution_gradients(gradient, x, weight, [64], settings, output_mask)
    torchs = aten.convolution_backward(gradient, x, weight, [64], *settings, output_mask)
    for gradient, torchs_gradient, expected in zip(actual, torchs, exact, strict=True):
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        error, torchs_error = (
            (bfloat16.double() - expected).norm() / expected.norm()
            for bfloat16 in (gradient, torchs_gradient)
        )
        assert error < 1.05 * torchs_error < 0.02


PRODUCTS = {
    "critic's last": (draw(4, 6, 4, 4), draw(2, 6, 4, 4, seed=1), False),
    "generator's first": (draw(4, 6, 1, 1), draw(6, 3, 4, 4, seed=1), True),
    "one dimension": (draw(4, 6, 5), draw(2, 6, 5, seed=1), False),
    "three dimensions": (draw(4, 6, 1, 1, 1), draw(6, 2, 2, 3, 2, seed=1), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products_match_convolutions(name: str, layout: torch.memory_format) -> None:
    x, weight, is_transposed = PRODUCTS[name]
    if x.ndim == 4:
        x, weight = (each.contiguous(memory_format=layout) for each in (x, weight))
    bias = draw(weight.shape[1 if is_transposed else 0], seed=2)
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    settings = ConvolutionSettings(ones, zeros, ones, is_transposed, zeros, 1)
    x, weight, bias = leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    actual = as_matrix_product(x, weight, bias, settings)
    expected = aten.convolution(x, weight, bias, *settings)
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    weights = draw(*actual.shape, seed=3)
    for ours, torchs in zip(
        *(torch.autograd.grad((each * weights).sum(), leaves) for each in (actual, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-12)


def test_other_convolutions_are_not_matrix_products() -> None:
    plain = ConvolutionSettings([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    x, weight = draw(2, 4, 4, 4), draw(3, 4, 4, 4)
    assert as_matrix_product(x, weight, None, plain) is not None
    assert as_matrix_product(x, weight, None, plain._replace(padding=[1, 1])) is None
    assert as_matrix_product(x, draw(4, 2, 4, 4), None, plain._replace(groups=2)) is None
    assert as_matrix_product(x, draw(3, 4, 3, 4), None, plain) is None
    assert as_matrix_product(draw(2, 4, 1, 1), draw(3, 4, 1, 1), None, plain) is None


@pytest.mark.parametrize("window", [2, 3])
def test_unpool_is_the_gradient_of_an_average_pool(window: int) -> None:
    x = draw(2, 3, 12, 12).requires_grad_()
    gradient = draw(2, 3, 12 // window, 12 // window, seed=1)
    (expected,) = torch.autograd.grad(F.avg_pool2d(x, window), x, gradient)
    torch.testing.assert_close(_Unpool.apply(gradient, window), expected, rtol=1e-15, atol=0)


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dcgan generator": (DCGANGenerator(6, (3, 32, 32), width=4), (4, 6)),
    "dcgan critic": (DCGANCritic((3, 32, 32), width=4), (4, 3, 32, 32)),
    "resnet generator": (ResNetGenerator(6, (1, 16, 16), width=4), (4, 6)),
    "resnet critic": (ResNetCritic((1, 16, 16), width=4), (4, 1, 16, 16)),
    "r3gan generator": (
        without_zeros(R3GANGenerator(6, (1, 16, 16), widths=[8, 8, 4], group_width=4)),
        (4, 6),
    ),
    "r3gan critic": (small_r3gan_critic((1, 16, 16)), (4, 1, 16, 16)),
    "pools": (
        nn.Sequential(nn.AvgPool2d((2, 3), 1, padding=1), nn.AvgPool2d(3), nn.AvgPool2d(2, 2)),
        (2, 1, 20, 20),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_first_derivatives_of_whole_networks_match_autograd(
    name: str, layout: torch.memory_format
) -> None:
    network, shape = NETWORKS[name]
    network = network.double().to(memory_format=layout)  # type: ignore[call-overload]
    inputs = draw(*shape).requires_grad_()
    leaves = [inputs, *network.parameters()]
    results = []
    for context in (FastDerivatives(), torch.enable_grad()):
        with context:
            output = network(inputs)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append((output.detach(), *gradients))
    for fast, plain in zip(*results, strict=True):
        scale = max(1.0, plain.abs().max().item())
        assert (fast - plain).abs().max().item() <= 1e-13 * scale
    with torch.no_grad(), FastDerivatives():
        torch.testing.assert_close(network(inputs), results[1][0], rtol=1e-12, atol=1e-12)


def test_layers_at_both_ends_of_a_gan_have_faster_forms() -> None:
    """Those between them do not in float32, where autograd's are as fast."""
    critic = DCGANCritic((3, 32, 32), width=64).layers
    generator = DCGANGenerator(6, (3, 32, 32), width=64).layers
    with FastDerivatives():
        image = torch.zeros(2, 3, 32, 32, requires_grad=True)
        first, middle = critic[0](image), critic[2](torch.zeros(2, 64, 16, 16))
        last = critic[-1](torch.zeros(2, 256, 4, 4))
        image_layer = generator[-2](torch.zeros(2, 64, 16, 16))
        with torch.autocast("cpu", torch.bfloat16):
            low = critic[2](torch.zeros(2, 64, 16, 16))
    assert [type(each.grad_fn).__name__ for each in (first, middle, image_layer, low)] == [
        "FastConvolutionBackward",
        "ConvolutionBackward0",
        "FastConvolutionBackward",
        "FastConvolutionBackward",
    ]
    assert "Convolution" not in type(last.grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]


def test_derivatives_match_finite_differences() -> None:
    x, weight = draw(2, 2, 5, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1).requires_grad_()

    def make(x: Tensor, weight: Tensor) -> Tensor:
        with FastDerivatives():
            return F.avg_pool2d(F.conv_transpose2d(x, weight, stride=2, padding=1), 2)

    assert gradcheck(make, (x, weight))
