"""What the ranks of test_ranks.py do: each runs all cases and leaves what it found."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.invariance import CLASSES, Combination, config_of, synthetic_batch
from ganscale.config import resolve
from ganscale.errors import ReplicaError, UserError
from ganscale.networks.normalization import convert_global_batch_norm
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import global_deviation
from ganscale.runtime import Runtime, all_gather_batch, all_reduce_sum_with_grad
from ganscale.schema import CriticConfig
from ganscale.training.cycle import Cycle
from ganscale.training.network_updater import NetworkUpdater
from ganscale.training.replica_audit import audit_replicas
from ganscale.training.state import TrainingState
from ganscale.training.trainer import Trainer
from tests.helpers.networks import draw

COUNTED = ("wgan", "wgan_gp"), ("relativistic", "r1+r2"), ("relativistic_average", "r1+r2")
GLOBAL_BATCH = 8


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    runtime = Runtime.start(timeout_seconds=300)
    found = {
        "runtime": collectives(runtime),
        "sums": differentiable_sums(runtime),
        "compressed": compressed_gradients(runtime),
        "buffers": buffers(runtime),
        "norms": batch_norms(runtime),
        "audits": audits(runtime),
        "reductions": {
            f"{loss}/{penalties}/accumulate{accumulate}": reductions(
                Combination(loss, penalties), accumulate, runtime
            )
            for loss, penalties in COUNTED
            for accumulate in (1, 2)
        },
        "disturbed": disturbed_run(folder, runtime),
        "other code": other_code(runtime),
    }
    torch.save(found, folder / f"found{runtime.rank}.pt")
    runtime.close()


def other_code(runtime: Runtime) -> str:
    """The error of a critic that computes something else on each rank."""
    config = config_of(Combination("wgan", "none"), 1, "float32")
    config.critic = CriticConfig("tests.helpers.users_networks:CriticOfTheRank")
    try:
        TrainingState(config, build_objective(config.objective), runtime, 0)
    except UserError as error:
        return str(error)
    return ""


def share(tensor: Tensor, runtime: Runtime) -> Tensor:
    """This rank's part of a batch that every rank can make."""
    return tensor.chunk(runtime.world_size)[runtime.rank]


def collectives(runtime: Runtime) -> dict[str, Any]:
    def fails_on_the_main_rank() -> str:
        assert runtime.is_main
        raise UserError("`data.path` is wrong")

    try:
        runtime.run_on_main(fails_on_the_main_rank)
        message = ""
    except UserError as error:
        message = str(error)
    votes = [runtime.start_max(flag) for flag in (runtime.rank, 1 - runtime.rank, 0)]
    numbers = torch.tensor([7, -(2**63), 2**63 - 1, 2**62 + 1])
    equal = runtime.is_equal_everywhere(numbers)
    numbers[3] += runtime.rank
    images = 3 + 2 * draw(GLOBAL_BATCH, 2, 3, 3, seed=3)
    return {
        "error": message,
        "run_on_main": runtime.run_on_main(lambda: [f"made on {runtime.rank}"]),
        "votes": [vote() for vote in votes],
        "gathered": runtime.all_gather_object(f"of rank {runtime.rank}"),
        "equal": equal,
        "one unit apart": runtime.is_equal_everywhere(numbers),
        "deviation": global_deviation(share(images, runtime)),
        "batch": all_gather_batch(share(images, runtime).transpose(1, 3)),
    }


def compressed_gradients(runtime: Runtime) -> dict[str, Tensor]:
    """Of a linear layer, whose gradient is the mean of its inputs."""
    gradients = {}
    for compression in ("none", "bfloat16"):
        layer = nn.Linear(64, 1, bias=False)
        wrapped = runtime.prepare(layer, compression)
        wrapped(share(draw(GLOBAL_BATCH, 64, seed=4), runtime).float()).mean().backward()
        assert layer.weight.grad is not None
        gradients[compression] = layer.weight.grad
    return gradients


def buffers(runtime: Runtime) -> dict[str, Tensor]:
    """The mean of a norm that starts with 1 plus the rank, before and after two batches."""
    norm = nn.BatchNorm1d(3).double()
    assert norm.running_mean is not None
    norm.running_mean.fill_(1.0 + runtime.rank)
    wrapped = runtime.prepare(norm)
    found = {"prepared": norm.running_mean.clone()}
    for seed in (5, 6):
        wrapped(share(draw(GLOBAL_BATCH, 3, seed=seed), runtime))
    return {**found, "trained": norm.running_mean}


def statistic_loss(weights: Tensor, images: Tensor, mean_of: Any) -> Tensor:
    """A loss with a mean over the batch within, differentiated twice (a penalty on a gradient)."""
    images = images.clone().requires_grad_()
    scores = torch.tanh(images @ weights)
    relative = torch.tanh(scores - mean_of(scores)).square()
    (slopes,) = torch.autograd.grad(relative.sum(), images, create_graph=True)
    return relative.mean() + slopes.square().sum(1).mean()


def differentiable_sums(runtime: Runtime) -> Tensor:
    """The gradient, averaged over the ranks as DDP does, of a loss with a sum over ranks in it."""
    weights = draw(5, seed=1).requires_grad_()
    images = share(draw(GLOBAL_BATCH, 5, seed=2), runtime)
    loss = statistic_loss(
        weights, images, lambda x: all_reduce_sum_with_grad(x.mean()) / runtime.world_size
    )
    (gradient,) = torch.autograd.grad(loss, weights)
    return runtime.all_reduce_sum(gradient) / runtime.world_size


def network_with_batch_norms() -> nn.Module:
    """Of torch's own layers: 2d and 1d, with and without gain and bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3, eps=1e-3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 3, 4),
        nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 1)),
    ).double()


def batch_norms(runtime: Runtime) -> dict[str, Tensor]:
    network = convert_global_batch_norm(network_with_batch_norms())
    wrapped = DistributedDataParallel(network) if runtime.world_size > 1 else network
    return trained_norms(network, wrapped, share(draw(GLOBAL_BATCH, 2, 5, 5, seed=4), runtime))


def trained_norms(network: nn.Module, wrapped: nn.Module, images: Tensor) -> dict[str, Tensor]:
    for _ in range(2):
        network.zero_grad()
        wrapped(images).square().mean().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in network.named_parameters()}
    buffers = {n: b for n, b in network.named_buffers() if "num_batches" not in n}
    return {**{n: g for n, g in gradients.items() if g is not None}, **buffers}


def after_two_cycles(combination: Combination, accumulate: int, runtime: Runtime) -> Cycle:
    config = config_of(combination, accumulate, "float32")
    objective = build_objective(config.objective)
    num_classes = CLASSES if config.training.conditional else 0
    state = TrainingState(config, objective, runtime, num_classes)
    cycle = Cycle(config, objective, runtime, state)
    for _ in range(2):  # in the second, DDP agrees on its buckets
        critic_step(cycle)
        generator_step(cycle)
    return cycle


def critic_step(cycle: Cycle) -> None:
    batch = synthetic_batch(cycle.config, cycle.runtime, cycle.state.images_seen)
    device_batch = cycle.to_device(batch)
    cycle.critic_step(device_batch, cycle.fakes(device_batch, is_logged=False), is_logged=False)


def generator_step(cycle: Cycle) -> None:
    batch = synthetic_batch(cycle.config, cycle.runtime, cycle.state.images_seen)
    cycle.generator_step(cycle.to_device(batch), fake_images=None, is_logged=False)


def audits(runtime: Runtime) -> dict[str, str]:
    """For each kind of tensor: what an audit says once rank 1's is one unit in the last place off.

    `nothing`: while all are equal. `afterwards`: once they are again.
    """
    cycle = after_two_cycles(Combination("wgan", "wgan_gp", "batch_norm"), 1, runtime)
    tensors = cycle.state.audited()
    said = {"nothing": audit(tensors, runtime)}
    for name in (
        "critic.middle.weight",
        "generator.norm.running_var",
        "ema.input.bias",
        "critic_optimizer.0.exp_avg",
        "generator_optimizer.1.exp_avg_sq",
        "generator_optimizer.step",
    ):
        tensor = tensors[name]
        element = tensor[(-1,) * tensor.ndim]  # a view, whatever the strides
        before = element.clone()
        if runtime.rank == 1:
            element.copy_(torch.nextafter(element, torch.tensor(torch.inf)))
        said[name] = audit(tensors, runtime)
        element.copy_(before)
    said["afterwards"] = audit(tensors, runtime)
    return said


def audit(tensors: dict[str, Tensor], runtime: Runtime) -> str:
    try:
        audit_replicas(tensors, runtime)
    except ReplicaError as error:
        return str(error)
    return ""


def reductions(combination: Combination, accumulate: int, runtime: Runtime) -> dict[str, Any]:
    """What a critic's and a generator's update do, in order, once DDP has settled.

    "critic forward" and "generator forward" are those through DDP, "critic reduce N" is an
    averaging of a bucket of N gradients. `collectives`: how often the profiler saw which.
    """
    cycle = after_two_cycles(combination, accumulate, runtime)
    events: list[str] = []
    updaters = {"critic": cycle.state.critic_updater, "generator": cycle.state.generator_updater}
    for name, updater in updaters.items():
        listen(name, updater, events)
    found: dict[str, Any] = {}
    for name, step in (("critic", critic_step), ("generator", generator_step)):
        events.clear()
        for parameter in cycle.state.critic.parameters():
            parameter.grad = None
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(cycle)
        found[name] = list(events)
        found[f"{name} collectives"] = {
            event.key: event.count for event in profiler.key_averages() if "c10d::" in event.key
        }
    found["parameters"] = {n: len(updater.parameters) for n, updater in updaters.items()}
    found["critic gradients after the generator's update"] = [
        name for name, p in cycle.state.critic.named_parameters() if p.grad is not None
    ]
    return found


def listen(name: str, updater: NetworkUpdater, events: list[str]) -> None:
    wrapped = updater._wrapped
    assert isinstance(wrapped, DistributedDataParallel)

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append(f"{name} reduce {len(bucket.gradients())}")
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    wrapped.register_forward_pre_hook(lambda *_: events.append(f"{name} forward"))


def disturbed_run(folder: Path, runtime: Runtime) -> dict[str, Any]:
    """A real run in which a weight of rank 1 changes by itself between two checkpoints."""
    arguments = (folder / "arguments.txt").read_text().splitlines()
    trainer = Trainer(resolve(arguments), runtime)
    checkpoints = trainer.folder.checkpoints
    run_cycle, found = trainer.cycle.run, {}

    def disturb(*arguments: Any, **settings: Any) -> dict[str, Tensor]:
        logits = run_cycle(*arguments, **settings)
        if trainer.state.images_seen == 96:
            trainer.writer.wait()
            runtime.all_gather_object(None)  # rank 0 has written the one at 64
            found["checkpoints before"] = digests(checkpoints)
            if runtime.rank == 1:
                with torch.no_grad():
                    trainer.state.critic_updater.parameters[0][0].mul_(1 + 1e-6)
        return logits

    trainer.cycle.run = disturb  # type: ignore[method-assign]
    try:
        trainer.run()
    except ReplicaError as error:
        found["error"] = str(error)
    found["images seen"] = trainer.state.images_seen
    runtime.all_gather_object(None)  # nobody looks before all have stopped
    found["checkpoints after"] = digests(checkpoints)
    return found


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
