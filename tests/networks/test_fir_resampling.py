"""Against the definition of upfirdn: zeros between pixels, padding, a filter, every n-th pixel."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from ganscale.networks.fir_resampling import Blur, FIRDownsample, FIRUpsample
from ganscale.networks.stylegan2.generator import StyleGAN2Generator
from ganscale.random import drawing
from tests.helpers.networks import draw
from tests.helpers.processes import run_python

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# (layer, kernel, up, down, padding before and after, gain), as upfirdn takes them
CASES = {
    "doubling": (FIRUpsample(), (1, 3, 3, 1), 2, 1, (2, 1), 4),
    "halving": (FIRDownsample(), (1, 3, 3, 1), 1, 2, (1, 1), 1),
    "blur of a larger map": (Blur(1, gain=4.0), (1, 3, 3, 1), 1, 1, (1, 1), 4),
    "blur to a larger map": (Blur(2), (1, 3, 3, 1), 1, 1, (2, 2), 1),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def upfirdn(maps: Tensor, kernel: tuple, up: int, down: int, padding: tuple, gain: float) -> Tensor:
    """Karras et al. 2020's operator, one image and channel after the other."""
    height, width = maps.shape[2:]
    spread = maps.new_zeros(*maps.shape[:2], height * up, width * up)
    spread[:, :, ::up, ::up] = maps
    padded = F.pad(spread, (*padding, *padding))
    line = torch.tensor(kernel, dtype=maps.dtype) / sum(kernel)
    weight = gain * torch.outer(line, line)[None, None]
    filtered = F.conv2d(padded.flatten(0, 1)[:, None], weight)
    return filtered.unflatten(0, maps.shape[:2])[:, :, 0, ::down, ::down]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resampling_is_its_definition(case, layout, dtype) -> None:
    """Small whole numbers, which every precision holds exactly."""
    layer, *definition = case
    torch.manual_seed(0)
    maps = torch.randint(-1, 2, (2, 3, 6, 4)).to(dtype).contiguous(memory_format=layout)
    output = layer(maps)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    # The sums of [1, 3, 3, 1] in both directions have up to 9 bits, one more than bfloat16.
    slack = 2**-8 if dtype == torch.bfloat16 else 0
    expected = upfirdn(maps.double(), *definition)
    torch.testing.assert_close(output.double(), expected, rtol=slack, atol=slack)


def test_first_and_second_derivatives_are_those_of_the_definition(case) -> None:
    layer, *definition = case
    torch.manual_seed(0)
    weights = torch.randn_like(layer(torch.zeros(2, 3, 4, 6, dtype=torch.float64)))
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (layer, lambda maps: upfirdn(maps, *definition)):
        loss = (weights * function(maps.tanh()).square()).sum()
        (first,) = torch.autograd.grad(loss, maps, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), maps)
        results.append((loss, first, second))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_match_finite_differences(case, layout) -> None:
    layer = case[0]
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64).contiguous(memory_format=layout)
    assert gradcheck(layer, maps.requires_grad_())
    assert gradgradcheck(lambda maps: layer(maps).square(), maps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_bfloat16_are_those_in_float64(case, layout) -> None:
    """There, a CPU doubles maps in a way of its own."""
    layer = case[0]
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 4, 6).contiguous(memory_format=layout).bfloat16()
    found = []
    for each in (maps, maps.double()):
        leaf = each.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
        found.append(gradient.double())
    torch.testing.assert_close(*found, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layer_returns_may_be_changed_in_place(case, dtype, layout) -> None:
    """As the residual generator of StyleGAN2 does."""
    layer = case[0]
    maps = torch.randn(2, 3, 4, 6).contiguous(memory_format=layout).to(dtype).requires_grad_()
    loss = layer(maps).add_(1).sum()
    (gradient,) = torch.autograd.grad(loss, maps)
    (expected,) = torch.autograd.grad(layer(maps).sum(), maps)
    assert torch.equal(gradient, expected)


COMPILED = """
import torch
from ganscale.networks.fir_resampling import Blur, FIRDownsample, FIRUpsample
layers = torch.nn.Sequential(FIRDownsample(), torch.nn.ReLU(), Blur(1), FIRUpsample())
maps = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
for network in layers, compiled:
    loss = network(maps).square().sum()
    print([round(float(g), 10) for g in torch.autograd.grad(loss, maps)[0].flatten()])
"""


def test_compiled_resampling_is_the_same() -> None:
    """In a process of its own, without the checks of shapes that tests have."""
    plain, compiled = run_python("-c", COMPILED).stdout.splitlines()
    assert plain == compiled


def test_gradients_by_torch_func_are_the_same(case) -> None:
    layer: nn.Module = case[0]
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64)

    def loss(maps: Tensor) -> Tensor:
        return layer(maps).square().sum()

    (expected,) = torch.autograd.grad(loss(maps.requires_grad_()), maps)
    torch.testing.assert_close(torch.func.grad(loss)(maps), expected, rtol=1e-13, atol=1e-13)


@pytest.fixture
def autocast_of_gpus() -> Iterator[None]:
    """On GPUs, autocast casts `aten.convolution`; on CPUs, only the functions that call it."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::convolution", "AutocastCUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::convolution", "AutocastCPU")
    autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            tensors = [each if each is None else each.bfloat16() for each in (input, weight, bias)]
            return torch.ops.aten.convolution(*tensors, *settings)

    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    library.impl("convolution", convolution)
    yield
    library._destroy()


@pytest.mark.usefixtures("autocast_of_gpus")
@pytest.mark.parametrize("layer", [FIRUpsample(), FIRDownsample(), Blur(2)])
def test_float32_maps_stay_in_float32_under_autocast(layer: nn.Module) -> None:
    maps = draw(2, 3, 8, 8).float()
    expected = layer(maps)
    with torch.autocast("cpu", torch.bfloat16):
        settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        assert torch.ops.aten.convolution(maps, maps, None, *settings).dtype == torch.bfloat16
        found = layer(maps)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("autocast_of_gpus")
def test_images_of_stylegan2_add_up_in_float32_on_gpus() -> None:
    torch.manual_seed(0)
    generator = StyleGAN2Generator(4, (3, 32, 32), widths=8, bfloat16_stages=3)
    dtypes = []
    for each in generator.modules():
        if isinstance(each, FIRUpsample):
            each.register_forward_hook(
                lambda _, inputs, output: dtypes.append((inputs[0].dtype, output.dtype))
            )
    with drawing(0, ("test",), torch.arange(2)):
        generator(draw(2, 4).float())
    assert len(dtypes) == 3
    assert all(before == after for before, after in dtypes)


def test_doubling_is_bilinear_inside_of_the_edges() -> None:
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
    inside = slice(1, -1)
    torch.testing.assert_close(
        FIRUpsample()(maps)[..., inside, inside], expected[..., inside, inside]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resampled_mirror_images_are_mirror_images(case, dtype) -> None:
    """A kernel with an odd number of taps would move maps by half a pixel."""
    layer = case[0]
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64).to(dtype)
    slack = 2**-6 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(
        layer(maps.flip(2, 3)), layer(maps).flip(2, 3), rtol=slack, atol=slack
    )


def test_an_odd_map_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\) pixels"):
        FIRDownsample()(torch.zeros(1, 2, 5, 4))
