"""A step's loss and gradients are those of the written-out objective."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from ganscale.objectives.losses import LOSSES
from ganscale.objectives.objective import Objective, build_objective
from ganscale.runtime import Runtime
from ganscale.schema import (
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.player import Player, Tripwire
from ganscale.training.step import CriticStep, GeneratorStep

BATCH, WEIGHT = 4, 10.0


class SmoothCritic(nn.Module):
    """D(x) = v . tanh(W x + b) + c, whose input gradient is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(draw(6, 12, seed=1)), nn.Parameter(draw(6, seed=2))
        self.last, self.last_bias = nn.Parameter(draw(6, seed=3)), nn.Parameter(draw(1, seed=4))

    def forward(self, images: Tensor) -> Tensor:
        return (
            torch.tanh(images.flatten(1) @ self.weight.T + self.bias) @ self.last + self.last_bias
        )

    def gradient_norms(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(images.flatten(1) @ self.weight.T + self.bias)
        return (((1 - hidden**2) * self.last) @ self.weight).square().sum(1).sqrt()


class SmallGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 12).double()

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.layer(latents)).view(-1, 3, 2, 2)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(loss: str, **penalties: float) -> Objective:
    weights = {name: PenaltyConfig(weight) for name, weight in penalties.items()}
    return build_objective(ObjectiveConfig(LossConfig(loss), weights))


def critic_inputs(batch: int = BATCH) -> dict[str, Tensor | None]:
    return {
        "real_images": draw(batch, 3, 2, 2, seed=5),
        "fake_images": draw(batch, 3, 2, 2, seed=6),
        "coefficients": torch.rand(batch, generator=torch.Generator().manual_seed(7)),
        "labels": None,
    }


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    return binary_cross_entropy(real.sigmoid(), ones) + binary_cross_entropy(fake.sigmoid(), zeros)


ADVERSARIAL = {
    "minimax": cross_entropy,
    "non_saturating": cross_entropy,
    "lsgan": lambda real, fake: ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2,
    "wgan": lambda real, fake: fake.mean() - real.mean(),
    "hinge": lambda real, fake: (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean(),
    "relativistic": lambda real, fake: -(real - fake).sigmoid().log().mean(),
    "relativistic_average": lambda real, fake: cross_entropy(
        real - fake.mean(), fake - real.mean()
    ),
}


@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_critic_steps_loss_and_gradients_are_the_formulas(name, with_penalty):
    penalties = {"wgan_gp": WEIGHT} if with_penalty else {}
    critic, by_hand = SmoothCritic(), SmoothCritic()
    inputs = critic_inputs()
    real, fake, epsilon = (inputs[k] for k in ("real_images", "fake_images", "coefficients"))
    assert real is not None
    assert fake is not None
    assert epsilon is not None
    step = CriticStep(critic, objective(name, **penalties), "float64")
    loss, meters = step(**inputs, with_panel=True)
    loss.backward()

    adversarial = ADVERSARIAL[name](by_hand(real), by_hand(fake))
    norms = by_hand.gradient_norms(
        torch.stack(
            [e * r + (1 - e) * f for e, r, f in zip(epsilon.double(), real, fake, strict=True)]
        )
    )
    penalty = ((norms - 1) ** 2).mean()
    total = adversarial + WEIGHT * penalty if with_penalty else adversarial
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=1e-12)
    for parameter, expected in zip(critic.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-11, atol=1e-12)

    close = partial(pytest.approx, rel=1e-12)
    assert meters["loss/critic"].item() == close(total.item())
    assert meters["loss/critic_adversarial"].item() == close(adversarial.item())
    assert meters["logits/real_mean"].item() == close(by_hand(real).mean().item())
    assert meters["logits/fake_mean"].item() == close(by_hand(fake).mean().item())
    assert meters[f"panel/critic/{name}"].item() == close(adversarial.item())
    if with_penalty:
        assert meters["penalty/wgan_gp"].item() == close(penalty.item())
        assert meters["penalty/gradient_norm"].item() == close(norms.mean().item())
    assert ("penalty/wgan_gp" in meters) == with_penalty
    assert not any(value.requires_grad for value in meters.values())


def test_labels_go_with_real_fake_and_mixed_images_alike():
    seen: list[list[int]] = []

    class ClassCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Parameter(draw(3, seed=1))

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels.tolist())
            return images.flatten(1).sum(1) * self.score[labels]

    step = CriticStep(ClassCritic(), objective("wgan", wgan_gp=1.0), "float64")
    step(**{**critic_inputs(), "labels": torch.tensor([0, 2, 1, 2])}, with_panel=False)
    assert seen == [[0, 2, 1, 2, 0, 2, 1, 2], [0, 2, 1, 2]]


GENERATOR_LOSSES = {
    "minimax": lambda fake, _: (1 - fake.sigmoid()).log().mean(),
    "non_saturating": lambda fake, _: -fake.sigmoid().log().mean(),
    "lsgan": lambda fake, _: ((fake - 1) ** 2).mean() / 2,
    "wgan": lambda fake, _: -fake.mean(),
    "hinge": lambda fake, _: -fake.mean(),
    "relativistic": lambda fake, real: -(fake - real).sigmoid().log().mean(),
    "relativistic_average": lambda fake, real: cross_entropy(
        fake - real.mean(), real - fake.mean()
    ),
}


@pytest.mark.parametrize("with_panel", [False, True])
@pytest.mark.parametrize("name", GENERATOR_LOSSES)
def test_the_generator_steps_loss_and_gradients_are_the_formulas(name, with_panel):
    torch.manual_seed(0)
    generator, critic, latents = SmallGenerator(), SmoothCritic(), draw(BATCH, 5, seed=8)
    step = GeneratorStep(generator, critic, objective(name), "float64")
    real = draw(BATCH, 3, 2, 2, seed=5)
    loss, meters = step(latents=latents, real_images=real, labels=None, with_panel=with_panel)
    parameters = list(generator.parameters())
    found = torch.autograd.grad(loss, parameters)
    expected_loss = GENERATOR_LOSSES[name](critic(generator(latents)), critic(real))
    expected = torch.autograd.grad(expected_loss, parameters)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert meters["loss/generator"].item() == loss.item()
    assert (f"panel/generator/{name}" in meters) == with_panel
    assert list(step.parameters()) == parameters  # the critic is not this module's to synchronize


def player(step: nn.Module, network: nn.Module, runtime: Runtime, **training) -> Player:
    return Player(
        "player",
        step,
        network,
        OptimizerConfig("sgd", 0.1),  # Adam would amplify the rounding of gradients that cancel
        TrainingConfig(total_images=1000, **training),
        runtime,
        Tripwire(runtime.device),
    )


@pytest.mark.parametrize("name", [name for name in ADVERSARIAL if not LOSSES[name]().spans_batch])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_no_update_of_the_critic(runtime, name, accumulate):
    networks, meters = [], []
    for parts in (1, accumulate):
        critic = SmoothCritic()
        step = CriticStep(critic, objective(name, wgan_gp=WEIGHT), "float64")
        critics_player = player(step, critic, runtime, accumulate=parts)
        for images_seen in (0, 8):
            meters.append(critics_player.update(critic_inputs(8), images_seen, with_panel=False))
        networks.append(critic)
    for whole, accumulated in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=1e-12)
    for whole, accumulated in zip(meters[:2], meters[2:], strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-11, atol=1e-12)


def test_micro_batches_change_no_update_of_the_generator(runtime):
    networks = []
    for parts in (1, 2):
        torch.manual_seed(0)
        generator = SmallGenerator()
        step = GeneratorStep(generator, SmoothCritic(), objective("non_saturating"), "float64")
        inputs = {"latents": draw(8, 5, seed=8), "real_images": draw(8, 3, 2, 2, seed=5)}
        player(step, generator, runtime, accumulate=parts).update(
            {**inputs, "labels": None}, 0, with_panel=False
        )
        networks.append(generator)
    for whole, accumulated in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=1e-12)


def test_a_generator_update_leaves_the_critic_without_gradients(runtime):
    generator, critic = SmallGenerator(), SmoothCritic()
    before = [parameter.clone() for parameter in critic.parameters()]
    step = GeneratorStep(generator, critic, objective("wgan"), "float64")
    inputs = {
        "latents": draw(4, 5, seed=8),
        "real_images": draw(4, 3, 2, 2, seed=5),
        "labels": None,
    }
    player(step, generator, runtime).update(inputs, 0, with_panel=True)
    for parameter, value in zip(critic.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_a_critic_update_leaves_the_generator_without_gradients(runtime):
    """Even where a caller forgot to make the fakes without a graph."""
    generator, critic = SmallGenerator(), SmoothCritic()
    inputs = {**critic_inputs(), "fake_images": generator(draw(4, 5, seed=8))}
    step = CriticStep(critic, objective("wgan", wgan_gp=WEIGHT), "float64")
    player(step, critic, runtime).update(inputs, 0, with_panel=False)
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_in_a_bfloat16_run_the_loss_and_the_penalty_are_float32():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = {k: None if v is None else v.float() for k, v in critic_inputs().items()}
    found = {}
    for precision in ("float32", "bfloat16"):
        step = CriticStep(layers, objective("wgan", wgan_gp=WEIGHT), precision)
        loss, meters = step(**inputs, with_panel=False)
        assert loss.dtype == torch.float32
        found[precision] = meters
    assert torch.equal(found["bfloat16"]["penalty/wgan_gp"], found["float32"]["penalty/wgan_gp"])
    logits = [meters["logits/real_mean"].item() for meters in found.values()]
    assert logits[0] != logits[1]  # the logits, though, are bfloat16's
    assert logits[0] == pytest.approx(logits[1], abs=0.02)
