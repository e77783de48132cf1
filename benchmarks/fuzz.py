"""Random networks are refused with a sentence, or train alike on any cluster.

    python -m benchmarks.fuzz [--quick] [--count N] [--first N] [--json FILE]

Pairs of a random critic and a random generator (`benchmarks.fuzz_networks`) train for two cycles in
float64, with a loss, penalties, a memory format, a batch size, class labels and accumulation that
are random, too: on one rank, on two (over gloo), and in a loop of plain autograd that has nothing
of ganscale's steps and derivatives. The gradients of every update and the final weights have to
agree.

A refusal has to be right, too: networks that are refused because they fail also fail in plain
autograd; those that are refused because they would depend on the cluster have a layer that was made
to, and are accepted without it.

`ratio` is the largest difference, relative to the largest element of its kind. Each row counts the
pairs that ended in one way. The exit code is 1 if any pair failed.
"""

import copy
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks.fuzz_networks import Offence
from benchmarks.invariance import (
    CLASSES,
    Combination,
    Record,
    config_of,
    gradients,
    largest_error,
    record,
    synthetic_batch,
)
from benchmarks.ranks import run_ranks
from benchmarks.report import Row, argument_parser, report
from benchmarks.rivals import formulas
from ganscale.data.images.preprocessing import to_network_range
from ganscale.errors import UserCodeError, UserError
from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.forward import update_spectral_norms
from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import Draws
from ganscale.random import drawing
from ganscale.randomness import normal
from ganscale.runtime import Runtime
from ganscale.schedules import value_at
from ganscale.schema import Config, CriticConfig, GeneratorConfig
from ganscale.training.network_setup import build_unchecked_networks

TOLERANCE, FLOAT32_TOLERANCE = 1e-8, 1e-4  # the latter for networks that cast to float32
# A difference that is this many times what a disturbance of the size of rounding makes is an error.
_DISTURBANCE, _AMPLIFICATION = 1e-14, 100
_SMALLEST = 1e-4  # gradients below may cancel to rounding
_CANCELS = 1e-10  # of the network's largest gradient
CHUNK = 250  # pairs per start of the ranks
COUNT, QUICK_COUNT = 5000, 60
_LOSSES = ("wgan", "non_saturating", "hinge", "relativistic", "relativistic_average", "lsgan")
_PENALTIES = ("none", "wgan_gp", "wgan_gp", "r1+r2", "lazy_r1", "wgan_lp")


@dataclass(frozen=True)
class Outcome:
    """How a pair ended. what: "agrees", or the first words of the refusal or the error"""

    number: int
    what: str
    error: float = 0.0


def config_of_pair(number: int) -> Config:
    chance = random.Random(number)
    combination = Combination(chance.choice(_LOSSES), chance.choice(_PENALTIES))
    config = config_of(combination, 1, "float64")
    networks = "benchmarks.fuzz_networks"
    config.generator = GeneratorConfig(f"{networks}:RandomGenerator", 6, {"number": number})
    config.critic = CriticConfig(f"{networks}:RandomCritic", {"number": number})
    config.training.memory_format = chance.choice(("channels_last", "contiguous"))
    batch = chance.choice((2, 4, 8))  # with two ranks, down to one image each
    config.training.conditional = chance.random() < 0.25
    # In plain autograd, a batch norm sees the whole batch.
    generator, critic = _networks(config)
    has_batch_norm = any(isinstance(module, GlobalBatchNorm) for module in generator.modules())
    if batch > 2 and not has_batch_norm and chance.random() < 0.25:
        config.training.accumulate = 2
    smallest = 2 * config.training.accumulate * batch_group_size(generator, critic)
    config.training.global_batch_size = max(batch, smallest)
    config.training.total_images = 4 * config.training.global_batch_size
    return config


def _networks(config: Config) -> tuple[nn.Module, nn.Module]:
    return build_unchecked_networks(config, CLASSES if config.training.conditional else 0)


_ALONE = Runtime(torch.device("cpu"), rank=0, world_size=1, _accelerator=None, _control_group=None)


class PlainNorms(TorchFunctionMode):
    """Group norms and instance norms without two errors of torch on a CPU: in channels last,
    the backward of one can crash, and that of the other is wrong for a single image."""

    def __init__(self, *, of_instances: bool = True) -> None:
        super().__init__()
        self.of_instances = of_instances

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.group_norm:
            layout = _layout_of(args[0])
            normalized = func(args[0].contiguous(), *args[1:], **kwargs)
            return normalized.contiguous(memory_format=layout)
        if func is F.instance_norm and self.of_instances:
            output = func(*args, **kwargs).detach()
            return _instance_norm(*args, **kwargs).contiguous(memory_format=_layout_of(output))
        return func(*args, **kwargs)


def _layout_of(maps: Tensor) -> torch.memory_format:
    is_last = maps.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last and not maps.is_contiguous() else torch.contiguous_format


def _instance_norm(x: Tensor, *_, weight=None, bias=None, eps=1e-5, **__) -> Tensor:
    centered = x - x.mean((2, 3), keepdim=True)
    normalized = centered / (centered.square().mean((2, 3), keepdim=True) + eps).sqrt()
    if weight is None or bias is None:
        return normalized
    return normalized * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def plain_record(
    config: Config,
    layout: torch.memory_format = torch.contiguous_format,
    disturbance: float = 0.0,
    *,
    keeps_checkpoints: bool = False,
) -> Record:
    """The gradients of every update and the final weights, by plain autograd and torch's Adam.

    disturbance: of all initial weights, relative
    keeps_checkpoints: repeats forwards where the networks ask for it, outside of PlainNorms
    """
    generator, critic = (
        network.double().to(memory_format=layout)  # type: ignore[call-overload]
        for network in _networks(config)
    )
    for module in (*generator.modules(), *critic.modules()):
        if getattr(module, "how", "") == "checkpoint" and not keeps_checkpoints:
            module.how = "plainly"  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in (*generator.parameters(), *critic.parameters()):
            parameter *= 1 + disturbance
    # torch's fused attention has no second derivatives.
    with PlainNorms(of_instances=not keeps_checkpoints), sdpa_kernel(SDPBackend.MATH):
        return _plain_record(generator, critic, config, layout)


def _plain_record(
    generator: nn.Module,
    critic: nn.Module,
    config: Config,
    layout: torch.memory_format,
) -> Record:
    settings = {"lr": 5e-3, "betas": (0.5, 0.9), "eps": 1e-2}
    optimizers = [torch.optim.Adam(n.parameters(), **settings) for n in (critic, generator)]
    loss = formulas.LOSSES[config.objective.loss.name]
    objective = build_objective(config.objective)
    batch_size, found = config.training.global_batch_size, {}
    for network in (generator, critic):
        update_spectral_norms(network)  # also before each update of the network
    for step in range(config.training.total_images // batch_size):
        batch = synthetic_batch(config, _ALONE, step * batch_size)
        real = to_network_range(batch.images).double().contiguous(memory_format=layout)

        labels = (batch.labels,) if config.training.conditional else ()

        def may_draw(purpose: str, slots: Tensor = batch.slots) -> AbstractContextManager[None]:
            return drawing(config.seed, (purpose,), slots)

        def fakes(step: str, slots: Tensor = batch.slots, labels=labels) -> Tensor:
            purpose = f"latents/{step}"
            latents = normal(config.seed, purpose, slots, config.generator.latent_dim).double()
            with may_draw(f"{step} step/generator", slots):
                return generator(latents, *labels)

        def logits(
            step: str, kind: str, images: Tensor, labels=labels, may_draw=may_draw
        ) -> Tensor:
            with may_draw(f"{step} step/{kind}"):
                return critic(images, *labels)

        with torch.no_grad():
            fake = fakes("critic")
        update_spectral_norms(critic)
        terms = loss.critic(logits("critic", "real", real), logits("critic", "fake", fake))
        value = torch.stack(terms).sum()
        draws = Draws(config.seed, batch.slots)
        for name, points in objective.penalty_points(real, fake, draws, step).items():
            weighted = config.objective.penalties[name]
            kind = {id(real): "real", id(fake): "fake"}.get(id(points), f"penalty {name}")
            value = value + value_at(weighted.weight, 0) * weighted.interval * _penalty(
                name, partial(logits, "critic", kind), points
            )
        _update(critic, value, optimizers[0])
        images = (step + 1) * batch_size
        found[f"critic gradients at {images} images"] = gradients(critic)
        if step % 2 == 1:
            update_spectral_norms(generator)
            of_fake = logits("generator", "fake", fakes("generator"))
            of_real = None
            if loss.generator_needs_real:
                of_real = logits("generator", "real", real).detach()
            _update(generator, loss.generator(of_fake, of_real), optimizers[1])
            found[f"generator gradients at {images} images"] = gradients(generator)
    for role, network in (("critic", critic), ("generator", generator)):
        found[role] = {name: p.detach().clone() for name, p in network.named_parameters()}
    return found


def _penalty(name: str, critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    points = points.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    squares = slopes.flatten(1).square().sum(1)
    if name in ("r1", "r2"):
        return squares.mean() / 2
    distances = slopes.flatten(1).norm(dim=1) - 1
    return (distances.relu() if name == "wgan_lp" else distances).square().mean()


def _update(network: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient.contiguous()
    optimizer.step()


def try_pair(number: int, runtime: Runtime, expected: Record | None) -> tuple[Outcome, Record]:
    """expected: what one rank found; None on that rank, which is compared with plain autograd"""
    config = config_of_pair(number)
    networks = _networks(config)
    try:
        found = record(config, runtime, tries_networks=True)
    except UserError as error:
        is_right = _is_right(error, networks, config, runtime)
        verdict = "refused" if is_right else "FAILED: refused without a reason"
        return Outcome(number, f"{verdict}: {_kind(str(error))}"), {}
    except Exception as error:
        return Outcome(number, f"FAILED: {type(error).__name__}: {error}"[:300]), {}
    if expected is None:
        try:
            expected = plain_record(config)
        except Exception as error:
            return Outcome(number, f"FAILED: trains, but in plain autograd {error}"[:300]), {}
    found = {kind: tensors for kind, tensors in found.items() if kind in expected}
    for role in found.keys() & {"critic", "generator"}:  # without buffers
        names = _moved_by_more_than_rounding(role, expected)
        expected[role] = {name: expected[role][name] for name in names}
        found[role] = {name: found[role][name] for name in names}
    error, where = largest_error(found, expected, _SMALLEST)
    is_float32 = any(getattr(m, "name", "") == "float32" for n in networks for m in n.modules())
    if error <= (FLOAT32_TOLERANCE if is_float32 else TOLERANCE):
        return Outcome(number, "agrees", error), found
    if not _is_finite(expected) and not _is_finite(found):
        return Outcome(number, "agrees and diverges in plain autograd, too"), found
    disturbed = plain_record(config, disturbance=_DISTURBANCE)
    by_rounding, _ = largest_error(disturbed, plain_record(config), _SMALLEST)
    if error <= _AMPLIFICATION * by_rounding:
        return Outcome(number, "agrees as far as rounding allows", error), found
    return Outcome(number, f"FAILED: differs at {where}", error), found


def _moved_by_more_than_rounding(role: str, record: Record) -> list[str]:
    """Of the network's parameters; the others' gradients cancel (a bias before a norm), and Adam
    makes steps of what is left of them."""
    largest = dict.fromkeys(record[role], 0.0)
    for kind, found in record.items():
        if kind.startswith(f"{role} gradients"):
            sizes = {name: gradient.abs().max().item() for name, gradient in found.items()}
            whole = max(_SMALLEST, *sizes.values())
            largest = {k: max(size, sizes.get(k, 0.0) / whole) for k, size in largest.items()}
    return [name for name, size in largest.items() if size > _CANCELS]


def _is_right(
    error: UserError, networks: Sequence[nn.Module], config: Config, runtime: Runtime
) -> bool:
    """Whether the networks deserve this refusal."""
    modules = [module for network in networks for module in network.modules()]
    if isinstance(error, UserCodeError):
        if "crashes on a CPU" in str(error):  # and would in plain autograd
            return True
        is_last = config.training.memory_format == "channels_last"
        try:
            layout = torch.channels_last if is_last else torch.contiguous_format
            plain_record(config, layout, keeps_checkpoints=True)
        except Exception:
            return True
        if any(getattr(module, "how", "") == "reentrant checkpoint" for module in modules):
            return True
        if _fail_on_one_image(networks, config):  # which may be a rank's share
            return True
    if "has no derivative" in str(error):
        images = torch.randn(4, *config.data.sample_shape, requires_grad=True)
        labels = (torch.arange(4) % CLASSES,) if config.training.conditional else ()
        scores = networks[1](images, *labels).sum()
        slopes = torch.autograd.grad(scores, images, allow_unused=True, materialize_grads=True)
        return not slopes[0].any()
    has_offence = any(isinstance(module, Offence) for module in modules)
    return has_offence and _are_accepted_without_offences(config, runtime)


def _fail_on_one_image(networks: Sequence[nn.Module], config: Config) -> bool:
    labels = (torch.zeros(1, dtype=torch.int64),) if config.training.conditional else ()
    inputs = torch.randn(1, config.generator.latent_dim), torch.randn(1, *config.data.sample_shape)
    try:
        for network, each in zip(networks, inputs, strict=True):
            network(each.to(next(network.parameters())), *labels)
    except Exception:
        return True
    return False


def _are_accepted_without_offences(config: Config, runtime: Runtime) -> bool:
    config = copy.deepcopy(config)
    for network in (config.generator, config.critic):
        network.options["has_offences"] = False
    try:
        record(config, runtime, tries_networks=True)
    except UserCodeError:  # which is another matter
        return True
    except UserError as error:
        return "has no derivative" in str(error)  # likewise
    return True


def _is_finite(found: Record) -> bool:
    return all(t.isfinite().all() for tensors in found.values() for t in tensors.values())


def _kind(sentence: str) -> str:
    """A refusal without what differs from network to network."""
    sentence = re.sub(r"benchmarks\.fuzz_networks:|\(/[^)]*\)|`[^`]*`|\d+", "", sentence)
    return " ".join(sentence.split()[:12])


def run_rank(folder: Path) -> None:
    """One rank of one world size: all pairs of a chunk."""
    torch.set_num_threads(1)
    runtime = Runtime.start(timeout_seconds=120)
    first, count = json.loads((folder / "task.json").read_text())
    is_alone = runtime.world_size == 1
    records: dict[int, Record] = {} if is_alone else torch.load(folder / "records.pt")
    outcomes = []
    for number in range(first, first + count):
        expected = None if is_alone else records.get(number, {})
        outcome, found = try_pair(number, runtime, expected)
        outcomes.append([outcome.number, outcome.what, outcome.error])
        if is_alone and found:
            records[number] = found
    if is_alone:
        torch.save(records, folder / "records.pt")
    if runtime.is_main:
        (folder / f"outcomes{runtime.world_size}.json").write_text(json.dumps(outcomes))
    runtime.close()


def try_pairs(first: int, count: int, seconds: float = 3600) -> list[tuple[Outcome, Outcome]]:
    """The outcomes of each pair on one rank and on two. Raises RuntimeError for a rank that dies or
    takes longer than `seconds`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps([first, count]))
        outcomes = []
        for world_size in (1, 2):
            run_ranks("benchmarks.fuzz:run_rank", folder, world_size, seconds)
            read = json.loads((folder / f"outcomes{world_size}.json").read_text())
            outcomes.append([Outcome(*each) for each in read])
    return [*zip(*outcomes, strict=True)]


def verdict(alone: Outcome, two: Outcome) -> str:
    for outcome in (alone, two):
        if outcome.what.startswith("FAILED"):
            return f"{outcome.what} (pair {outcome.number})"
    if alone.what.partition(" ")[0] != two.what.partition(" ")[0]:
        return f"FAILED: {alone.what} on one rank, {two.what} on two (pair {alone.number})"
    return max(alone.what, two.what)  # the longer one is qualified


def rows_of(outcomes: list[tuple[Outcome, Outcome]]) -> list[Row]:
    counts = Counter(verdict(*pair) for pair in outcomes)
    worst: dict[str, float] = {}
    for pair in outcomes:
        error = max(outcome.error for outcome in pair)
        worst[verdict(*pair)] = max(worst.get(verdict(*pair), 0.0), error)
    return [
        Row(f"{count} of {len(outcomes)}", "", worst[what], unit="relative error", note=what)
        for what, count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=COUNT, help="pairs of networks")
    parser.add_argument("--first", type=int, default=0, help="number of the first pair")
    chosen = parser.parse_args()
    count = QUICK_COUNT if chosen.quick else chosen.count
    outcomes: list[tuple[Outcome, Outcome]] = []
    for start in range(chosen.first, chosen.first + count, CHUNK):
        outcomes += try_pairs(start, min(CHUNK, chosen.first + count - start))
        if not chosen.quick:
            failed = [
                what for what in (verdict(*pair) for pair in outcomes) if what.startswith("FAILED")
            ]
            print(f"{len(outcomes)} pairs, {len(failed)} failed", *failed, sep="\n  ")
        report(rows_of(outcomes), chosen.json)  # so far: a long run may be ended
        sys.stdout.flush()
    return int(any(verdict(*pair).startswith("FAILED") for pair in outcomes))


if __name__ == "__main__":
    sys.exit(main())
