"""Every objective trains alike on 1, 2 and 4 ranks, with accumulation or not; and what it is held
against is the published mathematics.

Every loss, penalty and variant occurs in the combinations here; `python -m benchmarks.invariance`
has every loss with every penalty.
"""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.invariance import (
    GLOBAL_BATCH,
    TOLERANCES,
    Combination,
    combinations,
    config_of,
    controller_is_idle,
    failures,
    few_combinations,
    largest_error,
    measure,
    record,
    synthetic_batch,
)
from benchmarks.report import table
from benchmarks.rivals import formulas
from benchmarks.tiny_networks import TinyCritic, TinyGenerator
from ganscale.data.images.preprocessing import to_network_range
from ganscale.objectives.losses import LOSSES
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import PENALTIES
from ganscale.randomness import normal, uniform
from ganscale.runtime import Runtime
from ganscale.training.state import TrainingState

DEADLINE_SECONDS = 600


def test_every_loss_and_penalty_trains_alike_on_one_two_and_four_ranks() -> None:
    rows = measure(few_combinations(), seconds=DEADLINE_SECONDS)
    assert len(rows) > 200
    wrong = failures(rows)
    assert not wrong, f"the worst is {wrong[-1].name}\n{table(wrong[-20:])}"


def test_the_combinations_have_every_loss_and_penalty_in_them() -> None:
    every = {(c.loss, c.penalties) for c in combinations()}
    assert every >= {(loss, penalty) for loss in LOSSES for penalty in PENALTIES}
    few = few_combinations()
    assert {c.loss for c in few} == {c.loss for c in combinations()}
    assert {c.penalties for c in few} == {c.penalties for c in combinations()}
    assert {c.variant for c in few} == {c.variant for c in combinations()}


def test_a_difference_in_one_element_and_a_missing_tensor_are_errors() -> None:
    expected = {"weights": {"large": torch.full((3,), 4.0), "small": torch.zeros(2)}}
    small = torch.tensor([0.0, 0.2])
    found = {"weights": {"large": torch.full((3,), 4.0), "small": small}}
    assert largest_error(expected, expected)[0] == 0
    assert largest_error(found, expected) == (pytest.approx(0.05), "weights: small")
    small[1] = torch.nan
    assert largest_error(found, expected)[0] == torch.inf
    assert largest_error({"weights": {}}, expected)[0] == torch.inf


def test_the_rows_of_the_adaptive_controller_move_the_probability_down_and_up() -> None:
    found = record(config_of(Combination("hinge", "r1", "adaptive"), 1, "float64"), Runtime.start())
    meters = [found[f"meters at {images} images"] for images in (16, 32)]
    assert [each["augment/probability"].item() for each in meters] == [0.5, 0.5]  # from 0.9
    # After 8 images each: 36 of 40 down to 28, to 20, to 12, and up to 20.
    assert [each["augment/sign_rate"].item() for each in meters] == [-0.5, 0.5]


@pytest.mark.parametrize(("target", "start"), [(0.1, 0.1), (0.1, 0.0), (-0.9, 1.0)])
def test_a_probability_that_stays_where_it_is_or_at_0_fails_its_row(
    target: float, start: float
) -> None:
    config = config_of(Combination("hinge", "r1", "adaptive"), 1, "float64")
    assert config.augmentation.adaptive is not None
    assert not controller_is_idle(config, record(config, Runtime.start()))
    config.augmentation.adaptive.target, config.augmentation.probability = target, start
    config.seed = 0 if target > 0 else config.seed  # with which all real logits are negative
    assert controller_is_idle(config, record(config, Runtime.start()))


@pytest.mark.parametrize(
    ("loss", "penalty"), [("wgan", "wgan_gp"), ("non_saturating", "r1"), ("wgan", "none")]
)
def test_one_process_computes_the_published_formulas(loss: str, penalty: str) -> None:
    """Written out: a forward each for real, fake and penalty, one backward, Adam by hand."""
    config = config_of(Combination(loss, penalty), 1, "float64")
    runtime = Runtime.start()
    found = record(config, runtime)
    start = TrainingState(config, build_objective(config.objective), runtime, 0)
    by_hand = WrittenOut(start.critic, start.generator, loss, penalty, config.seed)
    latent_dim = config.generator.latent_dim
    meters: dict[str, list[float]] = {}
    for step in range(2 * config.objective.n_critic):
        batch = synthetic_batch(config, runtime, step * GLOBAL_BATCH)
        real = to_network_range(batch.images).double()
        latents = normal(config.seed, "latents/critic", batch.slots, latent_dim).double()
        for name, value in by_hand.critic_step(real, latents, batch.slots).items():
            meters.setdefault(name, []).append(value)
        images = (step + 1) * GLOBAL_BATCH
        assert_same(by_hand.critic_gradients, found[f"critic gradients at {images} images"])
        if step % config.objective.n_critic == config.objective.n_critic - 1:
            latents = normal(config.seed, "latents/generator", batch.slots, latent_dim).double()
            meters["loss/generator"] = [by_hand.generator_step(latents)]
            of_run = found[f"generator gradients at {images} images"]
            assert_same(by_hand.generator_gradients, of_run)
            logged = found[f"meters at {images} images"]
            for name, values in meters.items():
                assert logged[name].item() == pytest.approx(sum(values) / len(values), rel=1e-10)
            meters = {}
    assert_same(dict(by_hand.critic.named_parameters()), found["critic"])
    assert_same(dict(by_hand.generator.named_parameters()), found["generator"])


class WrittenOut:
    """GAN training as the papers write it, with nothing of the package's objectives or steps."""

    def __init__(
        self, critic: nn.Module, generator: nn.Module, loss: str, penalty: str, seed: int
    ) -> None:
        self.critic = TinyCritic((2, 8, 8)).double()
        self.critic.load_state_dict(critic.state_dict())
        self.generator = TinyGenerator(6, (2, 8, 8)).double()
        self.generator.load_state_dict(generator.state_dict())
        self.loss, self.penalty, self.seed = loss, penalty, seed
        self.moments: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        self.critic_gradients: dict[str, Tensor] = {}
        self.generator_gradients: dict[str, Tensor] = {}

    def critic_step(self, real: Tensor, latents: Tensor, slots: Tensor) -> dict[str, float]:
        with torch.no_grad():
            fake = self.generator(latents)
        of_real, of_fake = self.critic(real), self.critic(fake)
        loss = torch.stack(formulas.LOSSES[self.loss].critic(of_real, of_fake)).sum()
        values = {"loss/critic_adversarial": loss.item()}
        if self.penalty == "wgan_gp":
            share = uniform(self.seed, "interpolation", slots).double()[:, :, None, None]
            penalty = (self.slopes(share * real + (1 - share) * fake).sqrt() - 1).square().mean()
            loss = loss + 10 * penalty
            values["penalty/wgan_gp"] = penalty.item()
        if self.penalty == "r1":
            penalty = self.slopes(real).mean() / 2
            loss = loss + penalty
            values["penalty/r1"] = penalty.item()
        values["loss/critic"] = loss.item()
        self.critic_gradients = self.descend(self.critic, loss)
        return values

    def generator_step(self, latents: Tensor) -> float:
        loss = formulas.LOSSES[self.loss].generator(self.critic(self.generator(latents)), None)
        self.generator_gradients = self.descend(self.generator, loss)
        return loss.item()

    def slopes(self, images: Tensor) -> Tensor:
        """||d D(x) / d x||^2 for each image, one at a time."""
        squares = []
        for image in images:
            image = image[None].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.critic(image).sum(), image, create_graph=True)
            squares.append(slope.square().sum())
        return torch.stack(squares)

    def descend(self, network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        """Adam (Kingma & Ba 2015, algorithm 1) with the settings of the run."""
        rate, beta_1, beta_2, epsilon = 5e-3, 0.5, 0.9, 1e-2
        named = dict(network.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(named.values(), gradients, strict=True):
                zeros = torch.zeros_like(gradient)
                first, second, t = self.moments.get(parameter, (zeros, zeros, 0))
                t += 1
                first = beta_1 * first + (1 - beta_1) * gradient
                second = beta_2 * second + (1 - beta_2) * gradient**2
                self.moments[parameter] = first, second, t
                unbiased = first / (1 - beta_1**t), second / (1 - beta_2**t)
                parameter -= rate * unbiased[0] / (unbiased[1].sqrt() + epsilon)
        return dict(zip(named, gradients, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a hundredth of the tolerance that ranks are held to."""
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name].detach() - tensor).abs().max().item()
        assert difference <= 1e-2 * TOLERANCES["float64"] * scale, name
