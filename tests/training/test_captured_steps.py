"""Replayed steps train as steps that run: here, by a recording of operators in a graph's place."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.invariance import (
    CLASSES,
    Combination,
    config_of,
    synthetic_batch,
    untried_networks,
)
from benchmarks.launches import gpu_path
from ganscale.errors import UserError
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import constant
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule
from ganscale.schema import Config, GeneratorPenaltyConfig
from ganscale.training.captured_steps import CapturedSteps, captures_steps
from ganscale.training.cycle import Cycle
from ganscale.training.metrics_row import metrics_row
from ganscale.training.state import TrainingState
from tests.checkpoints.helpers import save_checkpoint

CYCLES = 7  # the first three are warm-up


class Recorder(TorchDispatchMode):
    """Notes operators with the tensors that they were given. As of a graph, Python is not repeated,
    and results go to where they went at first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in (torch.ops.aten.item, torch.ops.aten._local_scalar_dense):
            raise RuntimeError(f"{func} in a step would wait for the device")
        outputs = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_flatten(outputs)[0]))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            found = tree_flatten(func(*args, **kwargs))[0]
            for own, new in zip(outputs, found, strict=True):
                is_own = not isinstance(own, Tensor) or own.data_ptr() == new.data_ptr()
                if not is_own:
                    own.copy_(new)


class Graphs:
    """Captures on a CPU. There, recording also computes, so the first replay is left out."""

    def __init__(self) -> None:
        self.replays = 0

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Recorder() as recorder:
            outputs = run()
        is_first = True

        def replay() -> None:
            nonlocal is_first
            if not is_first:
                recorder.replay()
                self.replays += 1
            is_first = False

        return outputs, replay


def started(config: Config, runtime: Runtime, graphs: Graphs | None) -> tuple[TrainingState, Cycle]:
    objective = build_objective(config.objective)
    classes = CLASSES if config.training.conditional else 0
    networks = untried_networks(config, classes, runtime)
    state = TrainingState(config, objective, runtime, classes, networks)
    cycle = Cycle(config, objective, runtime, state)
    if graphs is not None:
        cycle.captured_steps = CapturedSteps(graphs.capture)
    return state, cycle


def trained(
    config: Config,
    graphs: Graphs | None,
    log_every: int = 100,
    cycles: int = CYCLES,
    checkpoints: tuple[Path, int] | None = None,
    poisoned_after: int | None = None,
) -> dict[str, Tensor]:
    """Everything in the state, and all meters, after a few cycles.

    checkpoints: a folder for one, and the cycle after which the run continues from it
    poisoned_after: the cycle after which the generator makes NaN
    """
    runtime = Runtime.start()
    state, cycle = started(config, runtime, graphs)
    n_critic, size = config.objective.n_critic, config.training.global_batch_size
    found: dict[str, Tensor] = {}
    for number in range(cycles):
        if checkpoints is not None and number == checkpoints[1]:
            saved = save_checkpoint(
                checkpoints[0], state.images_seen, state.files(), state.numbers()
            )
            state, cycle = started(config, runtime, graphs)
            state.load(saved)
        if number == poisoned_after:
            next(state.generator.parameters()).data.fill_(torch.nan)
        seen = state.images_seen
        batches = [synthetic_batch(config, runtime, seen + size * k) for k in range(n_critic)]
        is_logged = number % log_every == log_every - 1
        logits = cycle.run(batches, is_logged=is_logged)
        if is_logged:
            row = metrics_row(state, runtime, config.training.total_images, logits)
            figures = {k: torch.tensor(v) for k, v in row.items() if isinstance(v, float)}
            found |= {f"{number} {k}": v for k, v in figures.items()}
    found |= {f"meter {k}": torch.tensor(v) for k, v in state.meters.read().items()}
    found["tripped"] = state.non_finite_guard.tripped
    return found | {k: v.clone() for k, v in state.audited().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In every bit."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, equal_nan=True, msg=key)


def config_with(combination: Combination, **training: Any) -> Config:
    config = config_of(combination, 1, "float32")
    config.optimizer.critic.learning_rate, config.optimizer.generator.learning_rate = 3e-3, 2e-3
    config.training.total_images = CYCLES * config.objective.n_critic * 8
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


CASES = {
    **{f"wgan/{k}": config_with(Combination("wgan", k)) for k in ("none", "wgan_gp", "lazy_r1")},
    "wgan_gp_pixel": config_with(Combination("wgan", "wgan_gp_pixel", "batch_norm")),
    **{
        f"dragan/{k}": config_with(Combination("hinge", "dragan", k))
        for k in ("spectral_norm", "conditional", "gradient_clip", "flip")
    },
    "relativistic_average": config_with(Combination("relativistic_average", "r1+r2")),
    "clip": config_with(Combination("wgan", "none", "clip_weights")),
    "micro-batches": config_with(Combination("relativistic_average", "r1+r2"), accumulate=2),
    "augmented": config_with(Combination("relativistic_average", "r1+r2", "ada")),
    "adaptive": config_with(Combination("hinge", "r1", "adaptive")),
    **{
        f"draws/{k}": config_with(Combination("relativistic", *k.split("/")))
        for k in ("wgan_gp/draws", "r1+r2/draws", "r1/checkpointed_draws")
    },
    "path length": config_with(Combination("wgan", "none", "path_length")),
    "lazy path length": config_with(Combination("wgan", "none", "path_length")),
    "reuse": config_with(Combination("lsgan", "wgan_gp"), reuse_fakes=True),
}
LAZY = {"path_length": GeneratorPenaltyConfig(2.0, interval=3)}
CASES["lazy path length"].objective.generator_penalties = LAZY


@pytest.fixture(autouse=True)
def on_the_gpu_path() -> Iterator[None]:
    """There, draws that were not made ahead are made by operators."""
    with gpu_path():
        yield


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_the_same_bits(name):
    graphs = Graphs()
    eager, replayed = trained(CASES[name], None), trained(CASES[name], graphs)
    assert graphs.replays > 5
    assert_equal(replayed, eager)


def test_logged_cycles_between_replays_change_nothing():
    graphs, config = Graphs(), CASES["wgan/lazy_r1"]
    eager, replayed = trained(config, None, log_every=2), trained(config, graphs, log_every=2)
    assert graphs.replays > 1
    assert_equal(replayed, eager)


def test_a_run_that_continues_from_a_checkpoint_captures_anew_with_the_same_bits(tmp_path):
    config = CASES["adaptive"]
    config = replace(config, training=replace(config.training, total_images=10**6))
    graphs = Graphs()
    eager = trained(config, None, cycles=12)
    replayed = trained(config, graphs, cycles=12, checkpoints=(tmp_path, 6))
    assert graphs.replays > 10
    assert_equal(replayed, eager)


def test_replayed_steps_skip_all_updates_from_the_first_nan_on():
    config, graphs = CASES["wgan/wgan_gp"], Graphs()
    eager, replayed = (
        trained(config, None, poisoned_after=5),
        trained(config, graphs, poisoned_after=5),
    )
    assert graphs.replays > 5
    assert eager["tripped"] == replayed["tripped"] == 1
    before = trained(config, None, cycles=5)
    for key in (name for name in before if name.startswith("critic.")):
        assert torch.equal(replayed[key], before[key])
    assert_equal(replayed, eager)


def test_rates_that_change_reach_a_replayed_step():
    config = config_with(Combination("wgan", "wgan_gp"))
    for optimizer in (config.optimizer.critic, config.optimizer.generator):
        length = config.training.total_images
        optimizer.learning_rate = Schedule(3e-3, 0.0, length, "linear")
    graphs = Graphs()
    eager, replayed = trained(config, None), trained(config, graphs)
    assert graphs.replays > 5
    assert_equal(replayed, eager)
    constant = trained(config_with(Combination("wgan", "wgan_gp")), None)
    key = "critic.input.weight"
    assert not torch.allclose(constant[key], eager[key], rtol=1e-3)


def test_weights_that_change_reach_a_replayed_step():
    config = config_with(Combination("wgan", "lazy_r1"))
    constant = trained(config, None)
    size = config.training.global_batch_size
    ((name, penalty),) = config.objective.penalties.items()
    falling = replace(penalty, weight=Schedule(1000.3, 0.0, 1024 * size, "linear"), interval=3)
    config.objective.penalties = {name: falling}
    graphs = Graphs()
    eager, replayed = trained(config, None), trained(config, graphs)
    assert graphs.replays > 5
    assert_equal(replayed, eager)
    key = "critic.input.weight"
    assert not torch.allclose(constant[key], eager[key], rtol=1e-3)


def test_steps_with_betas_that_change_are_not_captured():
    config = config_with(Combination("wgan", "none"), cuda_graphs="auto")
    device = torch.device("cuda")
    assert captures_steps(config, device, 1)
    config.optimizer.generator.betas = [0.0, Schedule(0.9, 0.99, 100)]
    assert not captures_steps(config, device, 1)
    config.training.cuda_graphs = "true"
    with pytest.raises(UserError, match="betas that have a schedule"):
        captures_steps(config, device, 1)


def test_results_stay_in_channels_last():
    steps, images = CapturedSteps(Graphs().capture), torch.rand(2, 3, 4, 5)
    images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(6):
        found = steps.run("double", lambda x, _: [x * 2, x.mean(), x.flatten(1) * 2], images)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found[0], images * 2)
        assert torch.equal(found[1], images.mean())
        assert torch.equal(found[2], images.flatten(1) * 2)


def test_cached_tensors_that_a_captured_step_reads_are_not_forgotten():
    """A graph would read whatever comes to their addresses."""
    steps = CapturedSteps(lambda run: (run(), lambda: None))
    read: list[weakref.ref[torch.Tensor]] = []

    def add(x: torch.Tensor, _) -> torch.Tensor:
        one = constant(1.0, x.shape, x.dtype, x.device)
        read.append(weakref.ref(one))
        return x + one

    for _ in range(4):
        steps.run("add", add, torch.ones(3))
    for size in range(4, 200):  # more than the cache keeps
        constant(1.0, torch.Size([size]), torch.float32, torch.device("cpu"))
    gc.collect()
    assert read[-1]() is not None
    del steps
    gc.collect()
    assert read[-1]() is None


def test_inputs_of_another_shape_are_refused():
    steps = CapturedSteps(Graphs().capture)
    for _ in range(4):
        steps.run("double", lambda x, _: x * 2, torch.ones(3))
    with pytest.raises(ValueError, match="captured with"):
        steps.run("double", lambda x, _: x * 2, torch.ones(1))


@pytest.mark.parametrize(
    ("settings", "device", "ranks", "answer"),
    [
        ({}, "cuda", 1, False),
        ({"cuda_graphs": "auto"}, "cuda", 1, True),
        ({"cuda_graphs": "auto"}, "cpu", 1, False),
        ({"cuda_graphs": "auto"}, "cuda", 2, False),
        ({"cuda_graphs": "auto", "compile": True}, "cuda", 1, False),
        ({"cuda_graphs": "true"}, "cuda", 1, True),
        ({"cuda_graphs": "true"}, "cpu", 1, "the device is cpu"),
        ({"cuda_graphs": "true"}, "cuda", 2, "several ranks"),
        ({"cuda_graphs": "true", "compile": True}, "cuda", 1, "training.compile"),
        ({"cuda_graphs": "true", "precision": "float64"}, "cuda", 1, "in float32"),
    ],
)
def test_steps_are_captured_where_it_is_possible_and_asked_for(settings, device, ranks, answer):
    config = config_with(Combination("wgan", "none"), **settings)
    if isinstance(answer, bool):
        assert captures_steps(config, torch.device(device), ranks) is answer
        return
    with pytest.raises(UserError, match=answer):
        captures_steps(config, torch.device(device), ranks)
