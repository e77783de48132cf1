"""The state of a run: networks, optimizers, EMA and counters. There is no random state."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ganscale.checkpoints.checkpoint import load_state, load_tensors
from ganscale.config import is_within
from ganscale.errors import UserError
from ganscale.metrics.health import Health
from ganscale.metrics.meters import MeterAccumulator
from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.fingerprint import Fingerprint, fingerprint
from ganscale.networks.forward import update_spectral_norms
from ganscale.objectives.objective import Objective, scheduled_weights
from ganscale.runtime import Runtime, is_out_of_memory, weights_dtype
from ganscale.schedules import Schedule
from ganscale.schema import Config, TrainingConfig
from ganscale.training.augmentation import Augmentation
from ganscale.training.critic_step import CriticStep
from ganscale.training.ema import ema_copy
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.mean_lengths import MeanLengths
from ganscale.training.network_setup import build_networks
from ganscale.training.network_updater import NetworkUpdater, NonFiniteGuard
from ganscale.training.step_forwards import precisions

Files = dict[str, dict[str, torch.Tensor]]


def checkpoint_files(
    generator: nn.Module,
    critic: nn.Module,
    ema: nn.Module,
    generator_optimizer: dict[str, torch.Tensor],
    critic_optimizer: dict[str, torch.Tensor],
) -> Files:
    """The tensors of a checkpoint by file."""
    return {
        "generator": generator.state_dict(),
        "critic": critic.state_dict(),
        "ema": ema.state_dict(),
        "generator_optimizer": generator_optimizer,
        "critic_optimizer": critic_optimizer,
    }


def is_channels_last(training: TrainingConfig, runtime: Runtime) -> bool:
    """Not for single images on a CPU: in that layout, torch (2.8 to 2.14) returns wrong gradients
    of norms and of the weights of grouped convolutions for them."""
    images = training.global_batch_size // (runtime.world_size * training.accumulate)
    is_at_risk = runtime.device.type == "cpu" and images == 1
    return training.memory_format == "channels_last" and not is_at_risk


class TrainingState:
    """Everything that a checkpoint holds, ready to train."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        runtime: Runtime,
        num_classes: int,
        networks: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        """networks: (generator, critic), by default those of the config, tried once

        Raises UserError as `build_networks` does.
        """
        self.generator, self.critic = networks or build_networks(
            config, objective, num_classes, runtime.device, runtime.world_size
        )
        self.dtype = weights_dtype(config.training.precision)
        for network in (self.generator, self.critic):
            network.to(self.dtype)
            update_spectral_norms(network)
            if is_channels_last(config.training, runtime):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.non_finite_guard = NonFiniteGuard(runtime.device)
        guard_tripped = self.non_finite_guard.tripped
        self.augmentation = Augmentation(config, objective, runtime, guard_tripped)
        self.group_size = batch_group_size(self.generator, self.critic)
        shared = config.training, runtime, self.non_finite_guard, self.group_size
        of_steps = objective, *precisions(config.training), config.training.compile
        draws: dict[str, Any] = {"pipeline": self.augmentation.pipeline, "seed": config.seed}
        critic_step = CriticStep(self.critic, *of_steps, **draws)
        generator_step = GeneratorStep(self.generator, self.critic, *of_steps, **draws)
        optimizers = config.optimizer
        self.critic_updater = NetworkUpdater(
            "critic", critic_step, self.critic, optimizers.critic, *shared
        )
        self.generator_updater = NetworkUpdater(
            "generator", generator_step, self.generator, optimizers.generator, *shared
        )
        self.updaters = self.critic_updater, self.generator_updater
        self.mean_lengths = MeanLengths(objective.generator_penalties, runtime, guard_tripped)
        self.ema = ema_copy(self.generator)
        self.num_classes = num_classes
        self._config, self._objective = config, objective
        self.meters = MeterAccumulator(runtime)
        self.images_seen = 0
        self.steps = 0  # generator updates
        # Bad samples by (shard, reason), on all ranks and in all sessions.
        self.bad_samples: Counter[tuple[str, str]] = Counter()
        self.health = Health()
        self.best_figures: dict[str, Any] = {}  # see `training.evaluations`
        self.seconds = 0.0  # of training, over all sessions of the run
        self.sessions: list[dict[str, Any]] = []  # where each session began, on how many ranks
        self._check_equal_code(runtime)

    def files(self) -> Files:
        return checkpoint_files(
            self.generator,
            self.critic,
            self.ema,
            self.generator_updater.optimizer.tensors(),
            self.critic_updater.optimizer.tensors(),
        )

    def numbers(self) -> dict[str, Any]:
        """The plain numbers of a checkpoint. On every rank: it sums the meters over the ranks."""
        return {
            "images_seen": self.images_seen,
            "num_classes": self.num_classes,
            "steps": self.steps,
            "bad_samples": [[*key, count] for key, count in sorted(self.bad_samples.items())],
            "seconds": self.seconds,
            "sessions": self.sessions,
            "health": asdict(self.health),
            "best_figures": self.best_figures,
            "meters": self.meters.state(),
            "augmentation": self.augmentation.state_dict(),
            "mean_lengths": self.mean_lengths.state_dict(),
        }

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What each network computes, to find changes of its code when a checkpoint is loaded."""
        return {name: found.to_json() for name, found in self._fingerprints().items()}

    def _fingerprints(self) -> dict[str, Fingerprint]:
        latents, images = (self._config.generator.latent_dim,), self._config.data.sample_shape
        return {
            "generator": fingerprint(self.generator, latents, self.num_classes),
            "ema": fingerprint(self.ema, latents, self.num_classes),
            "critic": fingerprint(self.critic, images, self.num_classes, is_critic=True),
        }

    def load(self, folder: Path) -> None:
        """Takes everything from a checkpoint that was verified.

        Raises UserError where networks or optimizers are not those that were saved.
        """
        try:
            for name in ("generator", "critic", "ema"):
                getattr(self, name).load_state_dict(load_tensors(folder, name))
            for updater in self.updaters:
                tensors = load_tensors(folder, f"{updater.name}_optimizer")
                updater.optimizer.load_tensors(tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{folder} does not fit these settings ({' '.join(str(error).split())[:300]}): "
                "continue with the networks and kinds of optimizer that it was trained with"
            ) from error
        numbers = load_state(folder)
        if "fingerprints" in numbers:  # older versions stored none
            self._check_code(numbers["fingerprints"])
        self.bad_samples = Counter({(shard, why): n for shard, why, n in numbers["bad_samples"]})
        self.images_seen, self.steps = numbers["images_seen"], numbers["steps"]
        self.seconds, self.sessions = numbers["seconds"], numbers["sessions"]
        self.health = Health(**numbers.get("health", {}))
        self.best_figures = numbers.get("best_figures", {})
        self.meters.load_state(numbers["meters"])
        self.augmentation.load_state_dict(numbers.get("augmentation"))
        self.mean_lengths.load_state_dict(numbers.get("mean_lengths", {}))

    def _check_equal_code(self, runtime: Runtime) -> None:
        """Raises UserError if the networks of two ranks compute different things."""
        if runtime.world_size == 1:
            return
        first, *others = runtime.all_gather_object(self._fingerprints())
        for rank, other in enumerate(others, start=1):
            for name, found in other.items():
                if not found.is_close(first[name]):
                    raise UserError(
                        f"the {name} of rank {rank} computes something else than that of rank 0: "
                        "is its code the same on all machines, and independent of the rank?"
                    )

    def _check_code(self, stored: dict[str, Any]) -> None:
        """Raises UserError if a loaded network computes something else than when it was saved."""
        for name, found in self._fingerprints().items():
            role = "critic" if name == "critic" else "generator"
            key, target = f"{role}.target", getattr(self._config, role).target
            if not is_within(key, self._config.resume.allow):
                found.check(stored.get(name), f"{role} {target}", f"resume.allow=[{key}]")

    def scheduled(self) -> dict[str, float]:
        """The learning rates and the other numbers that have a schedule, by metric: those of the
        next step."""
        seen, half_life = self.images_seen, self._config.ema.half_life_images
        values = {
            f"optim/{updater.name}_{name}": value
            for updater in self.updaters
            for name, value in updater.scheduled(seen).items()
        }
        for penalties in (self._objective.penalties, self._objective.generator_penalties):
            weights = scheduled_weights(penalties, seen)
            values |= {f"penalty/{name}_weight": weight for name, weight in weights.items()}
        if isinstance(half_life, Schedule):
            values["optim/ema_half_life_images"] = half_life.at(seen)
        return values

    def averaging_seconds(self) -> dict[str, float]:
        """Of the last logged updates by network (see NetworkUpdater). Waits for the device."""
        return {updater.name: updater.averaging_seconds() for updater in self.updaters}

    def audited(self) -> dict[str, torch.Tensor]:
        """What has to be the same bits on all ranks, by name."""
        files = self.files().items()
        tensors = {f"{file}.{k}": t for file, found in files for k, t in found.items()}
        return tensors | self.augmentation.audited() | self.mean_lengths.audited()

    def is_finite(self) -> bool:
        """Whether all weights and buffers are numbers."""
        tensors = [*self.generator.state_dict().values(), *self.critic.state_dict().values()]
        return all(bool(t.isfinite().all()) for t in tensors)
