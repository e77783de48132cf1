"""What networks draw is the same however a step computes its forwards."""

import pytest
import torch
from torch import Tensor

from benchmarks.invariance import CHANNELS, RESOLUTION, Combination, config_of, record
from benchmarks.tiny_networks import TinyCritic, TinyGenerator
from ganscale.networks.random_layers import name_random_layers
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.training.critic_step import CriticStep
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.network_function import Subject

SHAPE = (CHANNELS, RESOLUTION, RESOLUTION)
SLOTS = torch.tensor([4, 1, 9])


def networks() -> tuple[TinyGenerator, TinyCritic]:
    torch.manual_seed(0)
    generator, critic = TinyGenerator(6, SHAPE, draws=True), TinyCritic(SHAPE, draws=True)
    for network in (generator, critic):
        name_random_layers(network.double())
    return generator, critic


def critic_gradient(penalties: str, *, joins: bool, shares: bool, slots: Tensor = SLOTS) -> Tensor:
    """Of a critic step with the penalties' points at its own images."""
    config = config_of(Combination("hinge", penalties), 1, "float64")
    objective = build_objective(config.objective)
    _, critic = networks()
    step = CriticStep(critic, objective, "float64", joins_forwards=joins, seed=5)
    step._can_share_forward = shares
    images = torch.rand(
        2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    real, fake = images
    points = {name: (real if name == "r1" else fake) for name in objective.penalties}
    step(real, fake, None, points, slots=slots).loss.backward()
    return torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None])


@pytest.mark.parametrize("penalties", ["r1", "r1+r2"])
def test_joint_and_separate_forwards_of_a_critic_step_draw_the_same(penalties):
    expected = critic_gradient(penalties, joins=True, shares=True)
    for joins, shares in ((False, True), (True, False)):
        found = critic_gradient(penalties, joins=joins, shares=shares)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    other = critic_gradient(penalties, joins=True, shares=True, slots=SLOTS + 1)
    assert not torch.allclose(other, expected, rtol=1e-3)


def test_joint_and_separate_forwards_of_a_generator_step_draw_the_same():
    objective = build_objective(
        config_of(Combination("relativistic", "none"), 1, "float64").objective
    )
    latents, real = torch.randn(3, 6).double(), torch.rand(3, *SHAPE).double()
    losses = []
    for joins in (True, False):
        generator, critic = networks()
        step = GeneratorStep(generator, critic, objective, "float64", joins_forwards=joins, seed=5)
        losses.append(step(latents, real, None, slots=SLOTS).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("penalties", ["wgan_gp", "r1+r2", "none"])
def test_checkpointed_networks_train_as_others(penalties, accumulate):
    runtime = Runtime.start()
    plain, checkpointed = (
        record(config_of(Combination("hinge", penalties, variant), accumulate, "float64"), runtime)
        for variant in ("draws", "checkpointed_draws")
    )
    assert plain.keys() == checkpointed.keys()
    for kind, tensors in plain.items():
        for name, tensor in tensors.items():
            found = checkpointed[kind][name]
            torch.testing.assert_close(found, tensor, rtol=1e-10, atol=1e-12, msg=f"{kind} {name}")


def test_the_trial_looks_at_networks_that_draw_in_float64():
    """With a tolerance of float32, it would not compare penalties with finite differences."""
    _, critic = networks()
    images = torch.rand(4, *SHAPE)
    subject = Subject("critic", critic.float(), images, None, "float32", 2, torch.arange(4))
    wide = subject.in_float64()
    assert wide.lowest == torch.float64
    rows = [3, 3, 1, 0]
    torch.testing.assert_close(wide.rows(rows).run(), wide.run()[rows], rtol=1e-12, atol=1e-14)
