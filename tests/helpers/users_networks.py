"""Networks as users write them, most of which a run must refuse."""

import os
import random
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ganscale.networks.batch_groups import MinibatchStdDev
from ganscale.networks.random_layers import Dropout
from ganscale.random import bernoulli_like, normal_like, uniform_like

_NUMPY_GENERATOR = np.random.default_rng(0)
_CONSTRUCTED = count()
_RANK = int(os.environ.get("RANK", "0"))

CLUSTER_CRITICS: dict[str, str] = {}  # by name: the words of the refusal
WORKING_CRITICS: list[str] = []
FAILING_CRITICS: dict[str, str] = {}
BACKBONE = nn.Conv2d(8, 8, 1).requires_grad_(False)  # as if it were pretrained

_FEATURES: dict[str, Callable[["Critic", Tensor], Tensor]] = {}
_GROUP_SIZES: dict[str, Any] = {"pairs": 2, "strided_pairs": 2}


def refused(words: str, kinds: dict[str, str] = CLUSTER_CRITICS) -> Callable:
    def register(features):
        kinds[features.__name__] = words
        _FEATURES[features.__name__] = features
        return features

    return register


def works(features):
    WORKING_CRITICS.append(features.__name__)
    _FEATURES[features.__name__] = features
    return features


def in_groups(size: object) -> Callable:
    """For features that look at groups of images, as the critic then declares."""

    def register(features):
        _GROUP_SIZES[features.__name__] = size
        return features

    return register


class Generator(nn.Module):
    def __init__(self, latent_dim: int, sample_shape: tuple[int, ...], features: str = "") -> None:
        super().__init__()
        self.sample_shape, self.features = sample_shape, features
        self.layer = nn.Linear(latent_dim, int(np.prod(sample_shape)))
        self.norm = nn.BatchNorm1d(self.layer.out_features) if features == "norm" else None
        if features in _GROUP_SIZES:
            self.batch_group_size = _GROUP_SIZES[features]

    def forward(self, latents: Tensor) -> Tensor:
        values = self.layer(latents)
        if self.norm is not None:
            values = self.norm(values)
        if self.features == "mixed":
            values = values - values.mean(0)
        if self.features == "pairs":
            values = values - within_groups(values, 2).mean(1, keepdim=True).repeat(
                1, 2, 1
            ).view_as(values)
        if self.features == "strided_pairs":
            values = values - values.view(2, -1, values.shape[1]).mean(0).repeat(2, 1)
        if self.features == "functional_norm":
            values = F.batch_norm(values, None, None, training=True)
        if self.features == "shifted":  # the kind of change that fits all checkpoints
            values = values.roll(1, dims=1)
        return torch.tanh(values).view(-1, *self.sample_shape)


class Critic(nn.Module):
    def __init__(self, sample_shape: tuple[int, ...], features: str = "") -> None:
        super().__init__()
        self.features = features
        channels, height, width = sample_shape
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 4, 2, 1)
        self.last = nn.Linear(8 * height * width // 4, 1)
        self.gate = nn.Parameter(torch.zeros(()))
        self.norm = nn.InstanceNorm2d(8, track_running_stats=features == "running_statistics")
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.vector: Tensor
        self.calls, self.counters = 0, {"calls": 0}
        if features in _GROUP_SIZES:
            self.batch_group_size = _GROUP_SIZES[features]
        self.frozen, self.dropout = nn.Identity().eval(), Dropout(0.3)
        self.backbone = BACKBONE if features == "shared_backbone" else None
        if features == "weights_outside_the_state":
            noise = torch.from_numpy(_NUMPY_GENERATOR.normal(size=8))
            self.register_buffer("noise", noise, persistent=False)
        if features == "gradient_hook":
            self.matrix.register_hook(lambda gradient: gradient / gradient.norm())
        self.generator = np.random.RandomState(0)
        self.register_buffer("vector", torch.ones(8))
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention = attention if features == "attention" else None
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.transformer = layer if features == "transformer" else None
        with torch.no_grad():
            if features == "numpy_weights":
                self.matrix.copy_(torch.from_numpy(np.random.normal(size=(8, 8))))  # noqa: NPY002
            if features == "uncontrolled_weights":
                self.matrix.copy_(torch.from_numpy(_NUMPY_GENERATOR.normal(size=(8, 8))))
            if features == "counting_constructor":
                self.matrix.mul_(next(_CONSTRUCTED))

    def forward(self, images: Tensor) -> Tensor:
        maps = F.leaky_relu(self.first(images), 0.2)
        if self.features in _FEATURES:
            maps = _FEATURES[self.features](self, maps)
        mixed = torch.einsum("oc,nchw->nohw", self.matrix, maps) + self.gate
        return self.last(self.second(mixed).flatten(1)).squeeze(1)


class CriticOfTheRank(Critic):
    """As if a machine had an older version of the code."""

    def forward(self, images: Tensor) -> Tensor:
        return (1 + 0.01 * _RANK) * super().forward(images)


class FailingCritic(Critic):
    """Takes the options of any network."""

    def __init__(self, sample_shape: tuple[int, ...], **_: object) -> None:
        super().__init__(sample_shape, "exception")


MIXES = "depends on the other images of its batch .*MinibatchStdDev.*`batch_group_size`"
MIXES_GROUPS = "depends on more than its group, which is a run of . consecutive images"


@refused(MIXES)
def minibatch_deviation(_, maps):
    return maps + maps.std(0, unbiased=False).mean()


@refused(MIXES)
def minibatch_deviation_behind_a_zero(critic, maps):
    return maps + critic.gate * maps.std(0, unbiased=False).mean()


@refused(MIXES)
def faint_minibatch_deviation(_, maps):
    return maps + 1e-6 * maps.std(0, unbiased=False).mean()


@refused(MIXES)
def functional_batch_norm(_, maps):
    return F.batch_norm(maps, None, None, training=True)


@refused(MIXES)
def detached_mean(_, maps):
    return maps - maps.detach().mean((0, 2, 3), keepdim=True)


@refused(MIXES)
def size_of_the_batch(_, maps):
    return maps * len(maps) / 4


@refused(MIXES)
def place_in_the_batch(_, maps):
    return maps + torch.arange(len(maps)).view(-1, 1, 1, 1).to(maps)


@refused(MIXES)
def neighbour_in_the_batch(_, maps):
    return maps + maps.roll(1, dims=0)


@refused(MIXES)
def rank_in_the_batch(_, maps):
    return maps + maps.detach().flatten(1).sum(1).argsort().view(-1, 1, 1, 1)


@refused(MIXES)
def deviation_over_groups(_, maps):
    groups = maps.view(max(1, len(maps) // 4), -1, *maps.shape[1:])
    return maps + groups.std(0, unbiased=False).mean((1, 2, 3)).repeat(len(groups)).view(
        -1, 1, 1, 1
    )


@refused(MIXES)
def batches_of_sixteen_and_more(_, maps):
    return maps - maps.mean(0) if len(maps) >= 16 else maps


@refused(MIXES)
def layer_in_evaluation(critic, maps):
    return maps if critic.frozen.training else maps - maps.mean(0)


@refused(MIXES)
def hook_over_the_batch(_, maps):
    maps = maps.clone()
    if maps.requires_grad:
        maps.register_hook(lambda gradient: gradient / gradient.norm())
    return maps


def within_groups(values: Tensor, size: int) -> Tensor:
    return values.view(-1, size, *values.shape[1:])


@works
@in_groups(4)
def minibatch_standard_deviation(_, maps):
    return MinibatchStdDev(4)(maps)[:, 1:]


@works
@in_groups(3)
def first_of_three(_, maps):
    groups = within_groups(maps, 3)
    return (groups - groups[:, :1].tanh()).view_as(maps)


@works
@in_groups(2)
def place_in_the_group(_, maps):
    return (within_groups(maps, 2) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).to(maps)).view_as(
        maps
    )


@works
@in_groups(4)
def groups_that_are_declared_in_vain(_, maps):
    return maps


@refused(MIXES_GROUPS)
@in_groups(4)
def groups_of_images_that_are_far_apart(_, maps):
    """As in StyleGAN's code."""
    groups = maps.view(4, -1, *maps.shape[1:])
    deviations = groups.std(0, unbiased=False).mean((1, 2, 3))
    return maps + deviations.repeat(4).view(-1, 1, 1, 1)


@refused(MIXES_GROUPS)
@in_groups(2)
def groups_that_are_larger_than_declared(_, maps):
    return MinibatchStdDev(4)(maps)[:, 1:]


@refused(MIXES_GROUPS)
@in_groups(4)
def groups_that_begin_elsewhere(_, maps):
    return MinibatchStdDev(4)(maps.roll(1, 0))[:, 1:].roll(-1, 0)


@refused(MIXES_GROUPS)
@in_groups(4)
def faint_deviation_beyond_the_group(_, maps):
    return MinibatchStdDev(4)(maps)[:, 1:] + 1e-6 * maps.std(0, unbiased=False).mean()


@refused(MIXES_GROUPS)
@in_groups(4)
def detached_mean_beyond_the_group(_, maps):
    return MinibatchStdDev(4)(maps)[:, 1:] - maps.detach().mean((0, 2, 3), keepdim=True)


@refused(MIXES_GROUPS)
@in_groups(4)
def number_of_the_group(_, maps):
    return (within_groups(maps, 4) + torch.arange(len(maps) // 4).view(-1, 1, 1, 1, 1)).view_as(
        maps
    )


@refused(MIXES_GROUPS)
@in_groups(2)
def size_of_the_batch_of_groups(_, maps):
    return maps * len(maps) / 8


@refused("is not the sum of those for its parts")
@in_groups(2)
def hook_over_all_groups(critic, maps):
    matrix = critic.matrix.clone()
    if matrix.requires_grad:
        matrix.register_hook(lambda gradient: gradient / gradient.norm())
    return torch.einsum("oc,nchw->nohw", matrix, maps)


@refused(r"`batch_group_size` of Critic must be a positive int, not 2\.0")
@in_groups(2.0)
def group_that_is_not_a_whole_number(_, maps):
    return maps


@refused("reads the rank or world size")
def world_size(_, maps):
    return maps * int(os.environ.get("WORLD_SIZE", "1"))


@refused("changes `vector`")
def moving_average_with_gradients_only(critic, maps):
    if torch.is_grad_enabled():
        critic.vector.lerp_(maps.detach().mean((0, 2, 3)), 0.1)
    return maps


@refused(r"changes `counters\['calls'\]`")
def counter_in_a_container(critic, maps):
    critic.counters["calls"] += 1
    return maps


@refused(r"changes `norm\.running_mean`")
def running_statistics(critic, maps):
    return critic.norm(maps)


@refused("changes `vector`")
def moving_average(critic, maps):
    with torch.no_grad():
        critic.vector.lerp_(maps.mean((0, 2, 3)), 0.1)
    return maps - critic.vector.view(1, -1, 1, 1)


@refused("changes `vector`.*use torch.nn.utils.parametrizations.spectral_norm")
def spectral_norm_by_hand(critic, maps):
    matrix = critic.matrix
    with torch.no_grad():
        critic.vector.copy_(F.normalize(matrix @ (matrix.t() @ critic.vector), dim=0))
    return maps / (critic.vector @ matrix @ matrix.t() @ critic.vector).sqrt()


@refused("changes `gate`")
def first_batch_initialization(critic, maps):
    with torch.no_grad():
        critic.gate.copy_(maps.std())
    return maps


@refused("changes `calls`")
def fade_in(critic, maps):
    critic.calls += 1
    return maps * min(1.0, critic.calls / 1000)


@refused("does not always return the same")
def previous_maps(critic, maps):
    previous = getattr(critic, "maps", maps.detach())
    critic.maps = maps.detach().clone()
    return maps + 0.01 * previous.mean() if previous.shape == maps.shape else maps


@refused(r"draws random numbers in its forward \(dropout, noise, rrelu\)")
def functional_dropout(_, maps):
    return F.dropout(maps)


@refused("random numbers.*use ganscale.random.normal_like,.*random_layers.Dropout")
def noise(_, maps):
    return maps + torch.randn_like(maps)


@refused("draws from Python's `random`")
def python_random(_, maps):
    return maps * (1 + 0.1 * random.random())


@refused("draws from Python's `random`")
def rare_python_random(_, maps):
    return 2 * maps if random.random() < 0.001 else maps


@refused(r"draws from `numpy\.random`")
def numpy_random(_, maps):
    return maps * (1 + np.random.rand())  # noqa: NPY002


@refused("draws from its generator `generator`")
def own_generator(critic, maps):
    return maps + critic.generator.randn()


@refused("draws from its generator `tests.helpers.users_networks._NUMPY_GENERATOR`")
def generator_of_the_module(_, maps):
    return maps * (1 + _NUMPY_GENERATOR.normal())


@refused("draws 'noise' twice, which would be the same numbers: give each draw a name")
def two_draws_of_one_name(_, maps):
    return maps + normal_like(maps, "noise") * normal_like(maps[:, :1], "noise")


@refused("'weights' is drawn for a tensor of 8 rows in a forward of 4 images")
def draw_for_weights(critic, maps):
    weight = critic.second.weight
    return F.conv2d(maps, weight * bernoulli_like(weight, "weights", 0.9), padding=1)


@refused("changes `calls` in its forward|does not always return the same")
def draw_of_a_new_name_every_time(critic, maps):
    critic.calls = getattr(critic, "calls", 0) + 1
    return maps + normal_like(maps, f"noise/{critic.calls}")


@works
def draws_by_slot(critic, maps):
    maps = maps + critic.gate * normal_like(maps[:, :1], "noise")
    maps = maps * (1 + uniform_like(maps[:, 0, 0, 0], "scale")[:, None, None, None])
    return critic.dropout(maps)


@works
def checkpointed_draws_by_slot(critic, maps):
    maps = checkpoint(lambda maps: critic.dropout(critic.norm(maps)), maps, use_reentrant=False)
    return maps * bernoulli_like(maps, "kept", 0.8)


@works
def plain(_, maps):
    return maps


@works
def instance_norm(critic, maps):
    return critic.norm(maps)


@works
def leaky_relu_of_slope_zero_before_a_change_in_place(_, maps):
    return F.leaky_relu(maps, 0.0).mul_(2.0)


@works
def scaled_dot_product_attention(_, maps):
    tokens = maps.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).view_as(maps)


@works
def attention(critic, maps):
    tokens = maps.flatten(2).transpose(1, 2)
    mixed, _ = critic.attention(tokens, tokens, tokens, need_weights=False)
    return mixed.transpose(1, 2).reshape(maps.shape)


@works
def transformer(critic, maps):
    return critic.transformer(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)


@works
def checkpointed(_, maps):
    return checkpoint(lambda inputs: F.gelu(inputs), maps, use_reentrant=False)


@works
def checkpointed_attention(_, maps):
    tokens = maps.flatten(2).transpose(1, 2)
    attend = F.scaled_dot_product_attention
    mixed = checkpoint(lambda t: attend(t, t, t), tokens, use_reentrant=False)
    return mixed.transpose(1, 2).reshape(maps.shape)


@works
def complex_numbers(_, maps):
    return torch.fft.ifft2(torch.fft.fft2(maps) * (1 + 0.5j)).real


@works
def float32_within(_, maps):
    return maps * F.linear(torch.ones(1, 8), torch.ones(1, 8).float()).float().to(maps)


@works
def casts_as_stylegan_does(critic, maps):
    weight = critic.matrix.to(torch.float32)
    return torch.einsum("oc,nchw->nohw", weight, maps.to(torch.float32)).to(maps.dtype)


@works
def shared_backbone(critic, maps):
    return critic.backbone(maps)


@works
def attribute_that_is_not_a_number(critic, maps):
    critic.bound = float("nan")
    return maps


@works
def numpy_weights(_, maps):
    return maps


@works
def remembered_maps(critic, maps):
    critic.maps = maps.detach()
    return maps


@works
def remembered_size(critic, maps):
    critic.size = maps.shape[-1]
    return maps


@refused(r"fails in its forward: KeyError: 'width' \(.*users_networks\.py:\d+\)", FAILING_CRITICS)
def exception(_, maps):
    return {}["width"]


@refused(r"RuntimeError: view size is not compatible .*users_networks\.py:\d+\)", FAILING_CRITICS)
def view_of_a_feature_map(_, maps):
    return maps.view(len(maps), -1).view_as(maps)


@refused(
    r"cannot be trained: .*users_networks\.py:\d+\); checkpoint with use_reentrant=False",
    FAILING_CRITICS,
)
def reentrant_checkpoint(_, maps):
    return checkpoint(F.gelu, maps, use_reentrant=True)


@refused("cannot be trained: .*look for detach or no_grad in its forward", FAILING_CRITICS)
def detached(_, maps):
    return maps.detach()


@refused(r"cannot be trained: .*users_networks\.py:\d+\); .*no second derivative", FAILING_CRITICS)
def without_second_derivative(_, maps):
    numbers = torch.arange(len(maps)).view(-1, 1)
    return F.embedding_bag(numbers, maps.flatten(1), mode="sum").view_as(maps)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CubeDifferentiatedOnce(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))  # type: ignore[assignment]


class CubeByNumPy(Cube):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2) * grad


class CubeWithoutGraph(Cube):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            slope = 3 * x**2
        return slope * grad


@works
def own_function(_, maps):
    return Cube.apply(maps)


@refused("would have a wrong gradient", FAILING_CRITICS)
def own_function_that_is_differentiated_once(_, maps):
    return CubeDifferentiatedOnce.apply(maps)


@refused("would have a wrong gradient", FAILING_CRITICS)
def own_function_by_numpy(_, maps):
    return CubeByNumPy.apply(maps)


@refused("would have a wrong gradient", FAILING_CRITICS)
def own_function_without_a_graph(_, maps):
    return CubeWithoutGraph.apply(maps)


@refused("returns NaN or infinity", FAILING_CRITICS)
def not_a_number(_, maps):
    return (maps - maps) / (maps - maps)


@refused("the derivative of .* is NaN or infinite", FAILING_CRITICS)
def root_of_zero(_, maps):
    return maps + (maps - maps).abs().sqrt()


class ConvolutionalCritic(Critic):
    """Convolutions and a linear layer, which share a penalty's backward with the loss."""

    def forward(self, images: Tensor) -> Tensor:
        is_reordered = self.features == "reordered"
        maps = self.first(images.flip(0) if is_reordered else images)
        if self.features == "clamped" and maps.requires_grad:
            maps.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        logits = self.last(self.second(F.leaky_relu(maps, 0.2)).flatten(1)).squeeze(1)
        return logits.flip(0) if is_reordered else logits
