"""An update is the optimizer's, held back for good once a gradient was not a number."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.invariance import Combination, config_of, synthetic_batch, untried_networks
from ganscale.errors import UserError
from ganscale.metrics.meters import MeterAccumulator
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule
from ganscale.schema import (
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.critic_step import CriticStep
from ganscale.training.cycle import Cycle
from ganscale.training.network_updater import NetworkUpdater, NonFiniteGuard, Update
from ganscale.training.optimizers import build_optimizer
from ganscale.training.state import TrainingState

LSGAN = build_objective(ObjectiveConfig(LossConfig("lsgan")))
OPTIMIZERS = {
    "adam": OptimizerConfig("adam", 0.01, weight_decay=0.1),
    "sgd": OptimizerConfig("sgd", 0.01),
    "sgd with momentum": OptimizerConfig("sgd", 0.01, momentum=0.9),
    "rmsprop": OptimizerConfig("rmsprop", 0.01),
    "rmsprop with momentum": OptimizerConfig("rmsprop", 0.01, momentum=0.9),
    "rmsprop with all": OptimizerConfig("rmsprop", 0.01, momentum=0.9, weight_decay=0.1, eps=0.1),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def convolutions(memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 2, 3))
    return network.to(memory_format=memory_format)  # type: ignore[call-overload]


def updater_of(
    network: nn.Module,
    runtime: Runtime,
    optimizer: OptimizerConfig,
    non_finite_guard: NonFiniteGuard | None = None,
    **training,
) -> NetworkUpdater:
    return NetworkUpdater(
        "updater",
        CriticStep(network, LSGAN, "float32"),
        network,
        optimizer,
        TrainingConfig(total_images=1000, **training),
        runtime,
        non_finite_guard or NonFiniteGuard(runtime.device),
    )


def images(scale: float = 1.0, seed: int = 1) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(seed)
    real, fake = (scale * torch.randn(2, 3, 8, 8, generator=draws) for _ in range(2))
    return {"real_images": real, "fake_images": fake, "labels": None, "points": {}}


def loss_of(network: nn.Module, seed: int) -> Tensor:
    inputs = images(seed=seed)
    real, fake = network(inputs["real_images"]), network(inputs["fake_images"])
    return ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2


def everything(updater: NetworkUpdater) -> dict[str, Tensor]:
    weights = {f"weight {i}": p.detach().clone() for i, p in enumerate(updater.parameters)}
    return weights | {k: v.clone() for k, v in updater.optimizer.tensors().items()}


def from_disk(updater: NetworkUpdater, folder: Path) -> dict[str, Tensor]:
    """The optimizer's tensors as a checkpoint keeps them: packed, without strides."""
    packed = {k: v.contiguous() for k, v in updater.optimizer.tensors().items()}
    save_file(packed, folder / "optimizer.safetensors")
    return load_file(folder / "optimizer.safetensors")


def read(update: Update, runtime: Runtime) -> dict[str, float]:
    meters = MeterAccumulator(runtime)
    meters.add(*update)
    return meters.read()


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@each_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_nothing_and_holds_back_all_that_follow(
    runtime, optimizer, bad
):
    updater = updater_of(convolutions(), runtime, optimizer)
    start = everything(updater)
    updater.update(images(), 0)
    updater.update(images(seed=2), 2)
    good = everything(updater)
    assert not torch.equal(good["weight 0"], start["weight 0"])
    assert updater.optimizer.skipped_steps.item() == 0
    updater.update(images(scale=bad), 4)
    assert_same(everything(updater), good)
    for step in range(3):
        updater.update(images(seed=step), 6)
        assert_same(everything(updater), good)
        assert updater.optimizer.skipped_steps.item() == 2 + step


@each_optimizer
def test_a_bad_very_first_gradient_leaves_moments_that_a_restart_can_use(
    runtime, optimizer, tmp_path
):
    """Held back at its first step an optimizer has no moments, or ones of zero: never garbage."""
    updater = updater_of(convolutions(), runtime, optimizer)
    weights = [parameter.detach().clone() for parameter in updater.parameters]
    updater.update(images(scale=math.nan), 0)
    for name, tensor in updater.optimizer.tensors().items():
        assert not tensor.any(), name
    restarted, fresh = (updater_of(convolutions(), runtime, optimizer) for _ in range(2))
    assert all(map(torch.equal, weights, updater.parameters))
    restarted.optimizer.load_tensors(from_disk(updater, tmp_path))
    for each in (restarted, fresh):
        each.update(images(), 0)
        each.update(images(seed=2), 2)
    assert_same(everything(restarted), everything(fresh))


def test_a_non_finite_guard_stops_both_updaters_that_share_it(runtime):
    non_finite_guard = NonFiniteGuard(runtime.device)
    critic = updater_of(convolutions(), runtime, OPTIMIZERS["adam"], non_finite_guard)
    generator = updater_of(
        convolutions(), runtime, OPTIMIZERS["sgd with momentum"], non_finite_guard
    )
    generator.update(images(), 0)
    good = everything(generator)
    assert not non_finite_guard.has_tripped()
    critic.update(images(scale=math.nan), 0)
    assert non_finite_guard.has_tripped()
    generator.update(images(), 0)
    assert_same(everything(generator), good)
    assert generator.optimizer.skipped_steps.item() == 1


@each_optimizer
def test_without_trouble_an_update_is_torchs_plain_optimizer_step(runtime, optimizer):
    updater = updater_of(convolutions(), runtime, optimizer)
    plain = convolutions()
    settings = {"lr": 0.01, "weight_decay": optimizer.weight_decay}
    reference: torch.optim.Optimizer
    if optimizer.name == "adam":
        reference = torch.optim.Adam(plain.parameters(), **settings, foreach=False)
    elif optimizer.name == "sgd":
        reference = torch.optim.SGD(
            plain.parameters(), **settings, momentum=optimizer.momentum, foreach=False
        )
    else:
        reference = torch.optim.RMSprop(
            plain.parameters(),
            **settings,
            momentum=optimizer.momentum,
            eps=optimizer.eps,
            foreach=False,
        )
    for seed in range(5):
        found = read(updater.update(images(seed=seed), 0), runtime)
        reference.zero_grad()
        loss = loss_of(plain, seed)
        loss.backward()
        gradients = [p.grad.flatten() for p in plain.parameters() if p.grad is not None]
        norm = torch.cat(gradients).norm().item()
        assert found["loss/critic"] == pytest.approx(loss.item(), rel=1e-4)
        assert found["optim/updater_gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert found["optim/updater_gradient_norm_max"] == found["optim/updater_gradient_norm"]
        reference.step()
    for parameter, expected in zip(updater.parameters, plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_a_gradient_is_clipped_by_its_global_norm_which_is_reported_as_it_was(runtime, limit):
    sgd = OptimizerConfig("sgd", 1.0)
    updater = updater_of(convolutions(), runtime, sgd, gradient_clip=limit)
    unlimited = updater_of(convolutions(), runtime, sgd)
    before = [p.detach().double().clone() for p in updater.parameters]
    norms = [
        read(each.update(images(), 0), runtime)["optim/updater_gradient_norm"]
        for each in (updater, unlimited)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0.05
    change = [b - p for b, p in zip(before, updater.parameters, strict=True)]
    whole = [b - p for b, p in zip(before, unlimited.parameters, strict=True)]
    length = torch.cat([c.flatten() for c in change]).norm().item()
    assert length == pytest.approx(min(limit, norms[0]), rel=1e-4)
    share = length / norms[0]
    for clipped, full in zip(change, whole, strict=True):
        torch.testing.assert_close(clipped, share * full, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_are_left_alone_and_idle_ones_refused_by_name(runtime):
    network = nn.ModuleDict({"used": nn.Linear(2, 1)})
    network["frozen"] = nn.Linear(1, 1).requires_grad_(False)
    network.forward = lambda x: network["frozen"](network["used"](x))
    real, fake = torch.ones(3, 2), torch.zeros(3, 2)
    inputs = {"real_images": real, "fake_images": fake, "labels": None, "points": {}}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    updater_of(network, runtime, OPTIMIZERS["adam"], gradient_clip=1).update(inputs, 0)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"used.weight", "used.bias"}
    network["idle"] = nn.Linear(2, 1)
    with pytest.raises(UserError, match=r"parameters idle\.weight, idle\.bias get no gradient"):
        updater_of(network, runtime, OPTIMIZERS["adam"]).update(inputs, 0)


def test_the_learning_rate_of_an_update_is_that_of_its_images_seen(runtime):
    config = OptimizerConfig("sgd", Schedule(0.5, 0.0, 900, "linear", warmup_images=100))
    updater = updater_of(convolutions(), runtime, config)
    for seen, rate in ((0, 0.0), (50, 0.25), (100, 0.5), (550, 0.25), (1000, 0.0), (2000, 0.0)):
        assert updater.learning_rate(seen) == pytest.approx(rate)
        before = [p.detach().clone() for p in updater.parameters]
        updater.update(images(scale=1e-3), seen)
        for parameter, old in zip(updater.parameters, before, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.detach(), old - rate * parameter.grad)


def test_adam_follows_betas_that_change_as_torch_does():
    """As R3GAN's code sets `betas` of torch's Adam; and as the paper's algorithm in float64."""
    beta2 = Schedule(0.9, 0.99, over_images=100)
    network = convolutions().double()
    config = OptimizerConfig("adam", 0.01, betas=[0.5, beta2])
    adam = build_optimizer(network.parameters(), config)
    followed = copy.deepcopy(network)
    torchs = torch.optim.Adam(followed.parameters(), 0.01)
    weights = [p.detach().clone() for p in network.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights]
    for step, seen in enumerate(range(0, 150, 30), start=1):
        for own, theirs in zip(network.parameters(), followed.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            theirs.grad = own.grad.clone()
        now = 0.99 - 0.09 * (1 + math.cos(math.pi * min(seen / 100, 1))) / 2
        for group in torchs.param_groups:
            group["betas"] = (0.5, now)
        for i, parameter in enumerate(network.parameters()):
            gradient = parameter.grad
            assert gradient is not None
            first, second = moments[i]
            first = 0.5 * first + 0.5 * gradient
            second = now * second + (1 - now) * gradient**2
            moments[i] = first, second
            corrected = (second / (1 - now**step)).sqrt() + config.eps
            weights[i] -= 0.01 * first / (1 - 0.5**step) / corrected
        adam.step(0.01, seen)
        torchs.step()
        for own, theirs, derived in zip(
            network.parameters(), followed.parameters(), weights, strict=True
        ):
            torch.testing.assert_close(own.detach(), derived, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-14)


@each_optimizer
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_an_optimizer_that_was_saved_continues_to_the_bit(
    runtime, optimizer, memory_format, tmp_path: Path
):
    trained, network = convolutions(memory_format), convolutions(memory_format)
    whole = updater_of(trained, runtime, optimizer)
    for seed in range(3):
        whole.update(images(seed=seed), 0)
    network.load_state_dict(trained.state_dict())
    continued = updater_of(network, runtime, optimizer)
    continued.optimizer.load_tensors(from_disk(whole, tmp_path))
    assert_same(everything(continued), everything(whole))
    for seed in range(3, 6):
        whole.update(images(seed=seed), 0)
        continued.update(images(seed=seed), 0)
        assert_same(everything(continued), everything(whole))


def test_a_restarted_optimizer_keeps_the_settings_of_its_new_config():
    networks = [convolutions() for _ in range(2)]
    first = build_optimizer(networks[0].parameters(), OptimizerConfig("adam", 0.01))
    loss_of(networks[0], seed=1).backward()
    first.step(0.01)
    config = OptimizerConfig("adam", 0.5, betas=[0.1, 0.2], eps=1e-3)
    second = build_optimizer(networks[1].parameters(), config)
    second.load_tensors(first.tensors())
    assert second.config == config
    assert second.tensors()["step"].item() == 1


def test_lazy_penalties_leave_rate_and_betas_as_they_are(runtime):
    """StyleGAN2's correction is for its k + 1 optimizer steps in k iterations; here they are k."""
    config = config_of(Combination("wgan", "lazy_r1"), 1, "float64")
    config.optimizer.critic = OptimizerConfig("adam", 0.002, betas=[0.0, 0.99])
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, 0)
    expected = copy.deepcopy(state.critic)
    adam = torch.optim.Adam(expected.parameters(), 0.002, (0.0, 0.99), config.optimizer.critic.eps)

    def follow(phase: str) -> None:
        if state.images_seen == 0:
            return
        for parameter, own in zip(expected.parameters(), state.critic.parameters(), strict=True):
            assert own.grad is not None
            parameter.grad = own.grad.clone()
        adam.step()

    batches = [synthetic_batch(config, runtime, images_seen) for images_seen in (0, 8)]
    Cycle(config, objective, runtime, state).run(batches, is_logged=False, on_phase=follow)
    for own, parameter in zip(state.critic.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, parameter, rtol=1e-12, atol=1e-14)


@each_optimizer
def test_the_state_of_an_older_version_continues(runtime, optimizer):
    """torch.optim counts steps for each parameter, also where the count is of no use."""
    networks = [convolutions() for _ in range(3)]
    updaters = [updater_of(network, runtime, optimizer) for network in networks]
    for seed in range(3):
        for updater in updaters[:2]:
            updater.update(images(seed=seed), 0)
    networks[2].load_state_dict(networks[0].state_dict())
    tensors = updaters[0].optimizer.tensors()
    tensors.pop("step", None)
    if optimizer.name != "sgd":
        tensors |= {f"{k}.step": torch.tensor(3.0) for k in range(len(updaters[0].parameters))}
    updaters[2].optimizer.load_tensors(tensors)
    for updater in updaters[1:]:
        updater.update(images(seed=3), 0)
    assert_same(everything(updaters[2]), everything(updaters[1]))


def test_micro_batches_have_no_gaps_that_a_view_could_not_cross(runtime):
    objective = build_objective(ObjectiveConfig(LossConfig("lsgan"), {"r1": PenaltyConfig(1.0)}))
    network, training = convolutions(torch.contiguous_format), TrainingConfig(1000, accumulate=2)
    network.register_forward_pre_hook(lambda _, inputs: inputs[0].view(-1).view(inputs[0].shape))
    step, guard = CriticStep(network, objective, "float32"), NonFiniteGuard(runtime.device)
    updater = NetworkUpdater("updater", step, network, OPTIMIZERS["sgd"], training, runtime, guard)
    inputs = images()
    updater.update({**inputs, "points": {"r1": inputs["real_images"]}}, 0)


@pytest.mark.parametrize("loss", ["relativistic", "relativistic_average"])
def test_micro_batches_of_a_bfloat16_run_have_the_logits_of_its_float32_penalties(runtime, loss):
    """Logits that share the penalty's forward have its precision, for the whole batch, too."""
    found = []
    for accumulate in (1, 2):
        config = config_of(Combination(loss, "r1+r2"), accumulate, "bfloat16")
        config.training.penalty_precision = "float32"
        config.objective.n_critic = 1
        built = build_objective(config.objective)
        state = TrainingState(config, built, runtime, 0, untried_networks(config, 0, runtime))
        cycle = Cycle(config, built, runtime, state)
        torch.manual_seed(0)
        for parameter in state.critic.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        batch = cycle.to_device(synthetic_batch(config, runtime, 0))
        cycle.critic_step(batch, torch.randn_like(batch.images), False)
        found.append([p.grad for p in state.critic.parameters()])
    size = max(gradient.abs().max() for gradient in found[0]).item()
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5 * size)
