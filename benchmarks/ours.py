"""ganscale's own cycle on one batch that lies ready, which others are held against."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals.loops import Task
from ganscale.config import resolve
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle, DeviceBatch
from ganscale.training.state import TrainingState

CONFIGS = Path(__file__).parent.parent / "configs"


def config_of(objective: str, network: str, batch: int, *settings: str) -> Config:
    """A run of configs/objective/OBJECTIVE.yaml with `network` (dcgan32, resnet64: a kind and its
    resolution); `settings` come on top.

    DCGAN has its usual width of 64; ResNet 32, with which a cycle takes as long.
    """
    kind, resolution = network[:-2], network[-2:]
    width = {"dcgan": 64, "resnet": 32}[kind]
    return resolve(
        [
            str(CONFIGS / "resnet32.yaml"),
            str(CONFIGS / "objective" / f"{objective}.yaml"),
            f"generator.target={kind}",
            f"critic.target={kind}",
            f"generator.options.width={width}",
            f"critic.options.width={width}",
            "generator.latent_dim=64",
            f"data.resolution={resolution}",
            f"training.global_batch_size={batch}",
            "training.schedule=constant",
            *settings,
        ]
    ).config


def random_images(config: Config, device: torch.device) -> Tensor:
    """A batch of noise in [-1, 1], (batch, channels, height, width) float32."""
    size = config.data.resolution
    shape = (config.training.global_batch_size, config.data.channels, size, size)
    return (torch.rand(shape) * 2 - 1).to(device)


class Ours:
    """The package's own cycle, with its random numbers, average, norms and meters."""

    def __init__(self, config: Config, runtime: Runtime, images: Tensor) -> None:
        objective = build_objective(config.objective)
        self.state = TrainingState(config, objective, runtime, num_classes=0)
        self.cycle = Cycle(config, objective, runtime, self.state)
        self._config = config
        self._images = images.to(self.state.dtype)
        if config.training.memory_format == "channels_last":
            self._images = self._images.contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        batch = self._config.training.global_batch_size
        steps = range(self._config.objective.n_critic)
        batches = [DeviceBatch(self._images, None, self._slots(step * batch)) for step in steps]
        self.cycle.run(batches, is_logged=False)

    def close(self) -> None:
        pass

    def task(self) -> Task:
        """The same for a rival: copies of the networks as they are now, in the usual layout."""
        usual = torch.contiguous_format
        return Task(
            self._config,
            copy.deepcopy(self.state.generator).to(memory_format=usual),  # type: ignore[call-overload]
            copy.deepcopy(self.state.critic).to(memory_format=usual),  # type: ignore[call-overload]
            self._images.contiguous(),
        )

    def _slots(self, after: int) -> Tensor:
        first = self.state.images_seen + after
        return first + torch.arange(len(self._images), device=self._images.device)
