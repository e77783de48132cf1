import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganscale.config import resolve
from ganscale.errors import UserError
from ganscale.networks.build import build_network, parameter_count
from ganscale.networks.r3gan import R3GANCritic, R3GANGenerator, ResidualBlock
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.penalties import input_gradients
from ganscale.runtime import autocast
from tests.helpers.networks import draw, without_zeros
from tests.helpers.processes import REPOSITORY
from tests.helpers.r3gan_by_hand import (
    block_by_hand,
    downsample,
    head_by_hand,
    images_by_hand,
    logits_by_hand,
    upsample,
)

# Widths from 4x4 pixels up, classes, and group width of the paper's networks.
PAPERS = {
    "cifar10": ([768] * 4, 10, 16),
    "ffhq64": ([768, 768, 768, 768, 384], 0, 16),
    "ffhq256": ([768, 768, 768, 768, 384, 192, 96], 0, 16),
    "imagenet32": ([1536] * 4, 1000, 32),
    "imagenet64": ([1536] * 5, 1000, 32),
}


def moved(network: nn.Module) -> nn.Module:
    """In float64, with no layer hidden behind zeros."""
    return without_zeros(network.double())


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_resolution_has_its_pair(resolution: int, num_classes: int) -> None:
    shape, labels = (3, resolution, resolution), torch.tensor([0, 2])
    options = {"widths": 2, "group_width": 2, "blocks": 1}
    generator = R3GANGenerator(5, shape, num_classes, **options)
    images = generator(torch.randn(2, 5), labels)
    assert images.shape == (2, *shape)
    assert R3GANCritic(shape, num_classes, **options)(images, labels).shape == (2,)


def test_a_stage_for_each_resolution_has_its_width_whichever_way_it_is_passed() -> None:
    maps: list[tuple[int, ...]] = []

    def record(*call: Any) -> None:
        maps.append(tuple(call[-1].shape[1:]))

    widths, blocks = [32, 16, 8], 3
    generator = R3GANGenerator(5, (1, 16, 16), widths=widths, blocks=blocks, group_width=4)
    critic = R3GANCritic((1, 16, 16), widths=widths, blocks=blocks, group_width=4)
    for module in [*generator.modules(), *critic.modules()]:
        if isinstance(module, ResidualBlock):
            assert module.conv2.weight.shape == (2 * module.conv1.in_channels, 4, 3, 3)
            module.register_forward_hook(record)
    critic(generator(torch.randn(2, 5)))
    up = [shape for shape in [(32, 4, 4), (16, 8, 8), (8, 16, 16)] for _ in range(blocks)]
    assert maps == up + up[::-1]


def test_the_pair_for_ffhq_256_has_as_many_parameters_as_the_paper_says() -> None:
    """Huang et al. 2024, section 4, the table of the roadmap: Config E has 23.058 million
    parameters in the generator and 23.010 million in the discriminator."""
    config = resolve([str(REPOSITORY / "configs" / "r3gan_ffhq256.yaml")]).config
    with torch.device("meta"):
        generator = R3GANGenerator(64, (3, 256, 256), **config.generator.options)
        critic = R3GANCritic((3, 256, 256), **config.critic.options)
    assert round(parameter_count(generator) / 1e6, 3) == 23.058
    assert round(parameter_count(critic) / 1e6, 3) == 23.010


@pytest.mark.parametrize("name", PAPERS)
def test_parameter_counts_of_the_presets_follow_from_the_papers_layers(name: str) -> None:
    widths, classes, group_width = PAPERS[name]
    shape = (3, 2 ** (len(widths) + 1), 2 ** (len(widths) + 1))
    blocks = 0
    for width in widths:
        hidden = 2 * width
        block = width * hidden + hidden * group_width * 9 + hidden * width + 2 * hidden
        blocks += 2 * block
    changes = sum(a * b for a, b in pairwise(widths) if a != b)
    basis, image = 4 * 4 * widths[0], 3 * widths[-1]
    shared = blocks + changes + basis + image
    config = resolve([str(REPOSITORY / "configs" / f"r3gan_{name}.yaml")]).config
    assert config.data.sample_shape == shape
    latent_dim = config.generator.latent_dim
    with torch.device("meta"):
        generator = R3GANGenerator(latent_dim, shape, classes, **config.generator.options)
        critic = R3GANCritic(shape, classes, **config.critic.options)
    embedded = 64 if classes else 0
    assert parameter_count(generator) == shared + (64 + embedded) * widths[0] + classes * embedded
    embedded = widths[-1] if classes else 0  # as wide as the highest resolution's stage
    assert parameter_count(critic) == shared + (embedded or 1) * widths[0] + classes * embedded


def test_classes_start_as_a_linear_layer_of_one_hot_vectors() -> None:
    """Of deviation C^(-1/2) for C classes, in the critic over the root of the dimensions, too."""
    shape, options = (3, 16, 16), {"widths": 2, "group_width": 2, "embedding_dim": 200}
    for network, deviation in (
        (R3GANGenerator(4, shape, 100, **options), 0.1),
        (R3GANCritic(shape, 100, **options), 0.1 * 200**-0.5),
    ):
        assert network.embedding is not None
        assert network.embedding.weight.std().item() == pytest.approx(deviation, rel=0.03)


def layers_of(stages: nn.ModuleList) -> list[list[Any]]:
    return [list(stage.children()) for stage in stages]


def test_both_networks_are_the_papers_formulas_written_out() -> None:
    """At 16 pixels, one block a stage, with a change of width after the first stage."""
    torch.manual_seed(0)
    shape, labels = (3, 16, 16), torch.tensor([2, 0])
    options = {"widths": [12, 8, 8], "blocks": 1, "group_width": 4, "embedding_dim": 6}
    generator = moved(R3GANGenerator(5, shape, 3, **options))
    critic = moved(R3GANCritic(shape, 3, **options))
    assert isinstance(generator, R3GANGenerator)
    assert isinstance(critic, R3GANCritic)
    latents = draw(2, 5)
    assert generator.embedding is not None
    inputs = torch.cat([latents, generator.embedding.weight[labels]], 1)
    scales = torch.einsum("oi,bi->bo", generator.modulation.weight, inputs)
    maps = torch.einsum("bc,chw->bchw", scales, generator.basis)
    first, second, third = layers_of(generator.stages)
    maps = block_by_hand(first[0], maps)
    maps = upsample(F.conv2d(maps, second[0].weight))
    maps = block_by_hand(second[2], maps)
    maps = block_by_hand(third[1], upsample(maps))
    expected = F.conv2d(maps, third[2].weight)
    images = generator(latents, labels)
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(images_by_hand(generator, latents, labels), expected)

    first, second, third = layers_of(critic.stages)
    maps = block_by_hand(first[1], F.conv2d(images, first[0].weight))
    maps = block_by_hand(second[0], downsample(maps))
    maps = F.conv2d(downsample(maps), second[2].weight)
    maps = block_by_hand(third[0], maps)
    expected = head_by_hand(critic, maps, labels)
    assert torch.equal(logits_by_hand(critic, images, labels), expected)
    torch.testing.assert_close(critic(images, labels), expected, rtol=1e-12, atol=1e-12)


def test_weights_start_with_the_gain_of_the_depth_and_residuals_at_zero() -> None:
    torch.manual_seed(0)
    critic = R3GANCritic((3, 32, 32), widths=64, blocks=2)
    gain = math.sqrt(2 / (1 + 0.2**2)) * (4 * 2) ** (-1 / 4)
    for module in critic.modules():
        if isinstance(module, ResidualBlock):
            for conv in (module.conv1, module.conv2):
                fan_in = conv.weight[0].numel()
                assert conv.weight.std().item() == pytest.approx(gain * fan_in**-0.5, rel=0.05)
                assert conv.bias is not None
                assert not conv.bias.any()
            assert not module.conv3.weight.any()
            assert module.conv3.bias is None


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2] * 4)
    options = {"widths": [8, 8, 4], "group_width": 4}
    generator = moved(R3GANGenerator(5, (3, 16, 16), 3, **options))
    critic = moved(R3GANCritic((3, 16, 16), 3, **options))
    critic(generator(draw(12, 5), labels), labels).square().sum().backward()
    for network in (generator, critic):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name


def dtypes_of_stages(network: nn.Module, *inputs: Tensor) -> list[torch.dtype]:
    """What the blocks of each stage return, in the order of the stages."""
    found: list[torch.dtype] = []
    hooks = [
        module.register_forward_hook(lambda *call: found.append(call[-1].dtype))
        for module in network.modules()
        if isinstance(module, ResidualBlock)
    ]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_the_chosen_stages_are_in_bfloat16_and_the_others_as_the_run_is() -> None:
    torch.manual_seed(0)
    options = {"widths": 8, "blocks": 1, "group_width": 4, "bfloat16_stages": 2}
    generator, critic = (
        R3GANGenerator(5, (3, 32, 32), **options),
        R3GANCritic((3, 32, 32), **options),
    )
    latents, images = torch.randn(2, 5), torch.randn(2, 3, 32, 32)
    wide, narrow = torch.float32, torch.bfloat16
    assert dtypes_of_stages(generator, latents) == [wide, wide, narrow, narrow]
    assert dtypes_of_stages(critic, images) == [narrow, narrow, wide, wide]
    assert generator(latents).dtype == critic(images).dtype == wide
    for with_critic in (generator, latents), (critic, images):
        with autocast(images.device, "bfloat16"):
            assert dtypes_of_stages(*with_critic) == [narrow] * 4
        network, inputs = with_critic
        assert dtypes_of_stages(network.double(), inputs.double()) == [torch.float64] * 4


def test_a_penalty_takes_the_chosen_stages_in_bfloat16_too_and_gives_gradients_in_float32() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    options = {"widths": 16, "blocks": 1, "group_width": 8}
    critic = moved(R3GANCritic((3, 32, 32), **options)).float()
    exact = input_gradients(critic, images, None)
    mixed = R3GANCritic((3, 32, 32), **options, bfloat16_stages=2)
    mixed.load_state_dict(critic.state_dict())
    gradients = input_gradients(mixed, images, None)
    assert gradients.dtype == torch.float32
    error = (gradients - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
    gradients.square().sum().backward()
    gradients = [p.grad for p in mixed.parameters() if p.ndim > 1]  # biases have none
    assert {None if gradient is None else gradient.dtype for gradient in gradients} == {
        torch.float32
    }


def test_the_fast_penalty_covers_the_whole_critic() -> None:
    """No convolution and no activation is left to autograd, which would send zeros back."""
    torch.manual_seed(0)
    critic = moved(R3GANCritic((3, 32, 32), 3, widths=[8, 8, 8, 4], group_width=4))
    images = draw(2, 3, 32, 32).requires_grad_()
    with FastDerivatives(order=2):
        logits = critic(images, torch.tensor([0, 2]))
    names, left = set(), [logits.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in names:
            names.add(node)
            left += [following for following, _ in node.next_functions]
    kinds = {type(node).__name__ for node in names}
    slow = {kind for kind in kinds if kind.startswith(("Convolution", "LeakyRelu", "AvgPool"))}
    assert slow == set()
    assert {"FastConvolutionBackward", "FastLeakyReLUBackward"} <= kinds


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((3, 52, 52), {}, "no layers for 52x52 images: resize them to 48x48 or 56x56"),
        ((3, 2048, 2048), {}, "resize them to 1024x1024"),
        ((3, 8, 8), {}, "resize them to 16x16 or 32x32"),
        ((2,), {}, "use mlp"),
        (
            (3, 64, 64),
            {"widths": [8, 8, 8, 8]},
            "widths of r3gan has 4 numbers, but 64x64 images need 5, one for each resolution from "
            "4x4 pixels up",
        ),
        ((3, 32, 32), {"widths": []}, "widths of r3gan has 0 numbers"),
        ((3, 32, 32), {"widths": [8, 8, 0, 8]}, "widths of r3gan must be a whole number above 0"),
        ((3, 32, 32), {"group_width": 0}, "group_width of r3gan must be a whole number above 0"),
        ((3, 32, 32), {"expansion": 0}, "expansion of r3gan must be a whole number above 0"),
        ((3, 32, 32), {"blocks": 0}, "blocks of r3gan must be a whole number above 0, not 0"),
        (
            (3, 32, 32),
            {"widths": [32, 16, 16, 12]},
            "group_width 16 of r3gan does not divide 24, which is the width 12 times the expansion",
        ),
        ((3, 32, 32), {"bfloat16_stages": 5}, "from 0 to 4, the number of stages, not 5"),
        ((3, 32, 32), {"bfloat16_stages": True}, "from 0 to 4, the number of stages, not True"),
        ((3, 32, 32), {"embedding_dim": 0}, "embedding_dim of r3gan must be a whole number"),
        ((3, 32, 32), {"width": 8}, "has no option 'width' .did you mean 'widths'"),
        ((3, 32, 32), {"num_classes": 3}, "num_classes of .* r3gan follows from the run"),
    ],
)
@pytest.mark.parametrize("role", ["generator", "critic"])
def test_a_mistake_gets_one_sentence(role: str, shape, options, sentence: str) -> None:
    facts = {"sample_shape": shape, "num_classes": 0}
    facts |= {"latent_dim": 8} if role == "generator" else {}
    with pytest.raises(UserError, match=sentence) as caught:
        build_network(role, "r3gan", options, **facts)
    assert "\n" not in str(caught.value)


def test_conditional_networks_ask_for_missing_labels() -> None:
    with pytest.raises(ValueError, match="needs the labels of its latents"):
        R3GANGenerator(8, (3, 16, 16), 2, widths=8)(torch.randn(2, 8))
    with pytest.raises(ValueError, match="needs the labels of its images"):
        R3GANCritic((3, 16, 16), 2, widths=8)(torch.randn(2, 3, 16, 16))
