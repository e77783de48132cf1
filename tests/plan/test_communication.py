"""Planned traffic is what two real ranks give to their collectives."""

import json

import numpy as np
import pytest

from benchmarks.ranks import run_ranks
from ganscale.objectives.objective import build_objective
from ganscale.plan.communication import communication
from ganscale.plan.networks import planned_files, planned_networks
from ganscale.plan.sections import Communication
from ganscale.schema import Config
from tests.helpers.runs import TINY
from tests.plan.conftest import config_of

DEADLINE_SECONDS = 300
OTHER_FAKES = {
    "fakes made one by one": ["generator.target=tests.plan.plan_ranks:OwnGenerator"],
    "fakes for both": ["training.reuse_fakes=true", "objective.n_critic=3"],
}
CASES = {
    "plain": [],
    "micro batches": ["training.accumulate=2"],
    "global means": ["objective.loss.name=relativistic_average", "training.accumulate=2"],
    "dragan": ["objective.penalties={dragan: {weight: 1}}"],
    "path length": [
        "generator.target=benchmarks.tiny_networks:TinyStyleGenerator",
        "objective.generator_penalties.path_length=2",
    ],
    "compressed": ["training.gradient_compression=bfloat16"],
    "buckets": [
        "generator.target=mlp",
        "generator.options={width: 2048}",
        "critic.target=mlp",
        "critic.options={width: 2048}",
    ],
}


ALL_CASES = CASES | OTHER_FAKES


@pytest.fixture(scope="module")
def wire(tmp_path_factory, digits) -> dict:
    """What rank 0 of two gave to collectives, in each case."""
    folder = tmp_path_factory.mktemp("wire")
    common = [f"run.folder={folder}", f"data.path={digits}", "training.total_images=96"]
    often = ["audit.every_images=32", "log.every_images=48", "samples.count=1"]
    cases = {name: [*TINY, *common, *often, *each] for name, each in ALL_CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks("tests.plan.plan_ranks:run", folder, 2, DEADLINE_SECONDS)
    return json.loads((folder / "found.json").read_text())


def reduced_bytes(operands: list, gradient_bytes: int) -> int:
    """Gradients travel flat, statistics as rows of mean and square in float64, as do path lengths,
    of which there is one."""
    return sum(
        int(np.prod(shape)) * (8 if shape[0] <= 2 else gradient_bytes)
        for name, shape in operands
        if name == "gloo:all_reduce"
    )


def planned(config: Config) -> Communication:
    """Between two ranks."""
    networks = planned_networks(config, num_classes=0)
    tensors = sum(map(len, planned_files(config, *networks).values()))
    objective = build_objective(config.objective)
    found = communication(config, objective, *networks, ranks=2, audited_tensors=tensors)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CASES)
def test_collectives_and_their_bytes_are_those_of_two_real_ranks(digits, wire, name):
    config = config_of(digits, *CASES[name])
    plan = planned(config)
    found = wire[name]
    size = 2 if name == "compressed" else 4
    together = 0 if config.training.accumulate > 1 else plan.fakes_collectives
    assert len(found["fakes"]) == together
    critic_steps = [*found["fakes"], *found["critic 1"], *found["critic 2"]]
    assert plan.fakes_collectives + 2 * plan.critic_step_collectives == len(critic_steps)
    assert plan.generator_step_collectives == len(found["generator"])
    planned_bytes = plan.fakes_bytes + 2 * plan.critic_step_bytes
    assert planned_bytes == reduced_bytes(critic_steps, size)
    assert plan.generator_step_bytes == reduced_bytes(found["generator"], size)
    # Two ranks: a ring sends 2 * 1/2 of what is reduced, and once what is gathered.
    gathered = sum(
        4 * int(np.prod(shape))
        for kind, times in (("critic 2", 2), ("generator", 1))
        for operation, shape in found[kind] * times
        if operation == "gloo:all_gather"
    )
    assert plan.rank_traffic_bytes_per_cycle == plan.cycle_bytes + gathered
    steps = plan.fakes_bytes + 2 * plan.critic_step_bytes + plan.generator_step_bytes
    assert plan.cycle_bytes == steps + 8


@pytest.mark.parametrize("name", ALL_CASES)
def test_a_cycle_has_the_planned_collectives_however_its_fakes_are_made(digits, wire, name):
    plan = planned(config_of(digits, *ALL_CASES[name]))
    vote = 1
    if name == "fakes made one by one":
        assert not wire[name]["fakes"]
    assert plan.cycle_collectives == sum(map(len, wire[name].values())) + vote


def test_a_run_has_no_other_collectives_than_those_planned(digits, wire):
    """Three cycles, of which two end with a row in the log and the last with samples and a
    checkpoint."""
    plan = planned(config_of(digits))
    reduced = [shape for name, shape in wire["run"] if name == "gloo:all_reduce"]
    gathered = [shape for name, shape in wire["run"] if name == "gloo:all_gather"]
    rows, audits = 2, 3
    first_vote, vote_after_samples, broken_before_saving = 1, 1, 1
    count = 3 * plan.cycle_collectives + rows * plan.log_row_collectives
    count += audits + first_vote + vote_after_samples + broken_before_saving
    assert len(reduced) == count
    audited = [shape for shape in reduced if shape == [2, plan.audit_bytes // 16]]
    assert len(audited) == audits
    # Of losses that look at the global batch, which gather logits for a row; and `perf/`.
    panels, perf = 4, 1
    assert len(gathered) in (0, rows * (panels + perf), 2 * rows * (panels + perf))
