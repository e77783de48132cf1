"""Where a row says that time goes, and how many operations it says were done."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from benchmarks.invariance import Combination, config_of, synthetic_batch
from benchmarks.ranks import run_ranks
from ganscale.metrics.performance import PerformanceMeter, known_peak
from ganscale.metrics.profiling import section, stopwatch
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import PENALTIES, Penalty
from ganscale.runtime import Runtime
from ganscale.schema import (
    Config,
    CriticConfig,
    GeneratorConfig,
    GeneratorPenaltyConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.cycle import Cycle
from ganscale.training.flops import _FlopCounter, count_cycle_flops
from ganscale.training.state import TrainingState

PAUSE = 0.05


class SlowBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, None


def cycle_of(config: Config, runtime: Runtime) -> Cycle:
    objective = build_objective(config.objective)
    return Cycle(config, objective, runtime, TrainingState(config, objective, runtime, 0))


def run(cycle: Cycle, logs: bool) -> None:
    config, seen = cycle.config, cycle.state.images_seen
    steps = range(config.objective.n_critic)
    batches = [synthetic_batch(config, cycle.runtime, seen + 8 * step) for step in steps]
    cycle.run(batches, is_logged=logs)


def meter_of(cycle: Cycle) -> PerformanceMeter:
    state, objective = cycle.state, cycle.objective
    networks, flops = (state.generator, state.critic), None
    if cycle.runtime.is_main:
        flops = count_cycle_flops(cycle.config, objective, *networks, state.num_classes)
    return PerformanceMeter(cycle.config, cycle.runtime, state.images_seen, flops)


def row_of(cycle: Cycle, speed: PerformanceMeter, waited_seconds: float = 0.0) -> dict[str, float]:
    interval = speed.interval(cycle.state.images_seen, waited_seconds)
    return speed.row(interval, cycle.state.averaging_seconds())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_penaltys_time_is_that_of_its_own_forward_and_backward(runtime, monkeypatch, accumulate):
    """Of the adversarial loss's backward, which is three times as slow here, it has nothing."""
    wgan_gp = PENALTIES["wgan_gp"]()

    def value(gradients: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return SlowBackward.apply(wgan_gp.value_and_norms(gradients)[0], 2 * PAUSE)

    monkeypatch.setitem(PENALTIES, "slow", lambda: Penalty(wgan_gp.points, value))
    config = config_of(Combination("lsgan", "none"), accumulate, "float32")
    config.objective.penalties = {"slow": PenaltyConfig(1.0)}
    cycle = cycle_of(config, runtime)
    logits = cycle.state.critic_updater._step.logits

    def slow_logits(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        found = logits(*arguments, **named)
        return found | {"fake": SlowBackward.apply(found["fake"], 3 * PAUSE)}

    monkeypatch.setattr(cycle.state.critic_updater._step, "logits", slow_logits)
    speed = meter_of(cycle)
    run(cycle, logs=True)
    row = row_of(cycle, speed)
    steps = accumulate * config.objective.n_critic
    pauses = 1000 * steps * 3 * PAUSE
    assert pauses <= row["perf/penalty_ms"] < 2 * pauses
    assert pauses <= row["perf/critic_ms"] < 2 * pauses


def test_the_parts_of_a_cycle_do_not_exceed_it_and_host_parts_are_of_the_whole_interval(runtime):
    config = config_of(Combination("wgan", "wgan_gp"), 1, "float32")
    cycle = cycle_of(config, runtime)
    speed = meter_of(cycle)
    for number in range(4):
        run(cycle, logs=number == 3)
        if number == 1:
            with section("samples"):
                time.sleep(4 * PAUSE)
        with section("data wait"):
            time.sleep(PAUSE)
    row = row_of(cycle, speed, waited_seconds=4 * PAUSE)
    assert 1000 * PAUSE <= row["perf/samples_ms"] < 2000 * PAUSE
    assert 1000 * PAUSE <= row["perf/data_wait_ms"] < 2000 * PAUSE
    of_host = row["perf/cycle_ms"] - row["perf/data_wait_ms"] - row["perf/samples_ms"]
    parts = ("fake_images", "critic", "penalty", "generator", "ema")
    assert all(row[f"perf/{part}_ms"] > 0 for part in parts)
    assert sum(row[f"perf/{part}_ms"] for part in parts) < 4 * of_host  # one cycle of the four
    expected = 1000 * PAUSE / row["perf/cycle_ms"]
    assert row["perf/data_wait_share"] == pytest.approx(expected, rel=1e-9)
    run(cycle, logs=True)
    assert row_of(cycle, speed)["perf/samples_ms"] == 0  # told once


def test_steps_that_are_not_logged_are_not_timed(runtime):
    config = config_of(Combination("wgan", "wgan_gp"), 1, "float32")
    cycle = cycle_of(config, runtime)
    run(cycle, logs=True)
    assert stopwatch.is_running
    run(cycle, logs=False)
    assert not stopwatch.is_running
    assert stopwatch.read_device() == {}


def mlp_config(**objective: Any) -> Config:
    config = config_of(Combination("wgan", "none"), 1, "float32")
    config.generator = GeneratorConfig("mlp", 6, {"width": 16, "depth": 1})
    config.critic = CriticConfig("mlp", {"width": 32, "depth": 1})
    for name, value in objective.items():
        setattr(config.objective, name, value)
    return config


def flops(config: Config) -> float:
    state = TrainingState(config, build_objective(config.objective), Runtime.start(), 0)
    objective = build_objective(config.objective)
    found = count_cycle_flops(config, objective, state.generator, state.critic, 0)
    assert found is not None
    return found


def test_operations_are_those_of_the_layers_written_out():
    """A product of (n, a) and (a, b) is 2 n a b operations."""
    pixels = 2 * 8 * 8
    generator, critic = 2 * (6 * 16 + 16 * pixels), 2 * (pixels * 32 + 32 * 1)
    generator_backward = generator + 2 * 16 * pixels  # of weights, and of all inputs but latents
    critic_backward = critic + 2 * 32 * 1
    critic_step = generator + 2 * critic + 2 * critic_backward
    generator_step = 2 * generator - generator + critic + critic + generator_backward
    batch, n_critic = 8, 2
    assert flops(mlp_config()) == batch * (n_critic * critic_step + generator_step)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolutions_backward_is_twice_its_forward_with_groups_or_without(kind, groups):
    """An input pixel of a transposed convolution, or an output pixel, meets the whole kernel."""
    network = kind(8, 4, 3, stride=2, padding=1, groups=groups)
    with _FlopCounter() as counter:
        output = network(torch.zeros(2, 8, 6, 6, requires_grad=True))
        forward = counter.flops
        output.sum().backward()
    pixels = 6 * 6 if kind is nn.ConvTranspose2d else 3 * 3
    assert forward == 2 * (2 * pixels) * 8 * 4 * 3 * 3 / groups
    assert counter.flops == 3 * forward


def test_operations_of_penalties_and_reused_fakes():
    plain = flops(mlp_config())
    always = flops(mlp_config(penalties={"r1": PenaltyConfig(1.0)})) - plain
    lazy = flops(mlp_config(penalties={"r1": PenaltyConfig(1.0, interval=4)})) - plain
    assert always > 0
    assert lazy == pytest.approx(always / 4)
    # R1 takes its gradient from the forward of the loss; DRAGAN needs another one.
    forward, n_critic = 8 * 2 * (2 * 8 * 8 * 32 + 32 * 1), 2
    elsewhere = flops(mlp_config(penalties={"dragan": PenaltyConfig(1.0)})) - plain
    assert elsewhere - always == n_critic * forward
    reusing = mlp_config()
    reusing.training.reuse_fakes = True
    assert plain - flops(reusing) == 8 * 2 * (6 * 16 + 16 * 2 * 8 * 8)


def test_operations_of_a_lazy_penalty_of_the_generator():
    config = mlp_config()
    config.generator = GeneratorConfig("benchmarks.tiny_networks:TinyStyleGenerator", 6)
    plain = flops(config)
    config.objective.generator_penalties = {"path_length": GeneratorPenaltyConfig(1.0)}
    always = flops(config) - plain
    config.objective.generator_penalties = {"path_length": GeneratorPenaltyConfig(1.0, interval=4)}
    assert always > 0
    assert flops(config) - plain == pytest.approx(always / 4)


def test_counting_operations_leaves_the_networks_alone(runtime):
    config = config_of(Combination("wgan", "wgan_gp", "batch_norm"), 1, "float32")
    cycle = cycle_of(config, runtime)
    before = {name: tensor.clone() for name, tensor in cycle.state.audited().items()}
    forwards: list[nn.Module] = []
    cycle.state.critic.register_forward_hook(lambda module, *_: forwards.append(module))
    meter_of(cycle)
    assert not forwards
    for name, tensor in cycle.state.audited().items():
        assert torch.equal(tensor, before[name]), name
    parameters = [*cycle.state.critic.parameters(), *cycle.state.generator.parameters()]
    assert all(parameter.grad is None for parameter in parameters)


def test_operations_of_a_network_that_takes_no_two_images_are_not_counted(runtime, caplog):
    class Refusing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError("four images or none")

    config = mlp_config()
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, 0)
    with caplog.at_level("INFO"):
        assert count_cycle_flops(config, objective, state.generator, Refusing(), 0) is None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `run_rank` found on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.metrics.test_performance:run_rank", folder, 2, seconds=600)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def run_rank(folder: Path) -> None:
    runtime = Runtime.start(timeout_seconds=300)
    found = {
        "flops of rank 0": flops_with_collectives(runtime),
        "slow critic": row_with_a_slow_rank(runtime),
        "late rank": row_with_a_late_rank(runtime),
    }
    torch.save(found, folder / f"rank{runtime.rank}.pt")
    runtime.close()


def test_a_network_with_a_collective_of_its_own_is_not_counted_and_holds_nobody_up(two_ranks):
    assert [rank["flops of rank 0"] for rank in two_ranks] == [[None, None], []]


class Summing(nn.Module):
    """Of all ranks, in forward or in backward."""

    def __init__(self, in_forward: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * 8 * 8, 1)
        self.in_forward = in_forward

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images.flatten(1)).squeeze(1)
        if self.in_forward:
            dist.all_reduce(logits.detach().clone())
        elif logits.requires_grad:
            logits.register_hook(lambda gradient: dist.all_reduce(gradient.clone()))
        return logits


def flops_with_collectives(runtime: Runtime) -> list[float | None]:
    config = mlp_config()
    objective = build_objective(config.objective)
    generator = TrainingState(config, objective, runtime, 0).generator
    found = []
    if runtime.is_main:
        for in_forward in (True, False):
            critic = Summing(in_forward)
            found.append(count_cycle_flops(config, objective, generator, critic, 0))
    runtime.barrier()
    return found


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("NVIDIA A10", "float32", 31.2),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L40", "bfloat16", 0),
        ("NVIDIA H200", "float64", 0),
    ],
)
def test_peaks_go_by_a_gpus_whole_name(name, precision, tflops):
    is_tf32 = precision == "tf32"
    precision = "float32" if is_tf32 else precision
    training = TrainingConfig(total_images=1, precision=precision, tf32=is_tf32)
    assert known_peak(name, training) == tflops


def test_the_rank_that_holds_the_others_up_is_named(two_ranks):
    rows = [rank["slow critic"] for rank in two_ranks]
    assert rows[0].keys() - rows[1].keys() == {"perf/tflops"}  # counted once
    row = rows[0]
    assert row["perf/slowest_rank"] == 1
    low, mean, high = (
        row[f"perf/rank_images_per_second_{each}"] for each in ("min", "mean", "max")
    )
    # Two critic steps of two forwards each and a generator step of two are slow on rank 1.
    assert 8 / low >= 6 * PAUSE
    assert 8 / high < 4 * PAUSE
    assert low < mean < high
    # Rank 0 waits for it in the averaging; the mean of both ranks is half of that.
    assert 1000 * 6 * PAUSE / 2 * 0.8 < row["perf/communication_ms"] < 2000 * 6 * PAUSE / 2


def row_with_a_slow_rank(runtime: Runtime) -> dict[str, float]:
    cycle, meter = settled_cycle(runtime, "plain")
    if runtime.rank == 1:
        cycle.state.critic.register_forward_pre_hook(lambda *_: time.sleep(PAUSE))
    run(cycle, logs=True)
    return row_of(cycle, meter)


def test_who_waits_for_another_rank_does_not_count_it_as_making_fakes(two_ranks):
    for rank in two_ranks:
        assert 0 < rank["late rank"]["perf/fake_images_ms"] < 1000 * PAUSE


def row_with_a_late_rank(runtime: Runtime) -> dict[str, float]:
    cycle, meter = settled_cycle(runtime, "batch_norm")
    if runtime.rank == 1:
        time.sleep(8 * PAUSE)
    run(cycle, logs=True)
    return row_of(cycle, meter)


def settled_cycle(runtime: Runtime, variant: str) -> tuple[Cycle, PerformanceMeter]:
    cycle = cycle_of(config_of(Combination("wgan", "wgan_gp", variant), 1, "float32"), runtime)
    meter = meter_of(cycle)
    for _ in range(11):  # the first ten times of DDP are noted anyway
        run(cycle, logs=False)
    return cycle, meter
