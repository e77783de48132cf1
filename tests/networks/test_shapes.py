"""The sizes of images that our convolutional networks can make and judge."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.build import build_network, parameter_count
from ganscale.networks.shapes import ImageShape, image_shape
from ganscale.objectives.penalties import PENALTIES, Draws, input_gradients
from tests.helpers.networks import draw, without_zeros

LATENT_DIM = 5
OPTIONS = {
    "dcgan": {"width": 4, "max_width": 8},
    "resnet": {"width": 4, "max_width": 8},
    "r3gan": {"widths": 4, "group_width": 4, "blocks": 1},
}
SIZES = [
    *[(side, side) for side in (16, 28, 32, 64, 96, 128, 256, 512, 1024)],
    *[(16, 32), (32, 16), (64, 128), (192, 256), (256, 512), (512, 1024), (1024, 16)],
]


def pair(target: str, size: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    options, shape = OPTIONS[target], (3, *size)
    facts = {"sample_shape": shape, "num_classes": 0}
    generator = build_network("generator", target, options, latent_dim=LATENT_DIM, **facts)
    return generator, build_network("critic", target, options, **facts)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", OPTIONS)
def test_networks_make_and_judge_images_of_every_size(target: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        generator, critic = pair(target, size)
        images = generator(torch.empty(2, LATENT_DIM))
        assert images.shape == (2, 3, *size)
        assert critic(images).shape == (2,)


def test_papers_widths_reach_1024_pixels() -> None:
    """Each doubling from 4x4 pixels on adds two convolutions of 4x4 with their channels."""
    with torch.device("meta"):
        facts: dict[str, Any] = {"sample_shape": (3, 1024, 1024), "num_classes": 0}
        generator = build_network("generator", "dcgan", {"norm": "none"}, latent_dim=100, **facts)
        critic = build_network("critic", "dcgan", {}, **facts)
    widths = [64, 128, 256, 512, 1024, 1024, 1024, 1024]
    convs = sum(16 * a * b for a, b in pairwise(widths))
    biases = sum(widths)
    assert parameter_count(generator) == 100 * 1024 * 16 + convs + 64 * 3 * 16 + biases + 3
    assert parameter_count(critic) == 3 * 64 * 16 + convs + 1024 * 16 + biases


@pytest.mark.parametrize("target", OPTIONS)
def test_a_wider_image_only_has_a_wider_lowest_resolution(target: str) -> None:
    with torch.device("meta"):
        square = [parameter_count(network) for network in pair(target, (32, 32))]
        wide = [parameter_count(network) for network in pair(target, (32, 64))]
    lowest = {"dcgan": 8, "resnet": 8, "r3gan": 4}[target]  # its channels
    added = 4 * 4 * lowest
    more_inputs = {"dcgan": LATENT_DIM * added, "resnet": (LATENT_DIM + 1) * added, "r3gan": added}
    more_outputs = {"dcgan": added, "resnet": 0, "r3gan": added}  # resnet's critic takes the mean
    assert wide[0] - square[0] == more_inputs[target]
    assert wide[1] - square[1] == more_outputs[target]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), ImageShape(3, (4, 4), 4)),
        ((28, 28), ImageShape(3, (7, 7), 2)),
        ((64, 128), ImageShape(3, (4, 8), 4)),
        ((512, 256), ImageShape(3, (8, 4), 6)),
        ((192, 256), ImageShape(3, (6, 8), 5)),
        ((16, 20), ImageShape(3, (4, 5), 2)),
    ],
)
def test_the_shorter_side_is_halved_down_to_4_to_7_pixels(
    size: tuple[int, int], expected: ImageShape
) -> None:
    shape = image_shape((3, *size), "dcgan")
    assert shape == expected
    assert str(shape) == f"{size[0]}x{size[1]}"


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((100, 100), "dcgan has no layers for 100x100 images: resize them to 96x96 or 112x112"),
        ((240, 320), "dcgan has no layers for 240x320 images: resize them to 224x320 or 256x320"),
        ((1080, 1920), "resize them to 512x1024 or 640x1024"),
        ((2048, 2048), "resize them to 1024x1024"),
        ((8, 8), "resize them to 16x16 or 32x32"),
        ((8, 64), "resize them to 16x64 or 32x64"),
        ((1, 3000), "resize them to 16x1024 or 32x1024"),
        ((64, 65), "resize them to 64x64 or 64x80"),
    ],
)
def test_another_size_is_refused_with_those_next_to_it(
    size: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        image_shape((3, *size), "dcgan")
    assert str(caught.value).endswith(sentence)


def test_sizes_named_in_place_of_another_are_possible() -> None:
    def refused() -> Iterator[str]:
        for height in range(1, 1300, 29):
            for width in range(1, 1300, 31):
                try:
                    image_shape((3, height, width), "dcgan")
                except UserError as error:
                    yield str(error).rpartition("to ")[2]

    found = set(refused())
    assert len(found) > 100
    for size in {size for sizes in found for size in sizes.split(" or ")}:
        height, width = map(int, size.split("x"))
        assert str(image_shape((3, height, width), "dcgan")) == size


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (20, 28)], ids=str)
@pytest.mark.parametrize("target", OPTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_penalties_of_images_that_are_not_square_are_those_of_autograd(
    target: str, size: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    _, critic = pair(target, size)
    without_zeros(critic.double()).to(memory_format=layout)  # type: ignore[call-overload]
    images = draw(3, 3, *size).contiguous(memory_format=layout)

    def plain(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        return torch.autograd.grad(critic(images).sum(), images, create_graph=True)[0]

    def expected(name: str, gradients: Tensor) -> Tensor:
        if name == "r1":
            return gradients.flatten(1).square().sum(1).mean() / 2
        return (gradients.flatten(1).norm(dim=1) - 1).square().mean()

    parameters = list(critic.parameters())
    for name in ("r1", "wgan_gp"):
        fast = PENALTIES[name]().value_and_norms(input_gradients(critic, images, None))[0]
        slow = expected(name, plain(images))
        assert abs(fast - slow) <= 1e-12 * slow
        found, wanted = (
            torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            for value in (fast, slow)
        )
        scale = max(float(gradient.abs().max()) for gradient in wanted)
        assert scale > 0
        for gradient, reference in zip(found, wanted, strict=True):
            assert float((gradient - reference).abs().max()) <= 1e-12 * scale, name


def test_dragans_noise_has_a_number_of_its_own_for_each_pixel() -> None:
    images = draw(2, 3, 8, 16)
    points = PENALTIES["dragan"]().points(images, images, Draws(0, torch.arange(2)))
    assert points.shape == images.shape
    assert len((points - images).unique()) == math.prod(images.shape)
