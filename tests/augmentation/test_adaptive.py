"""The controller of the probability follows the sign of real logits, in whole numbers."""

import json
from dataclasses import replace

import pytest
import torch

from ganscale.augmentation.adaptive import AdaptiveProbability
from ganscale.errors import UserError
from ganscale.objectives.losses import build_loss
from ganscale.runtime import Runtime
from ganscale.schema import AdaptiveConfig
from ganscale.training.augmentation import _check_sign_has_a_meaning

BATCH = 64
SETTINGS = AdaptiveConfig(target=0.6, every_images=256, full_images=10_000)


def controller(
    runtime: Runtime, start: float = 0.0, full_images: int = 10_000
) -> AdaptiveProbability:
    settings = replace(SETTINGS, full_images=full_images)
    return AdaptiveProbability(settings, start, runtime, torch.zeros(()))


def logits_of(negative: int, batch: int = BATCH) -> torch.Tensor:
    logits = torch.rand(batch) + 0.1
    logits[:negative] *= -1
    return logits


def test_the_probability_moves_by_the_images_since_the_last_adjustment(runtime: Runtime) -> None:
    held = controller(runtime)
    found = []
    for step in range(1, 9):
        held.observe(logits_of(negative=0), step * BATCH)
        found.append(held.probability().item())
    assert found == [0, 0, 0, 0.0256, 0.0256, 0.0256, 0.0256, 0.0512]
    assert held.metrics() == {"augment/sign_rate": 1.0}
    for step in range(9, 13):
        held.observe(logits_of(negative=20), step * BATCH)
    assert held.probability().item() == 0.0256
    assert held.metrics()["augment/sign_rate"] == pytest.approx(1 - 2 * 20 / 64)


def test_the_probability_stays_between_zero_and_one(runtime: Runtime) -> None:
    held = controller(runtime, start=0.99)
    for step in range(1, 9):
        held.observe(logits_of(negative=0), step * BATCH)
    assert held.probability().item() == 1
    held = controller(runtime, start=0.01)
    for step in range(1, 9):
        held.observe(logits_of(negative=64), step * BATCH)
    assert held.probability().item() == 0


def test_batches_above_the_interval_adjust_at_every_step(runtime: Runtime) -> None:
    held = controller(runtime)
    for step in range(1, 4):
        held.observe(logits_of(negative=0, batch=1000), step * 1000)
        assert held.probability().item() == step / 10


def test_a_critic_that_overfits_less_with_augmentation_is_held_at_the_target(
    runtime: Runtime,
) -> None:
    """Signs whose mean falls from 1 to 0 as the probability rises: the target is met at 0.4."""
    torch.manual_seed(0)
    held, rates = controller(runtime), []
    for step in range(1, 2001):
        is_positive = torch.rand(BATCH) < 1 - held.probability().item() / 2
        held.observe(torch.where(is_positive, 1.0, -1.0), step * BATCH)
        if step > 500:
            rates.append(held.probability().item())
    assert sum(rates) / len(rates) == pytest.approx(0.4, abs=0.03)
    assert max(rates) < 0.65
    assert min(rates) > 0.2


@pytest.mark.parametrize("steps", [5, 8])
def test_a_stored_controller_continues_with_the_same_bits(runtime: Runtime, steps: int) -> None:
    whole, stopped = controller(runtime), controller(runtime)
    for step in range(1, steps + 1):
        for each in (whole, stopped):
            each.observe(logits_of(negative=step), step * BATCH)
    stored = json.loads(json.dumps(stopped.state_dict()))
    resumed = controller(runtime)
    resumed.load_state_dict(stored)
    for step in range(steps + 1, 20):
        for each in (whole, resumed):
            each.observe(logits_of(negative=step), step * BATCH)
        assert torch.equal(whole.probability(), resumed.probability())
    assert whole.state_dict() == resumed.state_dict()


def test_a_controller_that_is_added_to_a_run_starts_from_there(runtime: Runtime) -> None:
    held = controller(runtime)
    held.load_state_dict(None)
    held.observe(logits_of(negative=0), 4064)
    assert held.probability().item() == 0
    held.observe(logits_of(negative=0), 4128)
    assert held.probability().item() == 128 / 10_000


def test_other_full_images_keep_the_probability_of_a_resumed_run(runtime: Runtime) -> None:
    stored = controller(runtime, start=0.5).state_dict()
    for full_images in (2_000, 500_000):
        resumed = controller(runtime, full_images=full_images)
        resumed.load_state_dict(stored)
        assert resumed.probability().item() == 0.5


def test_nothing_is_observed_from_the_first_skipped_update_on(runtime: Runtime) -> None:
    """As on a GPU, where a NaN is noticed some cycles later: the state is that before it."""
    tripped = torch.zeros(())
    held = AdaptiveProbability(SETTINGS, 0.0, runtime, tripped)
    for step in range(1, 7):
        held.observe(logits_of(negative=20), step * BATCH)
    before = held.state_dict()
    assert before["counts"] == [2 * (BATCH - 40), 2 * BATCH, 2 * BATCH]
    tripped.fill_(1)
    for step in range(7, 14):
        held.observe(torch.full((BATCH,), torch.nan), step * BATCH)
    assert held.state_dict() == before


def test_patches_and_logits_of_zero_count_as_the_paper_s_mean_of_signs(runtime: Runtime) -> None:
    held = controller(runtime)
    logits = torch.tensor([[[1.0, 0.0], [-2.0, 3.0]], [[0.0, 0.0], [0.5, 0.5]]])
    held.observe(logits, 256)
    assert held.metrics()["augment/sign_rate"] == logits.sign().mean().item()


@pytest.mark.parametrize(
    ("name", "options", "has_meaning"),
    [
        ("minimax", {}, True),
        ("non_saturating", {"smoothing": 0.1}, True),
        ("hinge", {}, True),
        ("lsgan", {"a": -1.0, "b": 1.0, "c": 0.0}, True),
        ("lsgan", {}, False),
        ("wgan", {}, False),
        ("relativistic", {}, False),
        ("relativistic_average", {}, False),
    ],
)
def test_losses_for_which_the_sign_means_nothing_are_refused(
    name: str, options: dict[str, float], has_meaning: bool
) -> None:
    loss = build_loss(name, options)
    if has_meaning:
        _check_sign_has_a_meaning(name, loss)
        return
    with pytest.raises(UserError, match=f"the loss {name} with these options is not smallest at 0"):
        _check_sign_has_a_meaning(name, loss)
