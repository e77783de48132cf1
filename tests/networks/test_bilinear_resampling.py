import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from ganscale.networks.bilinear_resampling import BilinearDownsample, BilinearUpsample
from tests.helpers.processes import run_python

LAYERS = [BilinearUpsample, BilinearDownsample]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def along_columns(lines: Tensor, kind: type[nn.Module]) -> Tensor:
    """The definition in one direction: (..., length) to (..., 2 length) or (..., length / 2)."""
    length = lines.shape[-1]

    def at(index: int) -> Tensor:
        return lines[..., index] if 0 <= index < length else torch.zeros_like(lines[..., 0])

    entries = []
    for i in range(length):
        if kind is BilinearUpsample:
            entries += [at(i), (at(i) + at(i + 1)) / 2]
        elif i % 2 == 0:
            entries.append((at(i - 1) + 2 * at(i) + at(i + 1)) / 4)
    return torch.stack(entries, -1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resampling_is_its_definition_in_both_directions(kind, layout, dtype) -> None:
    """Small whole numbers, which every precision holds exactly."""
    torch.manual_seed(0)
    maps = torch.randint(-4, 5, (2, 3, 6, 4)).to(dtype).contiguous(memory_format=layout)
    expected = along_columns(along_columns(maps.double(), kind).mT, kind).mT
    output = kind()(maps)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    assert torch.equal(output.double(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upsampling_is_four_times_the_transpose_of_downsampling(layout) -> None:
    torch.manual_seed(0)
    small, large = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 8, 8).double()
    small, large = small.contiguous(memory_format=layout), large.contiguous(memory_format=layout)
    up, down = BilinearUpsample()(small), BilinearDownsample()(large)
    torch.testing.assert_close((up * large).sum(), 4 * (small * down).sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_match_finite_differences(kind, layout) -> None:
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64).contiguous(memory_format=layout)
    assert gradcheck(kind(), maps.requires_grad_())
    assert gradgradcheck(lambda maps: kind()(maps).square(), maps)


COMPILED = """
import torch
from ganscale.networks.bilinear_resampling import BilinearDownsample, BilinearUpsample
layers = torch.nn.Sequential(BilinearDownsample(), torch.nn.ReLU(), BilinearUpsample())
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


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_by_torch_func_are_the_same(kind) -> None:
    maps = torch.randn(2, 3, 4, 6, dtype=torch.float64)

    def loss(maps: Tensor) -> Tensor:
        return kind()(maps).square().sum()

    (expected,) = torch.autograd.grad(loss(maps.requires_grad_()), maps)
    torch.testing.assert_close(torch.func.grad(loss)(maps), expected, rtol=1e-13, atol=1e-13)


def test_an_odd_map_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\) pixels"):
        BilinearDownsample()(torch.zeros(1, 2, 5, 4))
