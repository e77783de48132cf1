"""A critic step whose loss and penalties share one backward: the gradients of plain autograd, in
float64, by fewer operations; and the step as it was where that cannot be."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ganscale.networks.dcgan import DCGANCritic
from ganscale.networks.forward import update_spectral_norms
from ganscale.networks.mlp import MLPCritic
from ganscale.networks.resnet import ResNetCritic
from ganscale.objectives import joint_backward
from ganscale.objectives.objective import build_objective
from ganscale.schedules import Schedule
from ganscale.schema import LossConfig, ObjectiveConfig, PenaltyConfig
from ganscale.training import critic_step
from ganscale.training.critic_step import CriticStep
from ganscale.training.flops import _FlopCounter
from tests.helpers.networks import draw, small_r3gan_critic

BATCH, CLASSES, SHAPE = 4, 3, (3, 16, 16)
WEIGHTS = {"r1": 0.7, "r2": 0.4}


class Small(nn.Module):
    """Two convolutions and a linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.last = nn.Linear(4 * 8 * 8, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.last(self.features(images).flatten(1)).squeeze(1)

    def features(self, images: Tensor) -> Tensor:
        return F.leaky_relu(self.second(F.leaky_relu(self.first(images), 0.2)), 0.2)


class Recurrent(Small):
    def features(self, images: Tensor) -> Tensor:
        maps = self.first(images)
        for _ in range(2):
            maps = maps + F.relu(self.second(F.interpolate(maps, scale_factor=2.0)))
        return F.avg_pool2d(maps, 2)


class InPlace(Small):
    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(images), inplace=True)), inplace=True)


class WithoutBias(Small):
    def features(self, images: Tensor) -> Tensor:
        maps = F.relu(F.conv2d(images, self.first.weight, padding=1))
        return F.avg_pool2d(F.conv_transpose2d(maps, self.second.weight, padding=1), 2)


class ManyLayersAbove(Small):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(256, 256)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = F.relu(self.hidden(self.features(images).flatten(1)))
        return self.gain * self.last(hidden).squeeze(1)


class OneImageAtATime(Small):
    """Each layer has another number of images than the batch."""

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([super(OneImageAtATime, self).features(each) for each in images.split(1)])


class Smooth(Small):
    def features(self, images: Tensor) -> Tensor:
        return F.softplus(self.second(F.gelu(self.first(images))))


class SmoothScore(Small):
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(images).tanh()


class MaxPooled(Small):
    """torch sends zeros back through the maps."""

    def features(self, images: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(F.conv2d(self.first(images), self.second.weight, padding=1), 2))


class Normalized(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.second(self.norm(self.first(images))))


class ScaleBelow(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def features(self, images: Tensor) -> Tensor:
        return super().features(self.scale * images)


class TiedWeight(Small):
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        again = self.features(images).mean((2, 3)) @ self.second.weight.mean((2, 3))
        return super().forward(images) + again.sum(1)


class LearnedMap(Small):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, 3, 16, 16))

    def features(self, images: Tensor) -> Tensor:
        own = F.relu(self.first(self.map))
        return F.relu(self.second(F.relu(self.first(images)) + own))


class Checkpointed(Small):
    def features(self, images: Tensor) -> Tensor:
        return checkpoint(super().features, images, use_reentrant=False)


class Patches(Small):
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.features(images).mean(1)


JOINT: dict[str, Callable[[], nn.Module]] = {
    "dcgan": lambda: DCGANCritic(SHAPE, width=4),
    "dcgan, no slope": lambda: DCGANCritic(SHAPE, width=4, negative_slope=0.0),
    "resnet": lambda: ResNetCritic(SHAPE, width=4),
    "resnet, classes": lambda: ResNetCritic(SHAPE, CLASSES, width=4),
    "resnet, spectral norm": lambda: ResNetCritic(SHAPE, CLASSES, width=4, spectral_norm=True),
    "r3gan": lambda: small_r3gan_critic(SHAPE),
    "r3gan, classes": lambda: small_r3gan_critic(SHAPE, CLASSES),
    **{each.__name__: each for each in (Small, Recurrent, InPlace, WithoutBias, ManyLayersAbove)},
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLPCritic(SHAPE, width=16),
    "dcgan, layer norm": lambda: DCGANCritic(SHAPE, width=4, norm="layer"),
    "dcgan, instance norm": lambda: DCGANCritic(SHAPE, width=4, norm="instance"),
    **{
        each.__name__: each
        for each in (
            *(OneImageAtATime, Smooth, SmoothScore, MaxPooled, Normalized, ScaleBelow, TiedWeight),
            *(LearnedMap, Checkpointed, Patches),
        )
    },
}


def made(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    critic = make().double()
    update_spectral_norms(critic)
    return critic


def step_of(critic: nn.Module, loss: str, penalties: tuple[str, ...], **options) -> CriticStep:
    chosen = {name: PenaltyConfig(WEIGHTS[name]) for name in penalties}
    objective = ObjectiveConfig(loss=LossConfig(loss), penalties=chosen)
    return CriticStep(critic, build_objective(objective), "float64", **options)


def batch_of(critic: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    labels = torch.arange(BATCH) % CLASSES if hasattr(critic, "embedding") else None
    labels = labels if getattr(critic, "embedding", None) is not None else None
    return draw(BATCH, *SHAPE, seed=1), draw(BATCH, *SHAPE, seed=2), labels


def own_gradients(critic: nn.Module, loss: str, penalties: tuple[str, ...], **options) -> list:
    step, (real, fake, labels) = step_of(critic, loss, penalties, **options), batch_of(critic)
    points = {name: {"r1": real, "r2": fake}[name] for name in penalties}
    value = step(real, fake, labels, points).loss
    return [value.detach(), *gradients(value, critic)]


def gradients(value: Tensor, critic: nn.Module) -> tuple[Tensor, ...]:
    weights = [*critic.parameters()]
    return torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)


def plain_loss(critic: nn.Module, loss: str, penalties: tuple[str, ...]) -> Tensor:
    """By autograd, term by term: softplus(-D(x)) + softplus(D(G(z))), or softplus of the difference
    of pairs, and E[||grad D||^2] / 2 (Mescheder et al. 2018, equations 9 and 10)."""
    *both, labels = batch_of(critic)
    classes = () if labels is None else (labels,)
    real, fake = (critic(images, *classes) for images in both)
    if loss == "relativistic":
        total = F.softplus(fake - real).mean()
    else:
        total = F.softplus(-real).mean() + F.softplus(fake).mean()
    for name in penalties:
        points = both[["r1", "r2"].index(name)].clone().requires_grad_()
        score = critic(points, *classes).sum()
        (slopes,) = torch.autograd.grad(score, points, create_graph=True)
        total = total + WEIGHTS[name] * slopes.square().flatten(1).sum(1).mean() / 2
    return total


def plain_gradients(critic: nn.Module, loss: str, penalties: tuple[str, ...]) -> list[Tensor]:
    total = plain_loss(critic, loss, penalties)
    return [total.detach(), *gradients(total, critic)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for own, plain in zip(found, expected, strict=True):
        assert (own - plain).abs().max() <= 1e-12 * max(1.0, plain.abs().max().item())


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each forward of a step, whether its backward is a joint one."""
    found: list[bool] = []

    def join(logits: Tensor, gradients: Tensor, *more) -> tuple[Tensor, Tensor]:
        results = joint_backward.join_backward(logits, gradients, *more)
        found.append(results[0] is not logits)
        return results

    monkeypatch.setattr(critic_step, "join_backward", join)
    return found


STEPS = [
    ("relativistic", ("r1", "r2")),
    ("non_saturating", ("r1",)),
    ("non_saturating", ("r2",)),
    ("non_saturating", ("r1", "r2")),
]


@pytest.mark.parametrize(
    ("loss", "penalties"), STEPS, ids=lambda each: each if isinstance(each, str) else "+".join(each)
)
@pytest.mark.parametrize("name", JOINT)
def test_a_joint_backward_has_the_gradients_of_autograd(name, loss, penalties, joined):
    critic = made(JOINT[name])
    if name == "resnet, spectral norm":
        loss = "non_saturating"
    assert_equal(own_gradients(critic, loss, penalties), plain_gradients(critic, loss, penalties))
    assert joined == [True]


@pytest.mark.parametrize("name", OTHERS)
def test_where_a_joint_backward_would_be_wrong_or_slow_there_is_none(name, joined):
    critic = made(OTHERS[name])
    if name != "Patches":  # whose scores are sums of maps
        found = own_gradients(critic, "relativistic", ("r1", "r2"))
        assert_equal(found, plain_gradients(critic, "relativistic", ("r1", "r2")))
    else:
        own_gradients(critic, "relativistic", ("r1", "r2"))
    assert joined == [False]


def test_a_backward_that_cuts_the_penaltys_graph_is_not_joined(joined):
    """Its double backward would never come to the convolutions below."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, maps):
            return 2 * maps

        @staticmethod
        def backward(ctx, grad):  # type: ignore[override]
            return 2 * grad.detach()

    class CutCritic(Small):
        def features(self, images: Tensor) -> Tensor:
            return F.relu(self.second(Cut.apply(F.relu(self.first(images)))))

    critic = made(CutCritic)
    own_gradients(critic, "relativistic", ("r1", "r2"))
    assert joined == [False]


def convolutions(run: Callable[[], object]) -> int:
    with _FlopCounter() as counter:
        run()
    return counter.flops


@pytest.mark.parametrize(("name", "forwards"), [("dcgan", 4.4), ("r3gan", 4.05)])
def test_a_step_with_r1_and_r2_takes_the_operations_of_four_forwards(name, forwards):
    """DCGAN's gradient of the images is a sub-pixel convolution, which takes a few more."""
    critic = made(JOINT[name])
    real, fake, _ = batch_of(critic)
    both = torch.cat([real, fake])
    forward = convolutions(lambda: critic(both))
    joint = convolutions(lambda: own_gradients(critic, "relativistic", ("r1", "r2")))
    plain = convolutions(lambda: plain_gradients(critic, "relativistic", ("r1", "r2")))
    assert joint <= forwards * forward
    assert plain >= 6.9 * forward  # its penalties have forwards of their own, and zeros


def test_the_loss_of_a_joint_backward_may_be_scaled():
    critic = made(Small)
    step, (real, fake, _) = step_of(critic, "relativistic", ("r1", "r2")), batch_of(critic)
    points = {"r1": real, "r2": fake}
    whole, quarter = (
        gradients(scale * step(real, fake, None, points).loss, critic) for scale in (1.0, 0.25)
    )
    assert_equal([4 * each for each in quarter], [*whole])


def test_a_penalty_that_is_scheduled_to_be_zero_leaves_the_loss():
    critic = made(Small)
    penalties = {"r1": PenaltyConfig(Schedule(0.0, 1.0, 100))}
    objective = ObjectiveConfig(loss=LossConfig("non_saturating"), penalties=penalties)
    step = CriticStep(critic, build_objective(objective), "float64")
    real, fake, _ = batch_of(critic)
    loss = step(real, fake, None, {"r1": real}, factors={"r1": 0.0}).loss
    assert_equal([*gradients(loss, critic)], own_gradients(critic, "non_saturating", ())[1:])


@pytest.mark.parametrize("joins_forwards", [True, False])
def test_r1_alone_is_joined_with_the_loss_of_the_real_images(joins_forwards, joined, monkeypatch):
    monkeypatch.setattr(critic_step, "saves_launches", lambda _: True)
    critic = made(Small)
    found = own_gradients(critic, "non_saturating", ("r1",), joins_forwards=joins_forwards)
    assert_equal(found, plain_gradients(critic, "non_saturating", ("r1",)))
    assert joined == [True]


def test_a_frozen_layer_stays_without_a_gradient():
    critic = made(Small)
    critic.first.requires_grad_(False)
    step, (real, fake, _) = step_of(critic, "relativistic", ("r1", "r2")), batch_of(critic)
    step(real, fake, None, {"r1": real, "r2": fake}).loss.backward()
    assert critic.first.weight.grad is None
    trained = [*critic.second.parameters(), *critic.last.parameters()]
    expected = torch.autograd.grad(plain_loss(critic, "relativistic", ("r1", "r2")), trained)
    assert_equal([p.grad for p in trained], [*expected])


@pytest.mark.parametrize("runs_backward", [True, False])
def test_a_step_leaves_nothing_behind(runs_backward, monkeypatch):
    """The nodes of the graph have something in common, which must not refer to the graph."""
    nodes: list[weakref.ref] = []

    def join(logits: Tensor, *more) -> tuple[Tensor, Tensor]:
        node: Any = logits.grad_fn
        while type(node).__name__ != "FastConvolutionBackward":
            node = node.next_functions[0][0]
        nodes.append(weakref.ref(node))
        return joint_backward.join_backward(logits, *more)

    monkeypatch.setattr(critic_step, "join_backward", join)
    critic = made(lambda: DCGANCritic(SHAPE, width=4))
    step, (real, fake, _) = step_of(critic, "relativistic", ("r1", "r2")), batch_of(critic)
    gc.collect()
    gc.disable()
    try:
        loss = step(real, fake, None, {"r1": real, "r2": fake}).loss
        if runs_backward:
            loss.backward()
        assert nodes[0]() is not None
        del loss
        assert nodes[0]() is None
    finally:
        gc.enable()


def test_in_bfloat16_a_joint_backward_errs_no_more_than_separate_ones(monkeypatch):
    critic = made(lambda: DCGANCritic(SHAPE, width=8))
    real, fake, _ = batch_of(critic)
    penalties = "r1", "r2"
    exact = own_gradients(critic, "relativistic", penalties)[1:]
    critic.float()
    errors = {}
    for is_joint in (True, False):
        if not is_joint:
            monkeypatch.setattr(critic_step, "join_backward", lambda *given: given[:2])
        chosen = {name: PenaltyConfig(WEIGHTS[name]) for name in penalties}
        objective = build_objective(ObjectiveConfig(LossConfig("relativistic"), chosen))
        step = CriticStep(critic, objective, "bfloat16", "bfloat16")
        images = real.float(), fake.float()
        loss = step(*images, None, dict(zip(penalties, images, strict=True))).loss
        pairs = [*zip(gradients(loss, critic), exact, strict=True)]
        square = sum((found - right).square().sum() for found, right in pairs)
        errors[is_joint] = float(square / sum(right.square().sum() for _, right in pairs)) ** 0.5
    assert 1e-3 < errors[True] < 1.2 * errors[False] < 0.2
