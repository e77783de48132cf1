"""The path length penalty trains by the published equation, written out here in float64."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from benchmarks.invariance import (
    CLASSES,
    Combination,
    config_of,
    gradients,
    synthetic_batch,
    untried_networks,
)
from benchmarks.rivals import formulas
from ganscale.config import resolve
from ganscale.errors import UserError
from ganscale.objectives.generator_penalties import GeneratorPenalty, images_and_path_lengths
from ganscale.objectives.objective import build_objective
from ganscale.random import drawing, normal_like
from ganscale.randomness import normal
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule
from ganscale.schema import Config, GeneratorConfig, GeneratorPenaltyConfig
from ganscale.training.cycle import Cycle
from ganscale.training.metrics_row import metrics_row
from ganscale.training.network_setup import build_networks
from ganscale.training.state import TrainingState
from tests.helpers.networks import draw
from tests.helpers.runs import TINY

WEIGHT, INTERVAL, DECAY, STEPS = 2.0, 2, 0.1, 5


def path_config(accumulate: int = 1, precision: str = "float64", **changes: Any) -> Config:
    """A conditional run of the tiny generator with styles."""
    config = config_of(Combination("non_saturating", "none", "path_length"), accumulate, precision)
    penalty = GeneratorPenaltyConfig(WEIGHT, INTERVAL, DECAY)
    config.objective.generator_penalties = {"path_length": replace(penalty, **changes)}
    return config


def cycle_of(config: Config, runtime: Runtime, generator: nn.Module | None = None) -> Cycle:
    objective = build_objective(config.objective)
    networks = untried_networks(config, CLASSES, runtime)
    networks = (generator or networks[0], networks[1])
    return Cycle(config, objective, runtime, TrainingState(config, objective, runtime, 3, networks))


def run_cycle(cycle: Cycle, *, is_logged: bool = False) -> dict[str, Tensor]:
    steps, seen = range(cycle.config.objective.n_critic), cycle.state.images_seen
    batches = [synthetic_batch(cycle.config, cycle.runtime, seen + 8 * step) for step in steps]
    return cycle.run(batches, is_logged=is_logged)


class WrittenOut:
    """Karras et al. 2020 (arXiv:1912.04958), equation 4, one image at a time."""

    def __init__(self) -> None:
        self.average = 0.0
        self.parts: list[dict[str, float]] = []

    def generator_gradients(
        self, generator: nn.Module, critic: nn.Module, cycle: Cycle, step: int, weight: float
    ) -> dict[str, Tensor]:
        """Of the step for the last batch of the cycle, weighted with `weight`."""
        seen, seed = cycle.state.images_seen, cycle.config.seed
        batch = synthetic_batch(cycle.config, cycle.runtime, seen - 8)
        latents = normal(seed, "latents/generator", batch.slots, 6).double()
        labels = batch.labels
        scores = critic(generator(latents, labels), labels)
        adversarial = formulas.LOSSES["non_saturating"].generator(scores, None)
        loss, parts = adversarial, {"adversarial": adversarial.item()}
        if step % INTERVAL == 0:
            with drawing(seed, ("path length",), batch.slots):
                noise = normal_like(torch.zeros(8, 2, 8, 8).double(), "noise") / 8
            lengths = torch.stack(
                [self.length(generator, *one) for one in zip(latents, labels, noise, strict=True)]
            )
            penalty = (lengths - self.average).square().mean()
            self.average += DECAY * (lengths.mean().item() - self.average)
            loss = loss + weight * INTERVAL * penalty
            parts |= {"penalty": penalty.item(), "lengths": lengths.mean().item()}
        self.parts.append({**parts, "loss": loss.item()})
        named = dict(generator.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))

    @staticmethod
    def length(generator: Any, latent: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        styles = generator.styles(latent[None], label[None])
        product = (generator.synthesis(styles)[0] * noise).sum()
        (gradient,) = torch.autograd.grad(product, styles, create_graph=True)
        return gradient[0].square().sum(1).mean().sqrt()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weight", [WEIGHT, Schedule(2.0, 0.0, 100, "linear")])
def test_five_steps_are_those_of_the_equation(runtime, accumulate, weight):
    cycle, by_hand = cycle_of(path_config(accumulate, weight=weight), runtime), WrittenOut()
    state = cycle.state
    for step in range(STEPS):
        before = copy.deepcopy(state.generator)
        run_cycle(cycle)
        factor = weight.at(state.images_seen) if isinstance(weight, Schedule) else weight
        expected = by_hand.generator_gradients(before, state.critic, cycle, step, factor)
        close(gradients(state.generator), expected)
        close(state.mean_lengths.state_dict(), {"path_length": by_hand.average})
    row, parts = metrics_row(state, runtime, 1000, {}), by_hand.parts
    due = parts[::INTERVAL]

    def mean(steps: list[dict[str, float]], name: str) -> float:
        return sum(each[name] for each in steps) / len(steps)

    close(row["loss/generator"], mean(parts, "loss"))
    close(row["loss/generator_adversarial"], mean(parts, "adversarial"))
    close(row["penalty/path_length"], mean(due, "penalty"))
    close(row["penalty/path_length_gradient_norm"], mean(due, "lengths"))
    close(row["penalty/path_length_average"], by_hand.average)
    terms = row["loss/generator_adversarial"] + row["loss/generator_penalty_path_length"]
    assert terms == pytest.approx(row["loss/generator"], rel=1e-14)
    if isinstance(weight, Schedule):
        close(row["penalty/path_length_weight"], weight.at(state.images_seen))


def test_the_length_is_that_of_the_jacobian_times_the_noise(runtime):
    generator: Any = untried_networks(path_config(), CLASSES, runtime)[0].double()
    latents, noise, labels = draw(3, 6), draw(3, 2, 8, 8, seed=1), torch.tensor([0, 1, 2])
    inputs = latents, labels, noise, "float64"
    images, lengths = images_and_path_lengths(generator, *inputs)
    close(images, generator(latents, labels))
    for index, styles in enumerate(generator.styles(latents, labels)):
        by_styles: Any = jacobian(generator.synthesis, styles[None])
        by_styles = by_styles[0, ..., 0, :, :]
        product = by_styles.permute(3, 4, 0, 1, 2).flatten(2) @ noise[index].flatten()
        close(lengths[index], product.square().sum(1).mean().sqrt())


def test_a_stored_average_goes_on_to_the_bit_and_a_new_penalty_starts_from_zero(runtime):
    config = path_config(interval=1)
    whole = cycle_of(config, runtime)
    for _ in range(2):
        run_cycle(whole)
    stored = whole.state.numbers()["mean_lengths"]
    assert stored["path_length"] > 0
    again = cycle_of(config, runtime).state.mean_lengths
    again.load_state_dict(stored)
    assert again.state_dict() == stored
    again.load_state_dict({"another": 1.0})
    assert again.state_dict() == stored
    assert cycle_of(config, runtime).state.mean_lengths.state_dict() == {"path_length": 0.0}


def test_an_update_that_is_skipped_leaves_the_average_as_it_was(runtime):
    cycle = cycle_of(path_config(interval=1), runtime)
    run_cycle(cycle)
    before = cycle.state.mean_lengths.state_dict()
    with torch.no_grad():
        cycle.state.critic_updater.parameters[0].fill_(torch.nan)
    run_cycle(cycle)
    assert cycle.state.non_finite_guard.has_tripped()
    assert cycle.state.mean_lengths.state_dict() == before


class Counting(nn.Module):
    """A generator that notes the dtype and gradients of each forward."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator: Any = generator
        self.seen: list[tuple[int, torch.dtype]] = []

    def styles(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.generator.styles(latents, labels)

    def synthesis(self, styles: Tensor) -> Tensor:
        images = self.generator.synthesis(styles)
        if torch.is_grad_enabled():
            self.seen.append((len(images), images.dtype))
        return images

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.synthesis(self.styles(latents, labels))


@pytest.mark.parametrize(
    ("precision", "penalty_precision", "forwards"),
    [
        ("float32", "float32", [torch.float32]),
        ("bfloat16", "autocast", [torch.bfloat16]),
        ("bfloat16", "float32", [torch.float32, torch.bfloat16]),
    ],
)
def test_the_penalty_takes_the_forward_of_the_loss_unless_its_precision_is_another(
    runtime, precision, penalty_precision, forwards
):
    """All images of the batch have one; and every second step has none."""
    config = path_config(precision=precision)
    config.training.penalty_precision = penalty_precision
    generator = Counting(untried_networks(config, CLASSES, runtime)[0])
    cycle = cycle_of(config, runtime, generator)
    run_cycle(cycle)
    assert generator.seen == [(8, dtype) for dtype in forwards]
    run_cycle(cycle)
    assert generator.seen[len(forwards) :] == [(8, forwards[-1])]


def test_in_bfloat16_a_penalty_in_float32_has_the_lengths_of_float32(runtime):
    lengths = {}
    for precision in ("float32", "bfloat16"):
        cycle = cycle_of(path_config(precision=precision), runtime)
        run_cycle(cycle)
        lengths[precision] = cycle.state.mean_lengths.state_dict()["path_length"]
    assert lengths["bfloat16"] == pytest.approx(lengths["float32"], rel=1e-6)


def test_a_generator_whose_mapping_is_not_trained_has_a_path_length(runtime):
    generator: Any = untried_networks(path_config(), CLASSES, runtime)[0].double()
    inputs = torch.ones(2, 6).double(), torch.tensor([0, 1]), torch.ones(2, 2, 8, 8).double()
    expected = images_and_path_lengths(generator, *inputs, "float64")
    for parameter in (*generator.mapping.parameters(), *generator.classes.parameters()):
        parameter.requires_grad_(False)
    close(images_and_path_lengths(generator, *inputs, "float64"), expected)


class WithStyles(nn.Module):
    """As users may write them: `kind` says what is wrong."""

    def __init__(self, latent_dim: int, sample_shape: tuple[int, ...], kind: str = "") -> None:
        super().__init__()
        self.kind, self.sample_shape = kind, sample_shape
        self.mapping = nn.Linear(latent_dim, 5)
        self.layer = nn.Linear(5, torch.Size(sample_shape).numel())
        self.norm = nn.BatchNorm1d(5) if kind == "batch norm" else nn.Identity()
        if kind != "no styles":
            self.styles = self._failing if kind == "fails" else self._styles
        if kind != "no synthesis":
            self.synthesis = self._synthesis

    def _styles(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        styles = self.mapping(latents)
        return styles if self.kind == "two dimensions" else styles[:, None]

    def _failing(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        raise ValueError("no such style")

    def _synthesis(self, styles: Tensor) -> Tensor:
        values = self.layer(self.norm(styles.flatten(1)).sin())
        if self.kind == "no second derivative":
            values = values + torch.cdist(values[:, None], torch.ones_like(values)[:, None]).mean(1)
        if self.kind == "silent":
            values = _WithoutGraph.apply(values)
        return values.tanh().view(-1, *self.sample_shape)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images = self._synthesis(self._styles(latents).view(-1, 1, 5))
        return images.flip(-1) if self.kind == "other forward" else images


class _WithoutGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.from_numpy(ctx.saved_tensors[0].detach().cos().numpy())


REFUSALS = {
    "no styles": "path_length` needs a generator that gives its styles: WithStyles has no method "
    "`styles`",
    "no synthesis": "WithStyles has no method `synthesis`",
    "batch norm": "layer `norm` is a batch norm, which ties the images of a batch together",
    "two dimensions": r"styles returns \(4, 5\) for a batch of 4: it must be a tensor of \(batch",
    "fails": "fails in its styles: ValueError: no such style",
    "other forward": r"makes other images in its forward than in synthesis\(styles\(latents",
    "no second derivative": "a gradient penalty differentiates it twice",
    "silent": "the gradient penalty of generator .* would have a wrong gradient",
}


def build(kind: str, penalties: Mapping[str, GeneratorPenaltyConfig]) -> None:
    config = path_config(precision="float32")
    config.generator = GeneratorConfig(f"{__name__}:WithStyles", 6, {"kind": kind})
    config.objective.generator_penalties = dict(penalties)
    config.training.conditional = False
    objective = build_objective(config.objective)
    build_networks(config, objective, 0, torch.device("cpu"))


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_generator_that_cannot_have_a_path_length_is_refused_with_the_reason(kind):
    penalties = {"path_length": GeneratorPenaltyConfig(2.0)}
    build("", penalties)
    with pytest.raises(UserError, match=REFUSALS[kind]):
        build(kind, penalties)


@pytest.mark.parametrize("kind", ["no styles", "batch norm"])
def test_a_penalty_of_weight_zero_needs_nothing(kind):
    build(kind, {"path_length": GeneratorPenaltyConfig(0.0)})


def test_fakes_may_be_reused_beside_a_penalty_of_weight_zero():
    settings = ["objective.generator_penalties.path_length=0", "training.reuse_fakes=true"]
    resolve([*TINY, "data.path=x", *settings])


def constant_length() -> GeneratorPenalty:
    return GeneratorPenalty(lambda lengths, _: (lengths - 1).square().mean())


def test_a_penalty_of_ones_own_is_taken_beside_ours(runtime):
    config, own = path_config(interval=1), f"{__name__}:constant_length"
    config.objective.generator_penalties[own] = GeneratorPenaltyConfig(3.0)
    cycle = cycle_of(config, runtime)
    run_cycle(cycle)
    row = metrics_row(cycle.state, runtime, 1000, {})
    mean, deviation = (row[f"penalty/{own}_gradient_norm{end}"] for end in ("", "_std"))
    assert row[f"penalty/{own}"] == pytest.approx((mean - 1) ** 2 + deviation**2, rel=1e-9)
    assert row[f"loss/generator_penalty_{own}"] == pytest.approx(3 * row[f"penalty/{own}"])
    terms = [v for k, v in row.items() if k.startswith("loss/generator_penalty_")]
    assert row["loss/generator_adversarial"] + sum(terms) == pytest.approx(row["loss/generator"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["objective.generator_penalties.pathlength=2"],
            r"unknown penalty of the generator 'pathlength' \(did you mean 'path_length'\?\)",
        ),
        (
            ["objective.generator_penalties.path_length=2", "training.reuse_fakes=true"],
            "`training.reuse_fakes` must be false with objective.generator_penalties",
        ),
        (
            ["objective.generator_penalties.path_length={weight: 2, decay: 0}"],
            "`objective.generator_penalties.path_length.decay` must be above 0, not 0",
        ),
        (
            ["objective.generator_penalties.path_length={weight: 2, intervall: 4}"],
            "intervall.*interval",
        ),
        (["objective.generator_penalties.path_length={interval: 4}"], "weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build_objective(resolve([*TINY, "data.path=x", *settings]).config.objective)
