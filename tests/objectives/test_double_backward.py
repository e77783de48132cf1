"""The fast double backward against autograd's, in float64, for all kinds of critics."""

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from benchmarks.tiny_networks import TinyCritic
from ganscale.networks.batch_groups import MinibatchStdDev
from ganscale.networks.dcgan import DCGANCritic
from ganscale.networks.fir_resampling import Blur, FIRDownsample, FIRUpsample
from ganscale.networks.mlp import MLPCritic
from ganscale.networks.resampling import PooledConv2d, UpsampledConv2d
from ganscale.networks.resnet import ResNetCritic
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.penalties import PENALTIES, input_gradients
from ganscale.runtime import has_slow_bfloat16
from tests.helpers.networks import draw, small_r3gan_critic
from tests.helpers.processes import run_python

BATCH, CLASSES, SHAPE = 5, 3, (3, 16, 16)


def autograd_input_gradients(critic: Callable, images: Tensor, labels: Tensor | None) -> Tensor:
    images = images.clone().requires_grad_()
    logits = critic(images, labels)
    scores = logits.flatten(1).sum(1) if logits.ndim > 1 else logits
    return torch.autograd.grad(scores.sum(), images, create_graph=True)[0]


def assert_matches_autograd(
    critic: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    takes_labels: bool = False,
    tolerance: float = 1e-14,
) -> None:
    """Every penalty's input gradients, value and weight gradients, to a few units in the last
    place."""

    def score(images: Tensor, labels: Tensor | None) -> Tensor:
        return critic(images, labels) if takes_labels else critic(images)

    parameters = [p for p in critic.parameters() if p.requires_grad]
    for name, make in PENALTIES.items():
        actual, expected = [], []
        pairs = (actual, input_gradients), (expected, autograd_input_gradients)
        for results, gradients_of in pairs:
            grads = gradients_of(score, images, labels)
            value, _ = make().value_and_norms(grads)
            gradients = torch.autograd.grad(
                value, parameters, allow_unused=True, materialize_grads=True
            )
            results += [grads.detach(), value.detach(), *gradients]
        scale = max(1.0, max(tensor.abs().max().item() for tensor in expected[2:]))
        assert any(tensor.abs().max() > 0 for tensor in expected[2:]) or expected[1] == 0
        for result, reference in zip(actual, expected, strict=True):
            assert (result - reference).abs().max().item() <= tolerance * scale, name


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLPCritic(SHAPE, width=16),
    "dcgan": lambda: DCGANCritic(SHAPE, width=4),
    "dcgan, no slope": lambda: DCGANCritic(SHAPE, width=4, negative_slope=0.0),
    "dcgan, layer norm": lambda: DCGANCritic(SHAPE, width=4, norm="layer"),
    "dcgan, instance norm": lambda: DCGANCritic(SHAPE, width=4, norm="instance"),
    "resnet": lambda: ResNetCritic(SHAPE, width=4),
    "resnet, spectral norm": lambda: ResNetCritic(SHAPE, width=4, spectral_norm=True),
    "resnet, classes": lambda: ResNetCritic(SHAPE, CLASSES, width=4, spectral_norm=True),
    "r3gan": lambda: small_r3gan_critic(SHAPE),
    "r3gan, classes": lambda: small_r3gan_critic(SHAPE, CLASSES),
    "patches": lambda: TinyCritic(SHAPE, patches=True),
    "bias last": lambda: TinyCritic(SHAPE, norm="layer", final_bias=True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CRITICS)
def test_penalties_of_every_critic_match_autograd(name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    critic = CRITICS[name]().double().to(memory_format=layout).eval()  # type: ignore[call-overload]
    if "dcgan" in name:
        for parameter in critic.parameters():  # N(0, 0.02) would make gradients vanish
            parameter.data *= 10
    images = (2 * draw(BATCH, *SHAPE)).to(memory_format=layout)
    assert_matches_autograd(critic, images, torch.tensor([0, 2, 1, 1, 0]), takes_labels=True)


# Each goes between a convolution of 3 to 4 channels and one of 4 to 2.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "leaky relu of a negative slope": lambda: nn.LeakyReLU(-0.2),
    "leaky relu of slope 0 before a layer in place": lambda: nn.Sequential(
        nn.LeakyReLU(0.0), nn.Hardtanh(-0.5, 0.5, inplace=True)
    ),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "prelu": nn.PReLU,
    "group norm and silu": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()),
    "batch norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    "average pool": lambda: nn.AvgPool2d(2),
    "average pool, overlapping": lambda: nn.AvgPool2d(
        3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "average pool, divided": lambda: nn.AvgPool2d((2, 3), (1, 2), (0, 1), divisor_override=5),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(5),
    "pooled": lambda: PooledConv2d(4, 4, 3),
    "pooled, frozen, no bias": lambda: PooledConv2d(4, 5, 5, bias=False).requires_grad_(False),
    "pooled, spectral norm": lambda: spectral_norm(PooledConv2d(4, 4, 1)).eval(),
    "upsampled": lambda: UpsampledConv2d(4, 5, 3),
    "upsampled, no bias": lambda: UpsampledConv2d(4, 4, 5, bias=False),
    "max pool": lambda: nn.MaxPool2d(2),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "doubling": FIRUpsample,
    "halving": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), FIRDownsample()),
    "blur": lambda: Blur(2),
    "convolution without bias": lambda: nn.Conv2d(4, 4, 3, bias=False),
    "strides": lambda: nn.Conv2d(4, 4, (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilation and groups": lambda: nn.Conv2d(4, 4, 3, dilation=2, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "same padding": lambda: nn.Conv2d(4, 4, 3, dilation=2, padding="same"),
    "reflection padding": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "circular padding": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 4, 3, 2, groups=2, dilation=2, bias=False),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(4, 4, 3)).eval(),
    "frozen": lambda: nn.Conv2d(4, 4, 3).requires_grad_(False),
    "minibatch deviation": lambda: MinibatchStdDev(BATCH),
    "minibatch deviations": lambda: MinibatchStdDev(1, features=4),
}


def around(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    after = [nn.LeakyReLU(0.1), nn.LazyConv2d(2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1)]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), layer, *after).double()
    network(torch.zeros(BATCH, 3, 11, 11).double())
    return network


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_penalties_through_every_layer_match_autograd(
    name: str, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    critic = around(LAYERS[name]()).to(memory_format=layout)  # type: ignore[call-overload]
    assert_matches_autograd(critic, draw(BATCH, 3, 11, 11).to(memory_format=layout))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_penalties_in_one_and_three_dimensions_match_autograd(dimensions: int) -> None:
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    transposed = {1: nn.ConvTranspose1d, 3: nn.ConvTranspose3d}[dimensions]
    critic = nn.Sequential(
        conv(2, 3, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        transposed(3, 2, 2, stride=2),
        nn.ReLU(),
        conv(2, 1, 3),
    )
    assert_matches_autograd(critic.double(), draw(BATCH, 2, *[7] * dimensions))


class Critic(nn.Module):
    """Layers for the forwards below, which are like those that users write."""

    def __init__(self, score: "Callable[[Critic, Tensor], Tensor]") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input, self.middle = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.output, self.maker = nn.Linear(4, 1), nn.Linear(3, 4 * 4 * 9)
        self.score = score
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.score(self, images).mean([2, 3])).squeeze(1)


def shared_weights(critic: Critic, images: Tensor) -> Tensor:
    features = critic.middle(critic.input(images).relu())
    return F.leaky_relu_(critic.middle(F.relu_(features)), 0.3)


def skip_of_a_map_changed_in_place(critic: Critic, images: Tensor) -> Tensor:
    features = critic.input(images)
    return features + critic.middle(F.relu(features, inplace=True))


def slice_changed_in_place(critic: Critic, images: Tensor) -> Tensor:
    features = critic.input(images)
    features[:, :2].relu_()
    return critic.middle(features)


def output_changed_in_place(critic: Critic, images: Tensor) -> Tensor:
    features = F.leaky_relu(critic.input(images), negative_slope=0.2)
    features *= 2**0.5
    features += 1
    return torch.relu(input=critic.middle(features))


def weights_computed_from_images(critic: Critic, images: Tensor) -> Tensor:
    weight = critic.maker(images.mean([0, 2, 3])).view(4, 4, 3, 3)
    return F.leaky_relu(F.conv2d(critic.input(images), weight, weight[0, :, 0, 0], padding=1))


def map_without_images(critic: Critic, images: Tensor) -> Tensor:
    learned = F.avg_pool2d(F.relu(critic.middle(critic.middle.weight)), 3)
    return critic.input(images) * learned


def checkpointed(critic: Critic, images: Tensor) -> Tensor:
    features = checkpoint(shared_weights, critic, images, use_reentrant=False)
    assert isinstance(features, Tensor)
    return checkpoint(
        lambda x: F.silu(critic.middle(F.avg_pool2d(x, 2))), features, use_reentrant=False
    )  # type: ignore[return-value]


def checkpointed_deviation(critic: Critic, images: Tensor) -> Tensor:
    features = checkpoint(MinibatchStdDev(2, 2), critic.input(images).relu(), use_reentrant=False)
    assert isinstance(features, Tensor)
    return F.leaky_relu(critic.middle(features[:, 2:]))


def one_image_at_a_time(critic: Critic, images: Tensor) -> Tensor:
    return torch.stack([F.relu(F.avg_pool2d(critic.input(image), 2)) for image in images])


def functional(critic: Critic, images: Tensor) -> Tensor:
    return torch.func.vjp(lambda x: F.relu(critic.input(x)), images)[0]


@pytest.mark.parametrize(
    "score",
    [
        shared_weights,
        skip_of_a_map_changed_in_place,
        slice_changed_in_place,
        output_changed_in_place,
        weights_computed_from_images,
        map_without_images,
        checkpointed,
        checkpointed_deviation,
        one_image_at_a_time,
        functional,
    ],
)
def test_penalties_of_users_forwards_match_autograd(score) -> None:
    assert_matches_autograd(Critic(score), draw(4, 3, 8, 8))


WEIGHT, TRANSPOSED = draw(2, 2, 3, 3, seed=1) / 3, draw(4, 1, 2, 2, seed=1)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "relu": (F.relu, []),
    "relu in place": (lambda x: torch.relu_(x * 2), []),
    "leaky relu": (partial(F.leaky_relu, negative_slope=0.2), []),
    "leaky relu in place": (lambda x: F.leaky_relu_(x * 2, 0.2), []),
    "average pool": (partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1), []),
    "convolution": (
        partial(F.conv2d, stride=2, padding=1, groups=2),
        [WEIGHT[:, :1], draw(2, seed=2)],
    ),
    "convolution without bias": (partial(F.conv2d, dilation=2), [WEIGHT]),
    "transposed": (
        partial(F.conv_transpose2d, stride=2, output_padding=1, groups=2),
        [TRANSPOSED[:2], draw(2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_match_finite_differences(name: str) -> None:
    function, weights = FUNCTIONS[name]
    arguments = [tensor.clone().requires_grad_() for tensor in (draw(2, 2, 5, 5), *weights)]

    def fast(*arguments: Tensor) -> Tensor:
        with FastDerivatives(order=2):
            return function(*arguments)

    assert gradcheck(fast, arguments)
    assert gradgradcheck(fast, arguments)


@pytest.mark.parametrize("name", ["nothing", "leaky relu", "average pool", "silu", "strides"])
def test_third_derivatives_match_autograd(name: str) -> None:
    torch.manual_seed(0)
    critic = around(LAYERS[name]())
    results = []
    for gradients_of in (input_gradients, autograd_input_gradients):
        grads = gradients_of(lambda x, _: critic(x), draw(BATCH, 3, 11, 11), None)
        parameters = list(critic.parameters())[:-1]
        gradients = torch.autograd.grad(
            grads.pow(4).sum(), parameters, create_graph=True, materialize_grads=True
        )
        total = torch.stack([gradient.pow(3).sum() for gradient in gradients]).sum()
        results.append(torch.autograd.grad(total, parameters, materialize_grads=True))
    assert max(tensor.abs().max() for tensor in results[1]) > 0
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_the_instance_norm_before_attention_has_the_gradient_of_its_formula() -> None:
    """Whose gradient has the batch and the channels side by side in memory."""
    images = draw(4, 3, 6, 6).requires_grad_()
    factors = draw(6, 6, 4, 3).permute(2, 3, 0, 1)

    def gradient(normalized: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(normalized, images, factors)
        return found

    centered = images - images.mean((2, 3), keepdim=True)
    variance = centered.square().mean((2, 3), keepdim=True)
    expected = gradient(centered / (variance + 1e-5).sqrt())
    with FastDerivatives():
        torch.testing.assert_close(gradient(F.instance_norm(images)), expected)


class _WithoutGradient(torch.autograd.Function):
    """The identity, with an undefined gradient in place of zeros, as autograd allows."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        return maps.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        return None


def test_an_instance_norm_takes_an_undefined_gradient() -> None:
    images = draw(4, 3, 6, 6).requires_grad_()
    with FastDerivatives():
        maps = _WithoutGradient.apply(F.instance_norm(images))
    (gradient,) = torch.autograd.grad((maps + images).sum(), images)
    torch.testing.assert_close(gradient, torch.ones_like(images))


def test_a_group_norm_of_images_in_channels_last_does_not_crash() -> None:
    images = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    norms = [nn.GroupNorm(2, 2).double() for _ in range(2)]
    norms[0](images).square().sum().backward()
    channels_last = images.to(memory_format=torch.channels_last)
    with FastDerivatives():
        norms[1](channels_last).square().sum().backward()
        torch.testing.assert_close(norms[1].weight.grad, norms[0].weight.grad)
        with pytest.raises(RuntimeError, match="memory_format=contiguous"):
            checkpoint(norms[1], channels_last, use_reentrant=False)
        checkpoint(norms[1], images, use_reentrant=False)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_instance_norm_of_a_single_image_has_the_gradient_it_has_in_a_batch(
    layout: torch.memory_format, order: int
) -> None:
    """torch's own is wrong by more than its size where the gradient is in channels last."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ELU(inplace=True))
    network = nn.Sequential(*layers, UpsampledConv2d(4, 2, 1), nn.InstanceNorm2d(2), nn.Tanh())
    network.double().to(memory_format=layout)  # type: ignore[call-overload]
    weights = draw(2, 2, 12, 12, seed=1)

    def gradients(rows: slice, context: Any) -> list[Tensor]:
        images = draw(2, 3, 8, 8)[rows].to(memory_format=layout).requires_grad_()
        with context:
            scores = network(images) * weights[rows]
        (slopes,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        loss = slopes.square().sum() if order == 2 else scores.sum()
        return [*torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)]

    whole = gradients(slice(2), nullcontext())
    alone = [gradients(slice(k, k + 1), FastDerivatives(order)) for k in range(2)]
    for expected, *parts in zip(whole, *alone, strict=True):
        torch.testing.assert_close(sum(parts), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_penalties_of_attention_match_finite_differences(layer: Any) -> None:
    """torch's fused kernels have no second derivatives."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dim_feedforward": 6} if layer is nn.TransformerEncoderLayer else {}
    attention = layer(4, 2, dropout=0.0, batch_first=True, **options).double()
    is_layer = bool(options)

    def critic(images: Tensor, _: Tensor | None) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        mixed = attention(tokens) if is_layer else attention(*[tokens] * 3, need_weights=False)[0]
        return mixed.tanh().sum((1, 2))

    images = draw(2, 4, 2, 3)

    def penalty() -> Tensor:
        return input_gradients(critic, images, None).square().sum()

    parameter = attention.get_parameter(f"{'self_attn.' if is_layer else ''}in_proj_weight")
    nn.init.normal_(parameter)
    (slopes,) = torch.autograd.grad(penalty(), parameter)
    direction, step = draw(*parameter.shape, seed=3), 1e-6
    values = []
    for sign in (1, -1):
        parameter.data += sign * step * direction
        values.append(penalty().item())
        parameter.data -= sign * step * direction
    expected = (values[0] - values[1]) / (2 * step)
    assert (slopes * direction).sum().item() == pytest.approx(expected, rel=1e-6)


class OperationCounter(TorchDispatchMode):
    """Counts the multiplications of convolutions, also those with zeros."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](
                *args, **(kwargs or {}), out_val=output
            )
        return output


def test_a_penalty_costs_four_forwards_where_autograd_takes_more_than_five() -> None:
    # With few channels, the image gradient would be a padded sub-pixel convolution.
    shape = (5, *SHAPE[1:])
    critic, images = DCGANCritic(shape, width=8), torch.zeros(BATCH, *shape)

    def penalty(gradients_of: Callable[..., Tensor]) -> None:
        grads = gradients_of(lambda x, _: critic(x), images, None)
        grads.square().sum().backward(inputs=list(critic.parameters()))

    with OperationCounter() as forward:
        critic(images)
    with OperationCounter() as fast:
        penalty(input_gradients)
    with OperationCounter() as autograds:
        penalty(autograd_input_gradients)
    # Nearly four: there is no double backward to the logits through the last layer.
    assert 3.9 * forward.count < fast.count <= 4 * forward.count
    assert autograds.count > 5.25 * forward.count  # six, except for the first and the last layer


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layer", [PooledConv2d(16, 16, 3), UpsampledConv2d(16, 16, 3)])
def test_resampling_convolutions_cost_four_ninths(layer: nn.Module, order: int) -> None:
    counted = []
    for context in (FastDerivatives(order), torch.enable_grad()):
        images = torch.zeros(2, 16, 8, 8, requires_grad=True)
        with OperationCounter() as operations, context:
            layer(images).sum().backward()
        counted.append(operations.count)
    assert 9 * counted[0] == 4 * counted[1] > 0


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("kind", [PooledConv2d, UpsampledConv2d])
def test_resampling_convolutions_return_the_layout_of_their_definition(
    kind: type[PooledConv2d], kernel_size: int
) -> None:
    """A network may ask for a view of the result."""
    formats = torch.contiguous_format, torch.channels_last
    for weights_format, images_format in itertools.product(formats, formats):
        layer = kind(4, 6, kernel_size).to(memory_format=weights_format)  # type: ignore[call-overload]
        images = draw(2, 4, 8, 8).float().contiguous(memory_format=images_format)
        with FastDerivatives():
            merged = layer(images)
        assert merged.stride() == layer(images).stride()


@pytest.mark.skipif(
    has_slow_bfloat16(torch.device("cpu")),
    reason="transposed convolutions add up in bfloat16 where torch computes it in software",
)
@pytest.mark.parametrize("kind", [PooledConv2d, UpsampledConv2d])
def test_resampling_convolutions_err_no_more_in_bfloat16(kind: type[PooledConv2d]) -> None:
    torch.manual_seed(0)
    exact = kind(64, 64, 3).double()
    layer, images = copy.deepcopy(exact).float(), draw(8, 64, 16, 16)

    def derivatives(layer: nn.Module, images: Tensor) -> list[Tensor]:
        leaf = images.clone().requires_grad_()
        output = layer(leaf)
        weights = list(layer.parameters())
        gradients = torch.autograd.grad(output.double().square().sum(), [leaf, *weights])
        return [output.double(), *(gradient.double() for gradient in gradients)]

    expected = derivatives(exact, images)
    errors = []
    for context in (FastDerivatives(), torch.enable_grad()):
        with torch.autocast("cpu", torch.bfloat16), context:
            actual = derivatives(layer, images.float())
        errors.append([(a - b).norm() / b.norm() for a, b in zip(actual, expected, strict=True)])
    assert all(fast <= 1.1 * plain for fast, plain in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 5, 3, stride=2)])
def test_autocast_casts_convolutions_as_without_the_context(layer: nn.Module) -> None:
    images, results = draw(4, 3, 9, 9).float(), []
    for context in (partial(FastDerivatives, order=2), torch.enable_grad):
        leaf = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), context():
            output = F.leaky_relu(layer(F.avg_pool2d(leaf, 2)), 0.2)
            (grads,) = torch.autograd.grad(output.float().sum(), leaf, create_graph=True)
        (weight,) = torch.autograd.grad(grads.square().sum(), layer.weight)  # type: ignore[arg-type]
        assert (output.dtype, grads.dtype, weight.dtype) == (torch.bfloat16, *[torch.float32] * 2)
        results.append((output, grads, weight))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*[each[1:] for each in results], rtol=0.02, atol=0.02)


def test_what_needs_no_second_derivative_is_left_to_autograd() -> None:
    layer, images = nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 5, 5)
    with FastDerivatives(order=2):
        assert type(layer(images).grad_fn).__name__ == "ConvolutionBackward0"
        with torch.no_grad():
            assert not layer(images.clone().requires_grad_()).requires_grad
        assert "FastConvolution" in type(layer(images.clone().requires_grad_()).grad_fn).__name__
    assert type(layer(images.requires_grad_()).grad_fn).__name__ == "ConvolutionBackward0"


def test_changing_a_leaf_in_place_still_raises() -> None:
    with FastDerivatives(order=2), pytest.raises(RuntimeError, match="in-place"):
        F.relu_(torch.zeros(3, requires_grad=True))


class Checkpointed(nn.Module):
    """A block with activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(3, 6, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 5, 8)
        )

    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(self.block, images, use_reentrant=False)  # type: ignore[return-value]


def test_checkpointed_blocks_are_left_to_torch() -> None:
    torch.manual_seed(0)
    critic, images = Checkpointed().double(), draw(2, 3, 16, 16)
    for order in (1, 2):
        results = []
        for context in (FastDerivatives(order), torch.enable_grad()):
            leaf = images.clone().requires_grad_()
            with context:
                value = critic(leaf).tanh().sum()
            if order == 2:
                (grads,) = torch.autograd.grad(value, leaf, create_graph=True)
                value = grads.square().sum()
            results.append(torch.autograd.grad(value, next(critic.parameters()))[0])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_compiled_blocks_are_left_to_torch() -> None:
    """In another process: the type checks of tests keep torch from tracing."""
    options = ("-W", "error::UserWarning", "-m", "tests.objectives.compiled_block")
    assert float(run_python(*options).stdout) < 1e-12
