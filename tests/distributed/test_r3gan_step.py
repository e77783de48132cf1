"""Training R3GAN is what its paper says (Huang et al. 2024, arXiv:2501.05441), with everything of
its recipe at once: networks, loss, both penalties, fresh real images, augmentation, schedules."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.invariance import (
    GLOBAL_BATCH,
    Combination,
    Record,
    config_of,
    largest_error,
    record,
    synthetic_batch,
    untried_networks,
)
from benchmarks.ranks import run_ranks
from ganscale.augmentation.pipelines import build_pipeline
from ganscale.data.batch import Batch
from ganscale.data.images.preprocessing import to_network_range
from ganscale.networks.r3gan import R3GANCritic, R3GANGenerator
from ganscale.randomness import normal, uniform
from ganscale.runtime import Runtime
from ganscale.schema import Config
from tests.helpers.r3gan_by_hand import images_by_hand, logits_by_hand

STEPS, CLASSES, TOLERANCE = 5, 3, 1e-10
ACCUMULATE = (1, 2)


def five_steps(accumulate: int) -> Config:
    """Of the critic and of the generator in turn, as R3GAN takes them."""
    config = config_of(Combination("relativistic", "r1+r2", "r3gan"), accumulate, "float64")
    config.objective.n_critic = 1
    config.training.total_images = STEPS * GLOBAL_BATCH
    for optimizer in (config.optimizer.critic, config.optimizer.generator):
        optimizer.eps = 1e-6  # so that residual branches, which start at zero, soon matter
    return config


def scheduled(start: float, end: float, seen: int) -> float:
    """Half a cosine over three batches, of the images that the critic has seen by then."""
    progress = min(1, seen / (3 * GLOBAL_BATCH))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class R3GANByHand:
    """Their training loop in plain autograd, on one process and the whole batch; with nothing of
    ganscale but the weights, the random numbers, and the augmentation's operators."""

    def __init__(self, generator: nn.Module, critic: nn.Module, seed: int) -> None:
        assert isinstance(generator, R3GANGenerator)
        assert isinstance(critic, R3GANCritic)
        self.generator, self.critic, self.seed = generator.double(), critic.double(), seed
        self.averaged = {name: p.detach().clone() for name, p in generator.named_parameters()}
        self.moments: dict[Tensor, tuple[Tensor, Tensor, int]] = {}
        strengths = {"blit": 1.0, "geom": 1.0, "color": 0.5, "cutout": 1.0}
        self.pipeline = build_pipeline("ada", strengths, 3)

    def cycle(self, of_critic: Batch, of_generator: Batch, seen: int) -> Record:
        """What `record` finds in a critic step at so many images, a generator step and an update
        of the EMA."""
        found: Record = {}
        real, latents, labels = self.inputs(of_critic, "critic")
        with torch.no_grad():
            fake = images_by_hand(self.generator, latents, labels)
        real.requires_grad_()
        fake.requires_grad_()
        augment = self.augmentation("critic", of_critic.slots, seen)
        real_logits = logits_by_hand(self.critic, augment("real", real), labels)
        fake_logits = logits_by_hand(self.critic, augment("fake", fake), labels)
        # Section 2: relativistic pairing with f(t) = -log(1 + e^-t), and gamma / 2 times R1 and R2.
        adversarial = F.softplus(fake_logits - real_logits).mean()
        r1, r2 = (
            torch.autograd.grad(logits.sum(), images, create_graph=True)[0].square().sum((1, 2, 3))
            for logits, images in ((real_logits, real), (fake_logits, fake))
        )
        loss = adversarial + scheduled(1.0, 0.1, seen) / 2 * (r1.mean() + r2.mean())
        meters = {
            "loss/critic": loss,
            "loss/critic_adversarial": adversarial,
            "penalty/r1": r1.mean() / 2,
            "penalty/r2": r2.mean() / 2,
        }
        gradients = self.descend(self.critic, loss, seen)
        seen += GLOBAL_BATCH
        found[f"critic gradients at {seen} images"] = gradients

        real, latents, labels = self.inputs(of_generator, "generator")
        augment = self.augmentation("generator", of_generator.slots, seen)
        fake = augment("fake", images_by_hand(self.generator, latents, labels))
        fake_logits = logits_by_hand(self.critic, fake, labels)
        real_logits = logits_by_hand(self.critic, augment("real", real), labels)
        loss = F.softplus(real_logits - fake_logits).mean()
        gradients = self.descend(self.generator, loss, seen)
        found[f"generator gradients at {seen} images"] = gradients
        meters["loss/generator"] = loss
        found[f"meters at {seen} images"] = {name: m.detach() for name, m in meters.items()}

        kept = 0.5 ** (GLOBAL_BATCH / min(scheduled(0, 10, seen), seen))
        for name, parameter in self.generator.named_parameters():
            self.averaged[name] = kept * self.averaged[name] + (1 - kept) * parameter.detach()
        return found

    def inputs(self, batch: Batch, step: str) -> tuple[Tensor, Tensor, Tensor]:
        """Real images, half of them mirrored, and latents with the labels of both."""
        real = to_network_range(batch.images).double()
        is_mirrored = uniform(self.seed, "flip", batch.slots) < 0.5
        real = torch.where(is_mirrored.view(-1, 1, 1, 1), real.flip(3), real)
        latents = normal(self.seed, f"latents/{step}", batch.slots, 6).double()
        assert batch.labels is not None
        return real, latents, batch.labels

    def augmentation(self, step: str, slots: Tensor, seen: int) -> Callable[[str, Tensor], Tensor]:
        """T: what the critic sees of real or of fake images in this step."""
        probability = scheduled(0.3, 0.9, seen)

        def augment(kind: str, images: Tensor) -> Tensor:
            purpose = f"augmentation/{step} {kind}"
            numbers = uniform(self.seed, purpose, slots, self.pipeline.columns)
            drawn: Any = {"parameters": self.pipeline.parameters(numbers, probability)}
            return self.pipeline(images, drawn)

        return augment

    def descend(self, network: nn.Module, loss: Tensor, seen: int) -> dict[str, Tensor]:
        """Adam (Kingma & Ba 2015, algorithm 1) with the rate and the betas of this step."""
        rate, first_beta = scheduled(5e-3, 1e-3, seen), scheduled(0.5, 0.0, seen)
        second_beta = scheduled(0.9, 0.99, seen)
        named = dict(network.named_parameters())
        gradients = torch.autograd.grad(loss, [*named.values()])
        with torch.no_grad():
            for parameter, gradient in zip(named.values(), gradients, strict=True):
                zeros = torch.zeros_like(gradient)
                first, second, t = self.moments.get(parameter, (zeros, zeros, 0))
                t += 1
                first = first_beta * first + (1 - first_beta) * gradient
                second = second_beta * second + (1 - second_beta) * gradient**2
                self.moments[parameter] = first, second, t
                first, second = first / (1 - first_beta**t), second / (1 - second_beta**t)
                parameter -= rate * first / (second.sqrt() + 1e-6)
        return dict(zip(named, gradients, strict=True))


@pytest.fixture(scope="module")
def by_hand() -> Record:
    config, runtime = five_steps(1), Runtime.start()
    generator, critic = untried_networks(config, CLASSES, runtime)
    training = R3GANByHand(generator, critic, config.seed)
    found: Record = {}
    for step in range(STEPS):  # each cycle reads two batches
        first = 2 * step * GLOBAL_BATCH
        batches = (synthetic_batch(config, runtime, p) for p in (first, first + GLOBAL_BATCH))
        found |= training.cycle(*batches, seen=step * GLOBAL_BATCH)
    found["critic"] = {n: p.detach() for n, p in training.critic.named_parameters()}
    found["generator"] = {n: p.detach() for n, p in training.generator.named_parameters()}
    return found | {"ema": training.averaged}


@pytest.fixture(scope="module", params=[1, 2], ids=lambda ranks: f"ranks{ranks}")
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of ganscale's steps on that many ranks, by the number of micro-batches."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.distributed.test_r3gan_step:train", folder, request.param, seconds=300)
    return torch.load(folder / "records.pt")


def train(folder: Path) -> None:
    runtime = Runtime.start(timeout_seconds=120)
    found = {accumulate: record(five_steps(accumulate), runtime) for accumulate in ACCUMULATE}
    if runtime.is_main:
        torch.save(found, folder / "records.pt")
    runtime.close()


@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_five_steps_of_r3gan_are_the_papers_formulas_in_plain_autograd(
    by_hand: Record, records: dict[int, Record], accumulate: int
) -> None:
    found = {kind: dict(records[accumulate][kind]) for kind in by_hand}
    for kind, meters in by_hand.items():
        if kind.startswith("meters"):
            found[kind] = {name: found[kind][name] for name in meters}
    error, where = largest_error(found, by_hand)
    assert error < TOLERANCE, where


def test_after_five_steps_no_layer_is_hidden_behind_one_that_starts_at_zero(
    by_hand: Record,
) -> None:
    for kind in ("critic", "generator"):
        gradients = by_hand[f"{kind} gradients at {STEPS * GLOBAL_BATCH} images"]
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-6 * largest, name
