"""StyleGAN2's layers against the paper's equations written out, and its networks against a plain
implementation, in float64."""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from benchmarks.rivals.stylegan2 import PlainCritic, PlainGenerator
from ganscale.errors import UserError
from ganscale.networks.build import build_network, parameter_count
from ganscale.networks.stylegan2.critic import StyleGAN2Critic
from ganscale.networks.stylegan2.generator import StyleGAN2Generator
from ganscale.networks.stylegan2.modulation import LayerSettings, StyledConv2d, ToRGB
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.penalties import input_gradients
from ganscale.random import drawing, normal_like, uniform_like
from ganscale.runtime import autocast
from tests.helpers.networks import draw, without_zeros

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
LATENTS, STYLE, CLASSES = 5, 6, 3
LABELS = torch.tensor([0, 2, 1, 1])


@pytest.fixture(autouse=True)
def forwards_may_draw() -> Iterator[None]:
    torch.manual_seed(0)
    with drawing(0, ("test",), torch.arange(4)):
        yield


def again() -> AbstractContextManager[None]:
    """For another forward with the same numbers."""
    return drawing(0, ("test",), torch.arange(4))


def generator_of(architecture: str, shape: tuple[int, int, int] = (3, 16, 32)) -> nn.Module:
    """In float64, with no layer hidden behind zeros."""
    options: dict[str, Any] = {"widths": [8, 6, 4], "style_dim": STYLE, "mapping_layers": 3}
    network = StyleGAN2Generator(LATENTS, shape, CLASSES, architecture=architecture, **options)
    return without_zeros(network.double())


def critic_of(architecture: str, group_size: int = 2) -> nn.Module:
    network = StyleGAN2Critic(
        (3, 16, 32), CLASSES, widths=[8, 6, 4], architecture=architecture, group_size=group_size
    )
    return without_zeros(network.double())


def plain(network: nn.Module) -> nn.Module:
    """The same function by other means, with the same draws and a copy of the parameters."""
    network = copy.deepcopy(network)
    if isinstance(network, StyleGAN2Critic):
        return PlainCritic(network)
    assert isinstance(network, StyleGAN2Generator)
    other = PlainGenerator(network)
    other.normal, other.uniform = normal_like, uniform_like
    return other


def upsampled(maps: Tensor) -> Tensor:
    """Zeros between the pixels, the filter, and one more pixel at each side, which a 3x3
    convolution takes away again."""
    spread = maps.new_zeros(*maps.shape[:2], 2 * maps.shape[2], 2 * maps.shape[3])
    spread[:, :, ::2, ::2] = maps
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 8
    kernel = (4 * torch.outer(line, line)).expand(maps.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(spread, (3, 2, 3, 2)), kernel, groups=maps.shape[1])


@pytest.mark.parametrize("is_upsampling", [False, True])
def test_a_styled_convolution_is_the_papers_equations(is_upsampling: bool) -> None:
    """Equations 1 and 3 with the weights of each image, and the derivatives of all parameters."""
    settings = LayerSettings(STYLE, (8, 8) if is_upsampling else (4, 4), "random")
    layer = StyledConv2d(3, 2, settings, gain=1.7, is_upsampling=is_upsampling).double()
    without_zeros(layer)
    nn.init.constant_(layer.noise_strength, 0.3)
    maps, style = draw(4, 3, 4, 4).requires_grad_(), draw(4, STYLE, seed=1).requires_grad_()
    output = layer(maps, layer.scales(style))

    with again():
        noise = normal_like(torch.zeros(4, 1, *settings.size).double(), layer._noise_name)
    expected = []
    for image in range(4):
        scales = layer.affine.weight @ style[image] / math.sqrt(STYLE) + layer.affine.bias
        weight = layer.weight
        if is_upsampling:  # a transposed convolution is one with the reversed kernel
            weight = weight.transpose(0, 1).flip(2, 3)
        modulated = torch.einsum("i,oikl->oikl", scales, weight)
        norm = (modulated.square().sum((1, 2, 3)) + 1e-8).sqrt()
        own = 1.7 * maps[image : image + 1]
        own = upsampled(own) if is_upsampling else F.pad(own, (1, 1, 1, 1))
        own = F.conv2d(own, modulated / norm[:, None, None, None])
        own = own + layer.noise_strength * noise[image] + layer.bias[:, None, None]
        expected.append(F.leaky_relu(own, 0.2))
    reference = torch.cat(expected)
    torch.testing.assert_close(output, reference, **EXACT)
    inputs = [maps, style, *layer.parameters()]
    weights = draw(*output.shape, seed=2)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (output, reference))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_layer_scales_its_weights_without_normalizing_them(layout) -> None:
    layer = ToRGB(3, 2, STYLE, gain=1.7).double()
    without_zeros(layer)
    maps, style = draw(4, 3, 4, 6).contiguous(memory_format=layout), draw(4, STYLE, seed=1)
    images = layer(maps, layer.weights(style))
    assert images.is_contiguous(memory_format=layout)
    scales = style @ layer.affine.weight.T / math.sqrt(STYLE) + layer.affine.bias
    expected = 1.7 / math.sqrt(3) * torch.einsum("oi,bi,bihw->bohw", layer.weight, scales, maps)
    torch.testing.assert_close(images, expected + layer.bias[:, None, None], **EXACT)


@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_the_generator_and_all_its_gradients_are_those_of_the_plain_one(architecture) -> None:
    """The squares of path lengths, too: a gradient for the styles, differentiated again."""
    ours = generator_of(architecture)
    latents, weights = draw(4, LATENTS), draw(4, 3, 16, 32, seed=1)
    results = []
    for network in (ours, plain(ours)):
        with again():
            images = network(latents, LABELS)
        with again(), FastDerivatives(order=2):
            styles = network.styles(latents, LABELS)  # type: ignore[operator]
            others = network.synthesis(styles)  # type: ignore[operator]
        (path,) = torch.autograd.grad((others * weights).sum(), styles, create_graph=True)
        parameters = list(network.parameters())
        first = torch.autograd.grad((images * weights).sum(), parameters, retain_graph=True)
        second = torch.autograd.grad(path.square().sum(), parameters, materialize_grads=True)
        results.append([images, others, path, *first, *second])
    for own, expected in zip(*results, strict=True):
        scale = expected.detach().abs().max().clamp_min(1.0)
        torch.testing.assert_close(own / scale, expected / scale, **EXACT)


@pytest.mark.parametrize("architecture", ["skip", "resnet"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_the_critic_and_its_penalty_are_those_of_the_plain_one(architecture, group_size) -> None:
    ours = critic_of(architecture, group_size)
    images = draw(4, 3, 16, 32)
    results = []
    for network in (ours, plain(ours)):
        parameters = list(network.parameters())
        logits = network(images, LABELS)
        first = torch.autograd.grad(logits.square().sum(), parameters)
        if network is ours:
            gradients = input_gradients(network, images, LABELS)
        else:
            leaf = images.clone().requires_grad_()
            logits = network(leaf, LABELS)
            (gradients,) = torch.autograd.grad(logits.sum(), leaf, create_graph=True)
        second = torch.autograd.grad(
            gradients.square().sum(), parameters, allow_unused=True, materialize_grads=True
        )
        results.append([logits, gradients, *first, *second])
    for own, expected in zip(*results, strict=True):
        scale = expected.detach().abs().max().clamp_min(1.0)
        torch.testing.assert_close(own / scale, expected / scale, **EXACT)


def test_the_critics_derivatives_match_finite_differences() -> None:
    critic = critic_of("resnet")
    images = draw(4, 3, 16, 32).requires_grad_()
    weight = next(critic.parameters())

    def logits(images: Tensor, _: Tensor) -> Tensor:
        with FastDerivatives(order=2):
            return critic(images, LABELS).tanh()

    assert gradcheck(logits, (images, weight), fast_mode=True)
    assert gradgradcheck(logits, (images, weight), fast_mode=True)


def test_the_fast_penalty_covers_the_whole_critic() -> None:
    """No convolution and no activation is left to autograd, which would send zeros back."""
    images = draw(4, 3, 16, 32).requires_grad_()
    with FastDerivatives(order=2):
        logits = critic_of("resnet")(images, LABELS)
    nodes, left = set(), [logits.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            left += [following for following, _ in node.next_functions]
    kinds = {type(node).__name__ for node in nodes}
    # The mapping of the class does not depend on the images.
    slow = {kind for kind in kinds if kind.startswith(("Convolution", "AvgPool"))}
    assert slow == set()
    assert {"FastConvolutionBackward", "FastLeakyReLUBackward", "_LinearMapBackward"} <= kinds


@pytest.mark.parametrize(
    ("resolution", "channel_base", "generator_parameters", "critic_parameters"),
    [(256, 16384, 24_767_458, 24_001_089), (1024, 32768, 30_370_060, 29_012_513)],
)
def test_the_networks_have_as_many_parameters_as_published(
    resolution: int, channel_base: int, generator_parameters: int, critic_parameters: int
) -> None:
    """The totals that stylegan2-ada-pytorch prints. At 1024 pixels it is the paper's config F, of
    which table 1 of the paper gives 30.0 million for the generator. Here, they are also counted by
    hand."""
    shape = (3, resolution, resolution)
    with torch.device("meta"):
        generator = StyleGAN2Generator(512, shape, channel_base=channel_base)
        critic = StyleGAN2Critic(shape, channel_base=channel_base)
    widths = [min(channel_base // (4 << i), 512) for i in range(resolution.bit_length() - 2)]
    mapping = 8 * (512 * 512 + 512)
    counted_generator = mapping + 16 * 512  # and the constant
    counted_critic = 3 * widths[-1] + widths[-1]
    for stage, width in enumerate(widths):
        inputs = [widths[stage - 1], width] if stage > 0 else [width]
        for each in inputs:  # affine, convolution, bias, noise strength
            counted_generator += 512 * each + each + 9 * each * width + width + 1
        counted_generator += 512 * width + width + 3 * width + 3  # to RGB
        if stage > 0:
            below = widths[stage - 1]
            counted_critic += 9 * width * width + width + 9 * width * below + below + width * below
    counted_critic += 9 * 513 * 512 + 512 + 512 * 16 * 512 + 512 + 512 + 1
    assert parameter_count(generator.mapping) == mapping
    assert parameter_count(generator) == counted_generator == generator_parameters
    assert parameter_count(critic) == counted_critic == critic_parameters


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 32), (3, 1024, 1024)])
def test_every_size_has_its_pair(shape: tuple[int, int, int]) -> None:
    generator = StyleGAN2Generator(LATENTS, shape, widths=2, style_dim=4)
    critic = StyleGAN2Critic(shape, widths=2)
    images = generator(torch.randn(4, LATENTS))
    assert images.shape == (4, *shape)
    assert critic(images).shape == (4,)


def test_images_start_near_unit_variance() -> None:
    """Equalized and demodulated layers keep it; the image is a sum over all resolutions."""
    generator = StyleGAN2Generator(64, (3, 64, 64), widths=64)
    images = generator(torch.randn(4, 64))
    assert 0.3 < images.std() < 3


def test_styles_are_mixed_at_a_random_layer_for_nine_images_in_ten() -> None:
    count, images = 8, 2000
    network = StyleGAN2Generator(LATENTS, (3, 32, 32), widths=2, style_dim=4, mapping_layers=1)
    assert network.style_count == count
    with drawing(0, ("mixing",), torch.arange(images)), torch.no_grad():
        styles = network.styles(torch.randn(images, LATENTS))
    is_own = (styles == styles[:, :1]).all(2)
    crossovers = is_own.sum(1)
    assert (is_own == (torch.arange(count) < crossovers[:, None])).all()
    shares = torch.bincount(crossovers, minlength=count + 1) / images
    assert shares[0] == 0
    assert shares[count].item() == pytest.approx(0.1, abs=0.03)
    torch.testing.assert_close(
        shares[1:count], torch.full((count - 1,), 0.9 / (count - 1)), rtol=0, atol=0.03
    )


def test_neither_evaluation_nor_a_share_of_zero_mixes_styles() -> None:
    network = StyleGAN2Generator(LATENTS, (3, 16, 16), widths=2, style_dim=4, mapping_layers=1)
    latents = torch.randn(4, LATENTS)
    expected = network.mapping(latents, None)[:, None].expand(-1, 6, -1)
    assert torch.equal(network.eval().styles(latents), expected)
    network.train().style_mixing = 0.0
    assert torch.equal(network.styles(latents), expected)


@pytest.mark.parametrize("noise", ["random", "fixed", "off"])
def test_noise_of_an_evaluation_is_as_chosen(noise: str) -> None:
    network = StyleGAN2Generator(
        LATENTS, (3, 16, 16), widths=4, style_dim=4, evaluation_noise=noise, style_mixing=0
    )
    for name, parameter in network.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.ones_(parameter)
    assert not list(network.state_dict().keys() - dict(network.named_parameters()).keys())
    latents = torch.randn(1, LATENTS).expand(4, -1)
    with again():
        trained = network(latents)
    assert not torch.allclose(trained[0], trained[1])  # in training, always random
    network.eval()
    with again():
        images = network(latents)
    assert torch.equal(images, trained) == (noise == "random")
    assert torch.allclose(images[0], images[1], atol=1e-5) == (noise != "random")
    if noise != "random":
        with drawing(0, (), None):  # draws would be refused
            assert torch.equal(network(latents), images)
    for name, parameter in network.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.zeros_(parameter)
    with again():
        assert torch.equal(network(latents), images) == (noise == "off")


@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_every_parameter_gets_a_gradient(architecture: str) -> None:
    generator, critic = generator_of(architecture), critic_of(architecture)
    critic(generator(draw(4, LATENTS), LABELS), LABELS).square().sum().backward()
    for network in (generator, critic):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_mapping_learns_at_a_hundredth_of_the_rate() -> None:
    """A step of Adam moves every weight by the rate; the layer's output moves by 1/100 of that."""
    mapping = StyleGAN2Generator(LATENTS, (3, 16, 16), widths=2, style_dim=4).mapping
    layer = mapping.layers[0]
    inputs = torch.ones(1, LATENTS)
    before = layer(inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    moved = math.sqrt(2) * 0.01 * (LATENTS / math.sqrt(LATENTS) + 1)
    torch.testing.assert_close(layer(inputs) - before, torch.full((1, 4), moved))


def test_the_chosen_stages_are_in_bfloat16_and_styles_never() -> None:
    options: dict[str, Any] = {"widths": 8, "bfloat16_stages": 1}
    generator = StyleGAN2Generator(LATENTS, (3, 16, 16), style_dim=8, **options)
    critic = StyleGAN2Critic((3, 16, 16), **options)
    found: list[torch.dtype] = []
    for module in [*generator.modules(), *critic.modules()]:
        if isinstance(module, StyledConv2d) or type(module).__name__ == "EqualizedConv2d":
            module.register_forward_hook(lambda *call: found.append(call[-1].dtype))
    latents, images = torch.randn(4, LATENTS), torch.randn(4, 3, 16, 16)
    wide, narrow = torch.float32, torch.bfloat16
    assert generator(latents).dtype == wide
    assert found == [wide] * 3 + [narrow] * 2
    found.clear()
    assert critic(images).dtype == wide
    assert found == [narrow] * 4 + [wide] * 4
    found.clear()
    with again(), autocast(images.device, "bfloat16"):
        assert generator.styles(latents).dtype == wide
    generator.double()
    with again():
        generator(latents.double())
    assert set(found) == {torch.float64}


def test_a_penalty_takes_the_chosen_stages_in_bfloat16_and_gives_gradients_in_float32() -> None:
    images = torch.randn(4, 3, 16, 16)
    options: dict[str, Any] = {"widths": 16, "group_size": 1}
    critic = without_zeros(StyleGAN2Critic((3, 16, 16), **options))
    exact = input_gradients(critic, images, None)
    mixed = StyleGAN2Critic((3, 16, 16), **options, bfloat16_stages=2)
    mixed.load_state_dict(critic.state_dict())
    gradients = input_gradients(mixed, images, None)
    assert gradients.dtype == torch.float32
    error = (gradients - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("role", "options", "sentence"),
    [
        ("generator", {"architecture": "orig"}, '"skip" or "resnet", not \'orig\''),
        ("generator", {"evaluation_noise": "const"}, '"random", "fixed" or "off", not \'const\''),
        ("generator", {"style_mixing": 2}, "style_mixing of stylegan2 must be a number from 0 to"),
        ("generator", {"style_mixing": True}, "must be a number from 0 to 1, not True"),
        (
            "generator",
            {"widths": 8, "channel_max": 4},
            "either widths or channel_base and channel_",
        ),
        ("critic", {"widths": 8, "channel_base": 64}, "either widths or channel_base and channel_"),
        ("generator", {"style_dim": 0}, "style_dim of stylegan2 must be a whole number above 0"),
        ("critic", {"group_size": 0}, "group_size of stylegan2 must be a whole number above 0"),
        ("critic", {"mapping_layers": 0}, "mapping_layers of stylegan2 must be a whole number"),
        ("critic", {"channel_max": 0}, "channel_max of stylegan2 must be a whole number above 0"),
        ("generator", {"bfloat16_stages": 9}, "whole number from 0 to 4, the number of stages"),
        ("critic", {"widths": [8]}, "widths of stylegan2 has 1 numbers, but 32x32 images need 4"),
        ("generator", {"noise": "off"}, "has no option 'noise'"),
    ],
)
def test_a_mistake_gets_one_sentence(role: str, options, sentence: str) -> None:
    facts = {"sample_shape": (3, 32, 32), "num_classes": 0}
    facts |= {"latent_dim": 8} if role == "generator" else {}
    with pytest.raises(UserError, match=sentence) as caught:
        build_network(role, "stylegan2", options, **facts)
    assert "\n" not in str(caught.value)


def test_conditional_networks_ask_for_missing_labels() -> None:
    with pytest.raises(ValueError, match="needs the labels of its latents"):
        generator_of("skip")(draw(4, LATENTS))
    with pytest.raises(ValueError, match="needs the labels of its images"):
        critic_of("resnet")(draw(4, 3, 16, 32))
