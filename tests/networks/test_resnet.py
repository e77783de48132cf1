import math
from typing import TypeVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ganscale.errors import UserError
from ganscale.networks.build import parameter_count
from ganscale.networks.resnet import DownBlock, ResNetCritic, ResNetGenerator, UpBlock


@pytest.mark.parametrize("resolution", [16, 32, 64, 128])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_resolution_has_its_pair(resolution, num_classes):
    shape, labels = (3, resolution, resolution), torch.tensor([0, 2])
    images = ResNetGenerator(5, shape, num_classes, width=4, max_width=8)(torch.randn(2, 5), labels)
    assert images.shape == (2, *shape)
    assert images.abs().max() <= 1
    assert ResNetCritic(shape, num_classes, width=4, max_width=8)(images, labels).shape == (2,)


def test_the_cifar_pair_has_the_maps_of_the_papers_tables():
    maps = []

    def record(*call):
        maps.append(tuple(call[-1].shape[1:]))

    with torch.device("meta"):
        generator, critic = ResNetGenerator(128, (3, 32, 32)), ResNetCritic((3, 32, 32))
        for block in [*generator.blocks, generator.output, *critic.blocks]:
            block.register_forward_hook(record)
        critic(generator(torch.empty(2, 128)))
    up = [(128, 8, 8), (128, 16, 16), (128, 32, 32), (3, 32, 32)]
    down = [(128, 16, 16), (128, 8, 8), (128, 8, 8), (128, 8, 8), (128, 8, 8)]  # the last: ReLU
    assert maps == up + down


def test_the_papers_64_pixel_generator_follows_from_widths():
    generator = ResNetGenerator(128, (3, 64, 64), width=64, max_width=512)
    widths = [block.get_parameter("conv2.weight").shape[0] for block in generator.blocks]
    assert generator.input.weight.shape == (4 * 4 * 512, 128)
    assert widths == [512, 256, 128, 64]


def test_parameter_counts_of_the_cifar_pair_follow_from_the_papers_tables():
    conv3, conv1, norm = 128 * 128 * 9 + 128, 128 * 128 + 128, 2 * 128
    linear, image = 128 * 2048 + 2048, 128 * 3 * 9 + 3
    up = 2 * norm + 2 * conv3 + conv1 - 3 * 128  # less the biases that batch norm would subtract
    assert parameter_count(ResNetGenerator(128, (3, 32, 32))) == linear + 3 * up + norm + image
    first = (3 * 128 * 9 + 128) + conv3 + (3 * 128 + 128)
    critic = first + (2 * conv3 + conv1) + 2 * (2 * conv3) + (128 + 1)
    assert parameter_count(ResNetCritic((3, 32, 32))) == critic


Block = TypeVar("Block", UpBlock, DownBlock)


def _convolve(conv: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    return F.conv2d(images, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)


def _with_biases(block: Block) -> Block:
    """Biases start at zero, which would hide one in the wrong place."""
    for parameter in block.double().parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return block


def test_shortcuts_at_the_smaller_resolution_equal_those_of_the_papers_code():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    block = _with_biases(UpBlock(3, 5, "none", 0))
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    residual = _convolve(block.conv2, _convolve(block.conv1, large.relu()).relu())
    expected = _convolve(block.shortcut, large) + residual
    torch.testing.assert_close(block(images, None), expected, rtol=1e-12, atol=1e-12)

    block = _with_biases(DownBlock(3, 5))
    residual = _convolve(block.conv2, _convolve(block.conv1, images.relu()).relu())
    expected = F.avg_pool2d(_convolve(block.shortcut, images) + residual, 2)
    torch.testing.assert_close(block(images), expected, rtol=1e-12, atol=1e-12)

    block = _with_biases(DownBlock(3, 5, is_first=True))
    residual = F.avg_pool2d(_convolve(block.conv2, _convolve(block.conv1, images).relu()), 2)
    expected = _convolve(block.shortcut, F.avg_pool2d(images, 2)) + residual
    torch.testing.assert_close(block(images), expected, rtol=1e-12, atol=1e-12)


def test_weights_start_uniform_with_hes_and_glorots_variance():
    torch.manual_seed(0)
    pair = nn.ModuleList([ResNetGenerator(128, (3, 32, 32)), ResNetCritic((3, 32, 32))])
    for name, module in pair.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        followed_by_relu = name.endswith(("conv1", "conv2"))
        pixels = module.weight[0, 0].numel()
        outputs, inputs = module.weight.shape[:2]
        std = math.sqrt((4 if followed_by_relu else 2) / (pixels * (inputs + outputs)))
        assert module.weight.std().item() == pytest.approx(std, rel=0.12), name
        assert module.weight.abs().max().item() <= math.sqrt(3) * std * (1 + 1e-6), name
        assert module.bias is None or not module.bias.any()


def test_every_parameter_of_the_generator_gets_a_gradient():
    torch.manual_seed(0)
    for norm in ("batch", "none"):
        generator = ResNetGenerator(8, (3, 16, 16), width=4, norm=norm).double()
        generator(torch.randn(16, 8, dtype=torch.float64)).pow(3).sum().backward()
        for name, parameter in generator.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-6, f"{name} with norm {norm}"


def test_a_class_changes_the_generators_image_once_its_gains_differ():
    torch.manual_seed(0)
    generator = ResNetGenerator(8, (3, 16, 16), num_classes=2, width=8).eval()
    latents, first, second = torch.randn(4, 8), torch.zeros(4).long(), torch.ones(4).long()
    torch.testing.assert_close(generator(latents, first), generator(latents, second))
    with torch.no_grad():
        generator.blocks.get_parameter("0.norm1.gain.weight")[1] = 2.0
    assert (generator(latents, first) - generator(latents, second)).abs().max() > 1e-2


def test_the_conditional_logit_is_the_unconditional_one_plus_the_projection():
    torch.manual_seed(0)
    critic = ResNetCritic((3, 16, 16), num_classes=5, width=8).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([4, 0, 2, 2])
    phi = critic.blocks(images).sum(dim=(2, 3)) / 64
    weight, bias = critic.output.weight[0], critic.output.bias
    embedded = critic.get_parameter("embedding.weight")[labels]
    expected = torch.einsum("c,bc->b", weight, phi) + torch.einsum("bc,bc->b", embedded, phi) + bias
    torch.testing.assert_close(critic(images, labels), expected, rtol=1e-12, atol=1e-12)


def test_conditional_networks_ask_for_missing_labels():
    with pytest.raises(ValueError, match="needs the labels"):
        ResNetGenerator(8, (3, 16, 16), num_classes=2, width=4)(torch.randn(2, 8))
    with pytest.raises(ValueError, match="needs the labels"):
        ResNetCritic((3, 16, 16), num_classes=2, width=4)(torch.randn(2, 3, 16, 16))


def test_a_conditional_generator_without_norm_is_refused():
    with pytest.raises(UserError, match='set norm to "batch"'):
        ResNetGenerator(8, (3, 16, 16), num_classes=2, norm="none")


def test_spectral_norm_brings_every_weight_to_a_largest_singular_value_of_one():
    torch.manual_seed(0)
    critic = ResNetCritic((3, 16, 16), num_classes=4, width=8, spectral_norm=True)
    images, labels = torch.randn(1, 3, 16, 16), torch.tensor([1])
    with torch.no_grad():
        for _ in range(60):  # one power iteration each
            critic(images, labels)
    layers = [m for m in critic.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    assert len(layers) == 3 + 2 + 2 + 2  # three blocks, the score and the embedding
    for layer in layers:
        largest = torch.linalg.svdvals(layer.weight.flatten(1))[0]
        assert largest.item() == pytest.approx(1.0, abs=1e-3)
