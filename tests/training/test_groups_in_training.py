"""Networks that look at groups of images: whole groups everywhere, or one sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.invariance import Combination, config_of, record
from benchmarks.rivals.formulas import LOSSES
from benchmarks.tiny_networks import TinyStyleGenerator
from ganscale.cli.main import main
from ganscale.errors import OutOfMemoryError, UserError
from ganscale.evaluation.images import GeneratedImages
from ganscale.evaluation.sampling import generate_images, sample_latents
from ganscale.evaluation.truncation import TruncatedGenerator, truncated
from ganscale.metrics.input_gradient_norm import input_gradient_norm_meters
from ganscale.networks.batch_groups import MinibatchStdDev, every_nth_group
from ganscale.networks.fingerprint import fingerprint
from ganscale.networks.styles import check_has_own_gradients
from ganscale.objectives.objective import build_objective
from ganscale.plan.communication import _logit_bytes
from ganscale.plan.device_memory import MemoryPlanner
from ganscale.plan.networks import planned_networks
from ganscale.runtime import Runtime
from ganscale.schema import (
    Config,
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.supervision.progress import Progress
from ganscale.training import step_forwards
from ganscale.training.critic_step import CriticStep
from ganscale.training.flops import count_cycle_flops
from ganscale.training.invariance_checks import check_batch_divides, check_groups
from ganscale.training.memory_shortage import memory_shortage_explained
from ganscale.training.network_updater import NetworkUpdater, NonFiniteGuard
from ganscale.training.state import TrainingState
from tests.helpers.networks import draw
from tests.helpers.runs import Runs
from tests.helpers.users_networks import Generator

GROUPS = Combination("wgan", "wgan_gp", "groups")  # of four images


def critic_of_groups(group_size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        MinibatchStdDev(group_size, features=2),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(64, 1, bias=False),
        nn.Flatten(0),
    ).double()


@pytest.mark.parametrize(("group_size", "micro_batches"), [(1, 2), (1, 3), (3, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_micro_batch_holds_the_same_images_on_every_number_of_ranks(
    group_size, micro_batches, world_size
):
    images = torch.arange(4 * group_size * micro_batches)
    for index in range(micro_batches):
        found = [
            every_nth_group(share, index, micro_batches, group_size)
            for share in images.chunk(world_size)
        ]
        groups = images.view(-1, group_size)
        expected = [group for i, group in enumerate(groups) if i % micro_batches == index]
        assert torch.equal(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("group_size", [1, 2, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_micro_batch_is_a_copy_without_gaps_in_the_memory_format_of_the_batch(group_size, layout):
    images = draw(12, 3, 4, 5).contiguous(memory_format=layout)
    part = every_nth_group(images, 1, 2, group_size)
    assert part.shape == (6, 3, 4, 5)
    assert part.is_contiguous(memory_format=layout)
    assert part.untyped_storage().nbytes() == part.nbytes


WEIGHTS = {"r1": {"r1": 3.0}, "wgan_gp": {"wgan_gp": 10.0}, "both": {"r1": 2.0, "r2": 3.0}}


@pytest.mark.parametrize("saves_launches", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("penalties", WEIGHTS)
@pytest.mark.parametrize("loss", ["non_saturating", "relativistic_average"])
def test_a_critic_of_groups_has_the_update_of_the_whole_batch_in_plain_autograd(
    runtime, monkeypatch, loss, penalties, accumulate, saves_launches
):
    monkeypatch.setattr(step_forwards, "has_cheap_launches", lambda device: not saves_launches)
    weights = WEIGHTS[penalties]
    config = {name: PenaltyConfig(weight) for name, weight in weights.items()}
    built = build_objective(ObjectiveConfig(LossConfig(loss), config))
    critic, by_hand = critic_of_groups(2), critic_of_groups(2)
    real, fake, between = (draw(12, 3, 4, 4, seed=seed) for seed in (1, 2, 3))
    points = {"r1": real, "r2": fake, "wgan_gp": between}
    points = {name: points[name] for name in config}
    inputs = {"real_images": real, "fake_images": fake, "labels": None, "points": points}
    updater = NetworkUpdater(
        "critic",
        CriticStep(critic, built, "float64"),
        critic,
        OptimizerConfig("sgd", 0.0),
        TrainingConfig(1000, accumulate=accumulate),
        runtime,
        NonFiniteGuard(runtime.device),
        group_size=2,
    )
    found = updater.update(inputs, 0)

    logits = by_hand(real), by_hand(fake)
    value = torch.stack(LOSSES[loss].critic(*logits)).sum()
    for name, at in points.items():
        at = at.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(by_hand(at).sum(), at, create_graph=True)
        square = slopes.square().sum((1, 2, 3))
        penalty = (square.sqrt() - 1).square() if name == "wgan_gp" else square / 2
        value = value + weights[name] * penalty.mean()
        norms = found.norms[f"penalty/{name}_gradient_norm"]
        torch.testing.assert_close(norms, square.sqrt().detach(), rtol=1e-10, atol=1e-12)
    value.backward()
    for parameter, other in zip(critic.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10)
    for each, expected in zip(found.logits.values(), logits, strict=True):
        torch.testing.assert_close(each, expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_penalty_sees_what_an_image_does_to_its_group_and_nothing_beyond():
    critic, images = critic_of_groups(2), draw(6, 3, 4, 4)
    jacobian = torch.autograd.functional.jacobian(critic, images)
    assert isinstance(jacobian, Tensor)
    effects = jacobian.flatten(2).any(2)
    assert torch.equal(effects, torch.block_diag(*[torch.ones(2, 2)] * 3).bool())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_norm_of_the_input_gradient_is_that_of_whole_groups(micro_batches):
    critic, images = critic_of_groups(2), draw(8, 3, 4, 4).requires_grad_()
    (slopes,) = torch.autograd.grad(critic(images).sum(), images)
    expected = slopes.flatten(1).norm(dim=1)
    means, maxima = input_gradient_norm_meters(
        critic, images.detach(), None, "float64", micro_batches
    )
    assert means["input_gradient_norm/real_mean"].item() == pytest.approx(expected.mean().item())
    assert maxima["input_gradient_norm/real_max"].item() == pytest.approx(expected.max().item())


def training(batch: int, accumulate: int) -> TrainingConfig:
    return TrainingConfig(total_images=1000, global_batch_size=batch, accumulate=accumulate)


def test_a_share_that_is_not_made_of_groups_is_refused_with_all_that_would_do():
    for batch, accumulate, ranks in ((32, 2, 4), (32, 1, 8), (24, 3, 2), (24, 1, 3)):
        check_batch_divides(training(batch, accumulate), ranks, 4)
    with pytest.raises(UserError) as refusal:
        check_batch_divides(training(48, 2), 4, 4)
    assert str(refusal.value) == (
        "`training.global_batch_size` of 48 cannot be divided evenly among 4 ranks of 2 "
        "micro-batches of whole groups of 4 images: choose 32 or 64; or, with this batch, 3 or 6 "
        "ranks; or training.accumulate=1 or 3"
    )
    for batch, accumulate, ranks in ((32, 2, 4), (64, 2, 4), (48, 2, 3), (48, 2, 6), (48, 3, 4)):
        check_batch_divides(training(batch, accumulate), ranks, 4)
    with pytest.raises(UserError, match=r"among 1 rank of 1 micro-batch of whole .*: choose 4$"):
        check_batch_divides(training(2, 1), 1, 4)
    with pytest.raises(UserError, match=r"choose 24; or, with this batch, 1 rank$"):
        check_batch_divides(training(12, 3), 2, 4)


SETTINGS = (
    "critic.target=benchmarks.tiny_networks:TinyCritic",
    "critic.options={group_size: 4}",
    "generator.target=benchmarks.tiny_networks:TinyGenerator",
    "generator.options={}",
    "data.resolution=8",
    "training.global_batch_size=12",
)
SENTENCE = (
    "error: `training.global_batch_size` of 12 cannot be divided evenly among 2 ranks of 1 "
    "micro-batch of whole groups of 4 images: choose 8 or 16; or, with this batch, 1 or 3 "
)


def test_a_dry_run_and_a_plan_refuse_a_share_that_is_not_made_of_groups(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = runs.settings("new", *SETTINGS)
    with monkeypatch.context() as as_rank:
        as_rank.setenv("WORLD_SIZE", "2")
        as_rank.setenv("RANK", "0")
        assert main(["train", "--dry-run", *settings]) == 2
    assert capsys.readouterr().err == f"rank 0: {SENTENCE}ranks\n"
    assert main(["plan", "--nodes", "2", *settings]) == 2
    assert capsys.readouterr().err == f"{SENTENCE}nodes of 1\n"
    assert main(["plan", "--nodes", "3", *settings]) == 0
    assert main(["train", "--dry-run", *settings]) == 0


def test_two_ranks_refuse_it_together_and_others_train(runs: Runs) -> None:
    refused = runs.finish("new", *SETTINGS, ranks=2, exit_code=2)
    assert f"{SENTENCE}ranks" in refused
    trained = "training.global_batch_size=16", "training.accumulate=2", "training.total_images=64"
    runs.finish("new", *SETTINGS, *trained, ranks=2)


@pytest.fixture
def pairs() -> nn.Module:
    """A generator whose images depend on their neighbours."""
    torch.manual_seed(0)
    return Generator(6, (2, 8, 8), "pairs")


def test_samples_and_evaluations_are_made_of_the_generators_groups(pairs: nn.Module) -> None:
    def check(samples: dict[str, int], evaluation: dict[str, int]) -> None:
        config = config_of(GROUPS, 1, "float32")
        for section, settings in ((config.samples, samples), (config.evaluation, evaluation)):
            for name, value in settings.items():
                setattr(section, name, value)
        check_groups(config, pairs, nn.Identity(), 1)

    check({"count": 6}, {"samples": 9})  # there are no evaluations
    sentence = "samples.count of 7 is not a whole number of the groups of 2 images that Generator"
    with pytest.raises(UserError, match=f"{sentence} looks at: choose 6 or 8"):
        check({"count": 7}, {})
    with pytest.raises(UserError, match=r"evaluation\.samples of 9 is not a whole number"):
        check({}, {"every_images": 1, "samples": 9})
    with pytest.raises(UserError, match=r"evaluation\.batch_size of 1 is .*: choose 2"):
        check({}, {"every_images": 1, "batch_size": 1})


def test_a_sample_of_a_group_is_the_same_in_any_request_of_whole_groups(pairs: nn.Module) -> None:
    def images(count: int) -> Tensor:
        return torch.cat([*generate_images(pairs, sample_latents(0, 0, count, 6))])

    whole = pairs(sample_latents(0, 0, 34, 6))
    for count in (2, 16, 34):
        torch.testing.assert_close(images(count), whole[:count], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="the number of samples of 5 is not a whole number"):
        images(5)
    evaluated = GeneratedImages(pairs, 0, 34, 6, None)
    assert len(evaluated.chunk(range(4, 10)).images) == 6
    with pytest.raises(UserError, match=r"evaluation\.batch_size of 5 is not"):
        evaluated.chunk(range(5))
    with pytest.raises(UserError, match=r"evaluation\.samples of 33 is not"):
        GeneratedImages(pairs, 0, 33, 6, None)


def test_a_generators_chunk_holds_whole_groups_of_a_size_that_16_does_not_divide() -> None:
    generator, seen = nn.Linear(6, 2), []
    generator.batch_group_size = 6  # type: ignore[assignment]
    generator.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    chunks = [*generate_images(generator, sample_latents(0, 0, 24, 6))]
    assert [len(chunk) for chunk in chunks] == [18, 6]
    assert seen == [18, 18]


def test_a_fingerprint_is_of_whole_groups_and_sees_a_change_of_what_they_do() -> None:
    seen: list[int] = []

    def of(critic: nn.Module, classes: int = 0) -> Any:
        critic.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        return fingerprint(critic, (3, 4, 4), classes, is_critic=True)

    alone, pairs, same, fours, threes = (of(critic_of_groups(n)) for n in (1, 2, 2, 4, 3))
    assert seen == [4, 4, 4, 4, 6]
    assert pairs.is_close(same)
    assert not pairs.is_close(alone)
    assert not pairs.is_close(fours)
    assert not pairs.is_close(threes)


def state_of_groups(config: Config, runtime: Runtime) -> TrainingState:
    return TrainingState(config, build_objective(config.objective), runtime, 3)


def test_operations_of_groups_are_counted(runtime: Runtime) -> None:
    """A deviation counts as nothing; the next convolution has a channel more."""
    counts = []
    for options in ({"group_size": 4}, {}):
        config = config_of(GROUPS, 1, "float32")
        config.critic.options = options
        state = state_of_groups(config, runtime)
        networks = build_objective(config.objective), state.generator, state.critic
        counts.append(count_cycle_flops(config, *networks, 3))
    with_groups, without = counts
    assert with_groups is not None
    assert without is not None
    assert without < with_groups < 1.3 * without


def test_planned_batches_are_multiples_of_micro_batches_of_whole_groups() -> None:
    config = config_of(GROUPS, 2, "float32")
    planner = MemoryPlanner(config, build_objective(config.objective), 3, ranks=1)
    section = planner.section(None)
    assert all(images % 8 == 0 for images in section.images_per_rank_on.values())
    assert list(section.peak_bytes_with_accumulate) == [4, 8]


def test_a_plan_knows_the_map_of_logits_of_a_critic_of_groups() -> None:
    config = config_of(Combination("relativistic_average", "none"), 1, "float32")
    config.critic.options = {"group_size": 4, "patches": True}
    _, critic = planned_networks(config, 0)
    assert _logit_bytes(config, critic) == 4 * 2 * 2


class StylesOfGroups(TinyStyleGenerator):
    """Whose synthesis takes whole groups of four."""

    batch_group_size = 4

    def synthesis(self, styles: Tensor) -> Tensor:
        return MinibatchStdDev(4)(super().synthesis(styles))[:, :-1]


def test_a_generator_of_groups_is_truncated_but_has_no_path_length_of_each_image() -> None:
    generator = StylesOfGroups(6, (2, 8, 8))
    network = truncated(generator, 0.5, 0, 6, None)
    (images,) = generate_images(network, sample_latents(0, 0, 8, 6))
    assert images.shape == (8, 2, 8, 8)
    with pytest.raises(UserError, match="the generator looks at groups of 4 images"):
        check_has_own_gradients(generator, "path length")


class StylesOfThree(TinyStyleGenerator):
    """Whose styles take whole groups of three."""

    batch_group_size = 3

    def styles(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        groups = super().styles(latents, labels).unflatten(0, (-1, 3))
        return (groups - groups.mean(1, keepdim=True)).flatten(0, 1)


def test_mean_styles_are_those_of_whole_groups() -> None:
    network = truncated(StylesOfThree(6, (2, 8, 8)), 0.5, 0, 6, None)
    assert isinstance(network, TruncatedGenerator)
    assert network.means.abs().max() < 1e-6


def test_out_of_memory_is_advised_against_with_micro_batches_of_whole_groups(
    runtime: Runtime,
) -> None:
    shared = training(24, 1), runtime, Progress()
    with (
        pytest.raises(OutOfMemoryError, match=r"training\.accumulate=2, for 12 images"),
        memory_shortage_explained(*shared, group_size=4),
    ):
        raise MemoryError
    with (
        pytest.raises(OutOfMemoryError, match=r"training\.accumulate=3, for 8 images"),
        memory_shortage_explained(*shared, group_size=8),
    ):
        raise MemoryError


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_of_groups_logs_the_same_in_either_memory_format_and_in_mixed_precision(
    runtime: Runtime, layout: str, precision: str
) -> None:
    def losses(change: Callable[[Config], None]) -> list[float]:
        config = config_of(Combination("wgan", "r1", "groups"), 2, "float32")
        change(config)
        found = record(config, runtime, tries_networks=True)
        return [row["loss/critic"].item() for kind, row in found.items() if kind[0] == "m"]

    def change(config: Config) -> None:
        config.training.memory_format, config.training.precision = layout, precision

    tolerance = 1e-5 if precision == "float32" else 0.05
    assert losses(change) == pytest.approx(losses(lambda config: None), rel=tolerance)
