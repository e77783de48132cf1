"""A race is fair where the rivals compute the same: one cycle of each in float64 against ours."""

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import launches, limit, ours, scaling, step
from benchmarks import penalty as penalty_alone
from benchmarks.rivals.formulas import penalty
from benchmarks.rivals.libraries import Mimicry, NotMeasured, TorchGAN
from benchmarks.rivals.lightning import LightningLoop
from benchmarks.rivals.loops import AccelerateLoop, PlainLoop, PyTorchGAN, Task, UsualLoop
from benchmarks.rivals.stylegan2 import plain_network
from ganscale.randomness import uniform, uniform_noise
from ganscale.runtime import Runtime
from ganscale.schema import Config
from tests.helpers.processes import REPOSITORY

BATCH = 4
OBJECTIVES = sorted(path.stem for path in (ours.CONFIGS / "objective").glob("*.yaml"))
SMALL = (
    "generator.options.width=4",
    "critic.options.width=4",
    "data.resolution=16",
    "training.precision=float64",
)
FROZEN = {
    "generator": "optimizer.generator.learning_rate=0",
    "critic": "optimizer.critic.learning_rate=0",
}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.start()


def small_config(objective: str, *settings: str) -> Config:
    return ours.config_of(objective, "resnet32", BATCH, *SMALL, *settings)


def coefficients(config: Config, purpose: str) -> Iterator[Tensor]:
    """Ours, update by update."""
    for update in range(100):
        slots = update * BATCH + torch.arange(BATCH)
        yield uniform(config.seed, purpose, slots).double()


def same_draws(monkeypatch: pytest.MonkeyPatch, config: Config, latents: Tensor) -> None:
    """Has torch give rivals the coefficients that our critic steps draw, in their order."""
    is_dragan = "dragan" in config.objective.penalties
    shares = coefficients(config, "dragan share" if is_dragan else "interpolation")
    noise = (
        uniform_noise(config.seed, "dragan noise", step * BATCH + torch.arange(BATCH), 3 * 16 * 16)
        for step in range(100)
    )
    monkeypatch.setattr(torch, "randn", lambda *_, **__: latents)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: next(shares)[: shape[0]].view(shape))
    monkeypatch.setattr(torch, "rand_like", lambda like: next(noise).to(like).view(like.shape))


def after_a_cycle(
    config: Config,
    runtime: Runtime,
    rival: Callable[[Task], step.Contestant],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the rival's changes of both networks' weights, ours), by network.name. All latents are the
    same, at every step, so it does not matter who draws them anew."""
    latents = torch.randn(BATCH, config.generator.latent_dim, dtype=torch.float64)
    images = torch.empty(BATCH, 3, 16, 16, dtype=torch.float64).uniform_(-1, 1)
    own = ours.Ours(config, runtime, images)
    task = own.task()
    before = weights(task)
    with monkeypatch.context() as patched:
        same_draws(patched, config, latents)
        contestant = rival(task)
        contestant()
        contestant.close()
    monkeypatch.setattr(own.cycle, "_latents", lambda *_: latents)
    own()
    mine = Task(config, own.state.generator, own.state.critic, images)
    return tuple(  # type: ignore[return-value]
        {name: value - before[name] for name, value in weights(trained).items()}
        for trained in (task, mine)
    )


def weights(task: Task) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": copy.deepcopy(parameter.detach())
        for name, network in (("generator", task.generator), ("critic", task.critic))
        for key, parameter in network.named_parameters()
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the changes, over the largest change; Adam turns rounding of gradients that cancel to
    nothing, as a last bias's, into whole steps, so its epsilon is large."""
    largest = max(change.abs().max() for change in expected.values())
    return float(max((found[k] - expected[k]).abs().max() for k in expected) / largest)


LARGE_EPSILON = ("optimizer.critic.eps=1e-2", "optimizer.generator.eps=1e-2")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rival", [PlainLoop, UsualLoop], ids=lambda rival: rival.name)
def test_hand_written_loops_train_as_we_do(
    objective: str,
    rival: type[PlainLoop],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(objective, *LARGE_EPSILON)
    theirs, mine = after_a_cycle(config, runtime, rival, monkeypatch)
    assert largest_difference(theirs, mine) < 1e-9


@pytest.mark.parametrize("objective", step.AGAINST_ALL)
@pytest.mark.parametrize(
    "rival", [PyTorchGAN, AccelerateLoop, LightningLoop, Mimicry, TorchGAN], ids=lambda r: r.name
)
@pytest.mark.parametrize("frozen", FROZEN)
def test_other_rivals_train_as_we_do(
    objective: str,
    rival: Callable[[Task], step.Contestant],
    frozen: str,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One network at a time: PyTorch-GAN updates the generator first where n_critic is 1, and has
    the critic judge fakes from before that update. Mimicry adds 1e-8 within a logarithm."""
    if rival is TorchGAN and objective == "wgan_gp" and frozen == "generator":
        pytest.skip("torchgan's penalty is another one")
    config = small_config(objective, *LARGE_EPSILON, FROZEN[frozen])
    try:
        theirs, mine = after_a_cycle(config, runtime, rival, monkeypatch)
    except (NotMeasured, ImportError) as reason:
        pytest.skip(str(reason))
    assert max(change.abs().max() for change in mine.values()) > 0
    assert largest_difference(theirs, mine) < 1e-6


class Counting(TorchDispatchMode):
    """Operations of everything within, also of second derivatives, which torch's own mode does not
    take."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            self.operations += count(*args, **(kwargs or {}), out_val=output)
        return output


@pytest.mark.parametrize("network", ["dcgan32", "resnet32"])
def test_useful_operations_of_a_penalty_are_those_of_autograd_without_its_zeros(
    network: str,
) -> None:
    config = ours.config_of("wgan_gp", network, BATCH)
    own = ours.Ours(config, Runtime.start(), ours.random_images(config, torch.device("cpu")))
    task = own.task()
    needed = limit.useful_operations(config, task.generator, task.critic, task.images)
    with Counting() as forward, torch.no_grad():
        task.critic(task.images)
    with Counting() as autograd:
        penalty("wgan_gp", task.critic, task.images, task.images).backward()
    assert needed.penalty == config.objective.n_critic * 4 * forward.operations
    # Zeros travel back through the forward: two forwards, but for the first layer's input.
    assert 5.5 < autograd.operations / forward.operations <= 6


def test_a_ring_needs_the_time_of_its_slowest_link() -> None:
    links = scaling.Links(latency_within=0.0, latency_hop=0.0)
    assert scaling.all_reduce_seconds(450e9, 8, links) == pytest.approx(2 * 7 / 8)
    assert scaling.all_reduce_seconds(50e9, 1024, links) == pytest.approx(2, rel=1e-3)
    # Ten buckets of 0.1 s each behind 0.4 s of backward: the last one, and 0.5 s of the others.
    bucket = 50e9 / 20 * 1024 / 1023
    assert scaling.step_seconds(0.6, 10 * bucket, 10, 1024, links) == pytest.approx(0.6 + 0.6)
    assert scaling.step_seconds(6.0, 10 * bucket, 10, 1024, links) == pytest.approx(6.0 + 0.1)


def test_cases_have_the_names_that_quick_runs_ask_for() -> None:
    names = [f"{case.name}/{variant.name}" for case in step.cases() for variant in case.variants]
    assert len(set(names)) == len(names)
    assert set(step.QUICK) <= set(names)
    assert {name.partition("/")[0] for name in names} == set(OBJECTIVES)


# The rows of the table in docs/performance.md.
LAUNCHES = {
    "dragan": "DRAGAN",
    "hinge": "hinge",
    "lsgan": "LSGAN",
    "minimax": "minimax",
    "non_saturating": "non-saturating",
    "r1": "R1",
    "r3gan": "R3GAN",
    "relativistic_average": "relativistic average",
    "wgan": "WGAN with clipped weights",
    "wgan_gp": "WGAN-GP",
    "wgan_lp": "WGAN-LP",
}
OF_OWN_NETWORKS = {
    "r3gan32": "R3GAN with its own networks",
    "stylegan2-32": "StyleGAN2 with its own networks",
}


def documented_launches(objective: str, network: str) -> float:
    """Ours over the plain loop's, as the page has it: "409 of 718 (0.57)" in a cell."""
    row = OF_OWN_NETWORKS.get(network, LAUNCHES[objective])
    column = 2 if network == "resnet32" else 1
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    table = page.partition("\n## How many operators a GPU would have to launch\n")[2]
    (line,) = re.findall(rf"^\| {re.escape(row)} \|.*$", table.partition("\n## ")[0], re.M)
    ours, rivals, ratio = re.fullmatch(
        r" ([\d,]+) of ([\d,]+) \((.*)\) ", line.split("|")[column + 1]
    ).groups()  # type: ignore[union-attr]
    exact = int(ours.replace(",", "")) / int(rivals.replace(",", ""))
    assert float(ratio) == pytest.approx(exact, abs=0.0051)
    return exact


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        *itertools.product(OBJECTIVES, ["dcgan32"]),
        *itertools.product(["wgan_gp", "r1", "r3gan", "dragan"], ["resnet32"]),
        ("r3gan", "r3gan32"),
        ("r1", "stylegan2-32"),
    ],
)
def test_a_cycle_launches_no_more_operators_than_the_page_about_performance_says(
    objective: str, network: str
) -> None:
    """On a GPU's path, where each takes the host's time. The plain loop launches more of them."""
    most = documented_launches(objective, network) + 0.02
    assert most < 1
    with launches.gpu_path():
        assert launches.launches(objective, network).ratio <= most


def test_quick_launches_are_rows_of_the_long_run() -> None:
    assert set(launches.OBJECTIVES) == set(OBJECTIVES)
    names = {f"{objective}/{network}" for objective in OBJECTIVES for network in launches.NETWORKS}
    assert set(launches.QUICK) <= names


def test_one_and_two_ranks_take_turns() -> None:
    rows = scaling.measure("non_saturating", "dcgan32", 2, cycles=1, rounds=2, seconds=120)
    assert [row.name.split("/")[-1] for row in rows] == ["efficiency", "communication"]
    assert 0 < rows[0].ratio < 1000
    assert rows[1].ratio < 100


@pytest.mark.parametrize("network", penalty_alone.CRITICS)
def test_contestants_of_the_penalty_have_the_same_gradients(network: str) -> None:
    critic, images = penalty_alone.critic_and_images(network, batch=4)
    rival = plain_network(copy.deepcopy(critic))
    penalty_alone.ours(critic, images)
    penalty_alone.plain(rival, images)
    found = [parameter.grad for parameter in critic.parameters()]
    expected = [parameter.grad for parameter in rival.parameters()]
    largest = max(float(each.abs().max()) for each in expected if each is not None)
    for ours_, theirs in zip(found, expected, strict=True):
        zeros = torch.zeros(()) if theirs is None else theirs
        torch.testing.assert_close(
            zeros if ours_ is None else ours_, zeros, rtol=1e-3, atol=1e-4 * largest
        )
