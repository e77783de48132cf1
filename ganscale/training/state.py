"""The state of a run: networks, optimizers, EMA and counters. There is no random state."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ganscale.checkpoints.checkpoint import load_state, load_tensors
from ganscale.errors import UserError
from ganscale.metrics.health import Health
from ganscale.metrics.meters import MeterAccumulator
from ganscale.networks.spectral import advance_power_iterations
from ganscale.objectives.objective import Objective
from ganscale.runtime import Runtime, weights_dtype
from ganscale.schema import Config
from ganscale.training.ema import ema_copy
from ganscale.training.network_setup import build_networks
from ganscale.training.network_updater import NetworkUpdater, NonFiniteGuard
from ganscale.training.optimizers import (
    lazy_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from ganscale.training.steps import CriticStep, GeneratorStep


class TrainingState:
    """Everything that a checkpoint holds, ready to train."""

    def __init__(
        self, config: Config, objective: Objective, runtime: Runtime, num_classes: int
    ) -> None:
        """Builds the networks from the seed, the same on every rank. Raises UserError for networks
        that cannot be built, do not fit the data or do not fit each other."""
        self.generator, self.critic = build_networks(config, num_classes)
        self.dtype = weights_dtype(config.training.precision)
        self.generator.to(self.dtype)
        self.critic.to(self.dtype)
        for network in (self.generator, self.critic):
            advance_power_iterations(network)
        if config.training.memory_format == "channels_last":
            self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        self.non_finite_guard = NonFiniteGuard(runtime.device)
        precision, penalty_precision = config.training.precision, "float32"
        compiles = config.training.compile
        if config.training.penalty_precision == "autocast":
            penalty_precision = precision
        self.critic_updater = NetworkUpdater(
            "critic",
            CriticStep(self.critic, objective, precision, penalty_precision, compiles),
            self.critic,
            lazy_optimizer(config.optimizer.critic, objective.lazy_ratio),
            config.training,
            runtime,
            self.non_finite_guard,
        )
        self.generator_updater = NetworkUpdater(
            "generator",
            GeneratorStep(self.generator, self.critic, objective, precision, compiles),
            self.generator,
            config.optimizer.generator,
            config.training,
            runtime,
            self.non_finite_guard,
        )
        self.ema = ema_copy(self.generator)
        self.num_classes = num_classes
        self.meters = MeterAccumulator(runtime)
        self.images_seen = 0
        self.steps = 0  # generator updates
        # Unreadable samples by (shard, reason), on all ranks and in all sessions.
        self.bad_samples: Counter[tuple[str, str]] = Counter()
        self.health = Health()
        self.seconds = 0.0  # of training, over all sessions of the run
        self.sessions: list[dict[str, Any]] = []  # where each session began, on how many ranks

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint by file."""
        return {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict(),
            "generator_optimizer": optimizer_tensors(self.generator_updater.optimizer),
            "critic_optimizer": optimizer_tensors(self.critic_updater.optimizer),
        }

    def numbers(self) -> dict[str, Any]:
        """The plain numbers of a checkpoint. On every rank: it sums the meters over the ranks."""
        return {
            "images_seen": self.images_seen,
            "num_classes": self.num_classes,
            "steps": self.steps,
            "bad_samples": [[*place, count] for place, count in sorted(self.bad_samples.items())],
            "seconds": self.seconds,
            "sessions": self.sessions,
            "health": asdict(self.health),
            "meters": self.meters.state(),
        }

    def load(self, folder: Path) -> None:
        """Takes everything from a checkpoint that was verified.

        Raises UserError where networks or optimizers are not those that were saved.
        """
        try:
            for name in ("generator", "critic", "ema"):
                getattr(self, name).load_state_dict(load_tensors(folder, name))
            for updater in (self.generator_updater, self.critic_updater):
                load_optimizer_tensors(
                    updater.optimizer, load_tensors(folder, f"{updater.name}_optimizer")
                )
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{folder} does not fit these settings ({' '.join(str(error).split())[:300]}): "
                "continue with the networks and kinds of optimizer that it was trained with"
            ) from error
        numbers = load_state(folder)
        self.bad_samples = Counter(
            {(shard, reason): count for shard, reason, count in numbers["bad_samples"]}
        )
        self.images_seen, self.steps = numbers["images_seen"], numbers["steps"]
        self.seconds, self.sessions = numbers["seconds"], numbers["sessions"]
        self.health = Health(**numbers.get("health", {}))
        self.meters.load_state(numbers["meters"])

    def averaging_seconds(self) -> dict[str, float]:
        """Of the last logged updates by network (see NetworkUpdater). Waits for the device."""
        updaters = self.critic_updater, self.generator_updater
        return {updater.name: updater.averaging_seconds() for updater in updaters}

    def audited(self) -> dict[str, torch.Tensor]:
        """What has to be the same bits on all ranks, by name."""
        return {
            f"{f}.{k}": tensor for f, file in self.files().items() for k, tensor in file.items()
        }

    def is_finite(self) -> bool:
        """Whether all weights and buffers are numbers."""
        tensors = [
            t for f in ("generator", "critic") for t in getattr(self, f).state_dict().values()
        ]
        return all(bool(t.isfinite().all()) for t in tensors)
