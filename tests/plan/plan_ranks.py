"""What the ranks of test_communication.py do: each notes what really goes over the wire."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.networks.dcgan import DCGANGenerator
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.training.cycle import Cycle
from ganscale.training.state import TrainingState
from ganscale.training.trainer import Trainer


class OwnGenerator(DCGANGenerator):
    """As a user writes one, who says nothing of what else than batch norms mixes images."""


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    runtime = Runtime.start(timeout_seconds=300)
    cases = json.loads((folder / "cases.json").read_text())
    found: dict[str, Any] = {name: steps(each, runtime) for name, each in cases.items()}
    found["run"] = whole_run(cases["plain"], runtime)
    if runtime.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    runtime.close()


def whole_run(settings: list[str], runtime: Runtime) -> list[tuple[str, list[int]]]:
    trainer = Trainer(resolve(settings), runtime)
    return operands(trainer.run)


def steps(settings: list[str], runtime: Runtime) -> dict[str, list[tuple[str, list[int]]]]:
    """Of a cycle's parts, once DDP has agreed on its buckets."""
    config = resolve(settings).config
    objective = build_objective(config.objective)
    cycle = Cycle(config, objective, runtime, TrainingState(config, objective, runtime, 0))
    share = config.training.global_batch_size // runtime.world_size
    images = torch.zeros(share, *config.data.size, 1).byte()
    slots = torch.arange(share) + runtime.rank * share
    n_critic = config.objective.n_critic
    batches = [Batch(images, slots, slots)] * n_critic
    names = ["fakes", *(f"critic {step}" for step in range(1, n_critic + 1)), "generator"]
    found = {}
    for _ in range(2):
        profilers: list[profile] = []

        def next_profiler(phase: str, profilers: list[profile] = profilers) -> None:
            if profilers:
                profilers[-1].stop()
            profilers.append(new_profiler())
            profilers[-1].start()

        cycle.run(batches, is_logged=False, on_phase=next_profiler)
        profilers[-1].stop()
        found = dict(zip(names, map(operands_in, profilers), strict=True))
    return found


def operands(step: Callable[[], Any]) -> list[tuple[str, list[int]]]:
    with new_profiler() as profiler:
        step()
    return operands_in(profiler)


def new_profiler() -> profile:
    return profile(activities=[ProfilerActivity.CPU], record_shapes=True)


def operands_in(profiler: profile) -> list[tuple[str, list[int]]]:
    """(collective, shape of this rank's operand) of each collective."""
    return [
        (event.name, event.input_shapes[0])
        for event in profiler.events() or []
        if event.name in ("gloo:all_reduce", "gloo:all_gather")
    ]
