"""ganscale's own cycle on one batch in memory, which rivals are compared with."""

import copy
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals.loops import Task
from benchmarks.rivals.stylegan2 import plain_network
from benchmarks.timing import interleaved, step_clock, wall_clock
from ganscale.config import resolve
from ganscale.objectives.objective import build_objective
from ganscale.randomness import draw_together, split_draws
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle
from ganscale.training.data_flow import batches_per_cycle, data_position
from ganscale.training.device_batch import DeviceBatch, draws_ahead
from ganscale.training.state import TrainingState

CONFIGS = Path(__file__).parent.parent / "configs"
ROLES = "generator", "critic"


def config_of(objective: str, network: str, batch: int, *settings: str) -> Config:
    """A run with configs/objective/OBJECTIVE.yaml, `network` (a kind and its resolution, such as
    dcgan32, resnet256 or stylegan2-32) and `settings`.

    DCGAN has its usual width of 64; ResNet has 32, with which a cycle takes as long; R3GAN and
    StyleGAN2 those of their presets for 32 pixels. StyleGAN2's R1 is lazy, and then it has path
    length, too.
    """
    kind, resolution = kind_of(network)
    if kind == "r3gan":
        networks = ["r3gan_emoji32.yaml", "augmentation.pipeline=none"]
        networks += ["training.precision=float32"]
        networks += ["training.penalty_precision=float32", "training.generator_real=critic"]
    elif kind == "stylegan2":  # its preset augments images
        networks = [f"objective/{objective}.yaml", "data.path=data/emoji"]
        networks += ["generator.latent_dim=64", "generator.options.style_dim=64"]
        networks += [f"{role}.target=stylegan2" for role in ROLES]
        networks += [f"{role}.options.widths=[128,64,32,16]" for role in ROLES]
        networks += ["training.total_images=1M"]
        if objective == "r1":  # as published
            networks += ["objective.penalties.r1.interval=16"]
            networks += ["objective.generator_penalties.path_length={weight: 2, interval: 4}"]
    else:
        width = {"dcgan": 64, "resnet": 32}[kind]
        networks = ["resnet32.yaml", "generator.latent_dim=64"]
        networks += [f"{role}.target={kind}" for role in ROLES]
        networks += [f"{role}.options.width={width}" for role in ROLES]
    base, *options = networks
    return resolve(
        [
            str(CONFIGS / base),
            str(CONFIGS / "objective" / f"{objective}.yaml"),
            *options,
            f"data.resolution={resolution}",
            f"training.global_batch_size={batch}",
            *settings,
        ]
    ).config


def lazy_cycles(config: Config) -> int:
    """After how many cycles all lazy penalties have been taken equally often."""
    objective = config.objective
    penalties = [*objective.penalties.values(), *objective.generator_penalties.values()]
    return math.lcm(*(penalty.interval for penalty in penalties))


def kind_of(network: str) -> tuple[str, str]:
    """("dcgan", "32") of "dcgan32", ("stylegan2", "32") of "stylegan2-32"."""
    kind = network.rstrip("0123456789")
    return kind.rstrip("-"), network.removeprefix(kind)


def narrow(network: str, width: int) -> list[str]:
    """Settings with which the networks have `width` channels at their highest resolution, and no
    groups of more than two images."""
    kind, _ = kind_of(network)
    options = {"r3gan": ["widths", "group_width"], "stylegan2": ["widths"]}.get(kind, ["width"])
    found = [f"{role}.options.{option}={width}" for role in ROLES for option in options]
    return [*found, "critic.options.group_size=2"] if kind == "stylegan2" else found


def random_images(config: Config, device: torch.device) -> Tensor:
    """A batch of noise in [-1, 1], (batch, channels, height, width) float32."""
    shape = (config.training.global_batch_size, *config.data.sample_shape)
    return (torch.rand(shape) * 2 - 1).to(device)


class Ours:
    """The package's own cycle, with its random numbers, average, norms and meters."""

    def __init__(self, config: Config, runtime: Runtime, images: Tensor) -> None:
        objective = build_objective(config.objective)
        self.state = TrainingState(config, objective, runtime, num_classes=0)
        self.cycle = Cycle(config, objective, runtime, self.state)
        self._config, self._objective = config, objective
        self._images = images.to(self.state.dtype)
        if config.training.memory_format == "channels_last":
            self._images = self._images.contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        self.run(self.batches())

    def batches(self) -> list[DeviceBatch]:
        """Of the next cycle, as a loader prepares them: with random numbers made on the host."""
        draws, batches = draws_ahead(self._config, self._objective), []
        start = data_position(self._config, self.state.images_seen)
        for step in range(batches_per_cycle(self._config)):
            first = start + step * self._config.training.global_batch_size
            slots = first + torch.arange(len(self._images))
            values = draw_together(draws, self._config.seed, slots).to(self._images.device)
            drawn = split_draws(draws, values, len(slots))
            batches.append(DeviceBatch(self._images, None, slots.to(values.device), drawn))
        return batches

    def run(self, batches: list[DeviceBatch]) -> None:
        self.cycle.run(batches, is_logged=False)

    def close(self) -> None:
        pass

    def task(self) -> Task:
        """The same for a rival: copies of the networks as they are now, in the usual layout."""
        usual = torch.contiguous_format
        networks = copy.deepcopy((self.state.generator, self.state.critic))
        generator, critic = (
            plain_network(network.to(memory_format=usual))  # type: ignore[call-overload]
            for network in networks
        )
        return Task(self._config, generator, critic, self._images.contiguous())


def next_cycle(contestant: Callable[[], object]) -> Callable[[], object]:
    """Of ours or a rival, without what a loader's process does for it meanwhile."""
    if isinstance(contestant, Ours):
        return partial(contestant.run, contestant.batches())
    return contestant


def next_cycles(contestant: Callable[[], object], count: int) -> Callable[[], None]:
    """`next_cycle`, several times. A loader prepares all of them for the same place in the data."""
    runs = [next_cycle(contestant) for _ in range(count)]

    def run() -> None:
        for each in runs:
            each()

    return run


def cycles_per_turn(contestant: Callable[[], object], seconds: float = 0.05) -> int:
    """How many cycles take about that long, 20 at most."""
    times = interleaved({"": contestant}, 3, clock=step_clock, prepare=next_cycle)[""]
    return min(20, max(1, round(seconds / statistics.median(times))))


def cycles_within(seconds: float, config: Config, runtime: Runtime) -> int:
    """How many bare cycles take about that long."""
    own = Ours(config, runtime, random_images(config, runtime.device))
    times = interleaved({"": own}, 30, clock=wall_clock, prepare=next_cycle, limit_seconds=3)[""]
    return max(1, round(seconds / statistics.median(times)))
