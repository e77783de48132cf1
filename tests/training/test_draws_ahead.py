"""Random numbers that a loader makes ahead train a network as those made when they are needed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ganscale import randomness
from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import PENALTIES
from ganscale.randomness import draw_together
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle
from ganscale.training.device_batch import draws_ahead
from ganscale.training.state import TrainingState
from tests.helpers.processes import REPOSITORY

BATCH, CRITIC_STEPS = 4, 2


def config_of(*settings: str) -> Config:
    common = (
        str(REPOSITORY / "configs" / "resnet32.yaml"),
        "generator.target=dcgan",
        "critic.target=dcgan",
        "generator.options.width=4",
        "critic.options.width=4",
        f"objective.n_critic={CRITIC_STEPS}",
        f"training.global_batch_size={BATCH}",
    )
    return resolve([*common, *settings]).config


def batches_of(config: Config, are_ahead: bool) -> list[Batch]:
    images = torch.randint(0, 256, (CRITIC_STEPS, BATCH, 32, 32, 3), dtype=torch.uint8)
    slots = torch.arange(CRITIC_STEPS * BATCH).view(CRITIC_STEPS, BATCH)
    batches = [Batch(*each) for each in zip(images, slots, slots, strict=True)]
    if not are_ahead:
        return batches
    draws = draws_ahead(config, build_objective(config.objective))
    return [replace(b, draws=draw_together(draws, config.seed, b.slots)) for b in batches]


def after_a_cycle(config: Config, runtime: Runtime, are_ahead: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, num_classes=0)
    Cycle(config, objective, runtime, state).run(batches_of(config, are_ahead), is_logged=True)
    return state.audited()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("training.reuse_fakes=true",),
        ("training.accumulate=2",),
        ("augmentation=ada", "augmentation.probability=0.5", "objective.loss.name=relativistic"),
    ],
    ids=str,
)
def test_draws_made_ahead_change_no_bit(
    runtime: Runtime, penalty: str, settings: tuple[str, ...]
) -> None:
    config = config_of(f"objective.penalties.{penalty}.weight=1", "data.flip=true", *settings)
    expected = after_a_cycle(config, runtime, are_ahead=False)
    found = after_a_cycle(config, runtime, are_ahead=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_cycle_whose_draws_were_made_ahead_draws_nothing_itself(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("data.flip=true", "augmentation=ada", "augmentation.probability=0.5")
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, num_classes=0)
    batches, drawn = batches_of(config, are_ahead=True), []
    philox = randomness.philox
    monkeypatch.setattr(randomness, "philox", lambda *given: drawn.append(1) or philox(*given))
    Cycle(config, objective, runtime, state).run(batches, is_logged=False)
    assert not drawn
