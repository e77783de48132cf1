"""A cycle on torch's meta device, which has no values: there, an operator that mixes devices, asks
for a number or copies to the host raises an error."""

import pytest
import torch
from torch import Tensor

from benchmarks.launches import OBJECTIVES
from benchmarks.ours import config_of
from ganscale.data.batch import Batch
from ganscale.objectives.objective import build_objective
from ganscale.plan.meta_device import META, MetaRuntime, meta_device
from ganscale.plan.networks import planned_networks
from ganscale.schema import OptimizerConfig
from ganscale.training.cycle import Cycle
from ganscale.training.data_flow import batches_per_cycle
from ganscale.training.device_batch import draws_ahead
from ganscale.training.state import TrainingState

OPTIMIZERS = {
    "as in the config": None,
    "rmsprop": OptimizerConfig("rmsprop", 1e-3, momentum=0.9, weight_decay=0.1),
    "sgd": OptimizerConfig("sgd", 1e-3, momentum=0.9),
}


def run_cycles(objective: str, network: str, optimizer: str, *settings: str) -> TrainingState:
    config = config_of(objective, network, 4, *settings)
    if (chosen := OPTIMIZERS[optimizer]) is not None:
        config.optimizer.critic = config.optimizer.generator = chosen
    built = build_objective(config.objective)
    with meta_device(1):
        generator, critic = (n.to(META) for n in planned_networks(config, 0))
        state = TrainingState(config, built, MetaRuntime(1), 0, (generator, critic))
        cycle = Cycle(config, built, MetaRuntime(1), state)
        draws = torch.empty(4 * sum(draw.columns for draw in draws_ahead(config, built)))
        size, channels = config.data.size, config.data.channels
        images = torch.empty(4, *size, channels, dtype=torch.uint8)
        labels, slots = torch.zeros(4, dtype=torch.int64), torch.arange(4)
        batch = Batch(images, labels, slots, draws=draws)
        for is_logged in (False, True, False):
            cycle.run([batch] * batches_per_cycle(config), is_logged=is_logged)
    return state


def assert_on_meta(state: TrainingState) -> None:
    tensors = state.audited()
    assert tensors
    assert {tensor.device for tensor in tensors.values()} == {META}


@pytest.mark.parametrize("network", ["dcgan32", "resnet32"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_cycle_of_every_objective_stays_on_its_device(objective, network):
    assert_on_meta(run_cycles(objective, network, "as in the config"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "setting",
    [
        "training.gradient_clip=1",
        "training.accumulate=2",
        "training.reuse_fakes=true",
        "training.precision=bfloat16",
        "data.flip=true",
        "critic.options.norm=layer",
    ],
)
def test_a_cycle_with_every_setting_stays_on_its_device(setting, optimizer):
    assert_on_meta(run_cycles("wgan_gp", "dcgan32", optimizer, setting))


@pytest.mark.parametrize("objective", ["wgan_gp", "r3gan"])
@pytest.mark.parametrize("setting", ["training.precision=float32", "training.accumulate=2"])
def test_a_cycle_of_networks_that_draw_stays_on_its_device(objective, setting):
    networks = [
        f"{role}.{name}"
        for role in ("generator", "critic")
        for name in (
            f"target=benchmarks.tiny_networks:Tiny{role.capitalize()}",
            "options={draws: true, checkpoints: true}",
        )
    ]
    assert_on_meta(run_cycles(objective, "dcgan32", "as in the config", *networks, setting))


_ALL = "augmentation.strengths={blit: 1, geom: 1, color: 1, filter: 1, noise: 1, cutout: 1}"


@pytest.mark.parametrize(
    "settings",
    [
        ("augmentation=ada", "augmentation.probability=0.5", _ALL),
        ("augmentation=diffaugment", "augmentation.probability=1"),
        (
            "augmentation=ada",
            "augmentation.adaptive.target=0.6",
            "augmentation.adaptive.every_images=4",
            "objective.loss.name=hinge",
        ),
    ],
)
def test_a_cycle_with_augmentation_stays_on_its_device(settings):
    assert_on_meta(run_cycles("r3gan", "resnet32", "as in the config", *settings))


def test_a_cycle_with_a_real_batch_of_the_generators_own_stays_on_its_device():
    setting = "training.generator_real=fresh"
    assert_on_meta(run_cycles("r3gan", "resnet32", "as in the config", setting))


def test_a_question_to_the_device_is_noticed(monkeypatch):
    finish = Cycle._update_ema

    def asking(self: Cycle) -> None:
        loss: Tensor = next(iter(self.state.generator.parameters())).sum()
        assert loss.item() < 1e9
        finish(self)

    monkeypatch.setattr(Cycle, "_update_ema", asking)
    with pytest.raises(RuntimeError, match="item"):
        run_cycles("lsgan", "dcgan32", "sgd")
