"""One training cycle: `n_critic` critic steps, a generator step, and the update of the EMA."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.augmentation.transformations import Drawn
from ganscale.data.batch import Batch
from ganscale.data.images.preprocessing import FLIP, random_flip, to_network_range
from ganscale.metrics.collapse import collapse_meters
from ganscale.metrics.input_gradient_norm import input_gradient_norm_meters
from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.forward import update_spectral_norms
from ganscale.networks.normalization import (
    GlobalBatchNorm,
    can_concatenate_batches,
    concatenated_batches,
)
from ganscale.objectives.clipping import clip_weights, clipped_fraction, clipped_parameters
from ganscale.objectives.generator_penalties import path_noise
from ganscale.objectives.losses import Logits
from ganscale.objectives.objective import Objective, due, panel_meters, scheduled_factors
from ganscale.objectives.penalties import Draws
from ganscale.randomness import normal, split_draws
from ganscale.runtime import Runtime, autocast, has_cheap_launches
from ganscale.schedules import value_at
from ganscale.schema import Config
from ganscale.training.augmentation import CRITIC, GENERATOR, Purposes
from ganscale.training.captured_steps import CapturedSteps, captures_steps
from ganscale.training.data_flow import has_own_real_batch
from ganscale.training.device_batch import (
    CRITIC_LATENTS,
    GENERATOR_LATENTS,
    DeviceBatch,
    draws_ahead,
)
from ganscale.training.ema import ema_decay, update_ema
from ganscale.training.fast_forward import fast_forward
from ganscale.training.network_updater import Update
from ganscale.training.state import TrainingState, is_channels_last
from ganscale.training.step_forwards import CRITIC_STEP, generator_draws

_MOST_PIXELS_TOGETHER = 1 << 21  # 5 batches of 64 images of 64 pixels are 1.3 million


def makes_fakes_together(
    config: Config, generator: nn.Module, world_size: int, device: torch.device
) -> bool:
    """Whether the fakes of several critic steps are made in one forward, so that ranks wait for
    each other's batch norm statistics once, and a device for fewer launches. Not with
    micro-batches: then memory is short; nor for large images alone, where launches matter less
    than memory."""
    if config.training.accumulate > 1 or not can_concatenate_batches(generator):
        return False
    if world_size > 1:
        return any(isinstance(module, GlobalBatchNorm) for module in generator.modules())
    images = config.objective.n_critic * config.training.global_batch_size
    pixels = images * math.prod(config.data.size)
    return not has_cheap_launches(device) and pixels <= _MOST_PIXELS_TOGETHER


class Cycle:
    """The steps of a run as functions of its state and batches; counts images and steps."""

    def __init__(
        self, config: Config, objective: Objective, runtime: Runtime, state: TrainingState
    ) -> None:
        self.config, self.objective = config, objective
        self.runtime, self.state = runtime, state
        self._draws_ahead = draws_ahead(config, objective)
        self._has_own_real_batch = has_own_real_batch(config)
        self._run_generator = fast_forward(state.generator, config.training.compile)
        ranks = runtime.world_size
        device = runtime.device
        self._makes_fakes_together = makes_fakes_together(config, state.generator, ranks, device)
        is_captured = captures_steps(config, device, ranks)
        self.captured_steps = CapturedSteps() if is_captured else None
        self._is_channels_last = is_channels_last(config.training, runtime)
        self._clipped = []
        if objective.clip is not None:
            self._clipped = clipped_parameters(state.critic, objective.clip.scope)

    @property
    def images(self) -> int:
        """Images that the critic sees in a cycle."""
        return self.config.objective.n_critic * self.config.training.global_batch_size

    def run(
        self,
        batches: Sequence[Batch | DeviceBatch],
        *,
        is_logged: bool,
        on_phase: Callable[[str], None] = lambda phase: None,
        before_ema: Callable[[Logits], None] = lambda logits: None,
    ) -> Logits:
        """Trains on one batch per critic step, and on one more if the generator's step has a batch
        of its own; returns this rank's logits in the last critic step if the cycle is logged, else
        {}.

        is_logged: adds the meters that are taken only in the last steps before a row
        on_phase: called with the name of each part of the cycle as it begins
        before_ema: called between the generator's update and the EMA's with what `run` returns
        """
        stopwatch.restart(is_logged, self.runtime.device)
        on_phase("critic")
        reuses_fakes = self.config.training.reuse_fakes
        steps = len(batches) - self._has_own_real_batch
        fakes = self.fakes_together(batches[: steps - reuses_fakes], is_logged)
        batch, fake_images, logits = None, None, {}
        for step, host_batch in enumerate(batches[:steps]):
            on_phase("critic")
            batch = self.to_device(host_batch)
            is_last = step == steps - 1
            stopwatch.is_running = is_logged and is_last
            with_graph = is_last and reuses_fakes
            fake_images = (
                fakes[step] if step < len(fakes) else self.fakes(batch, is_logged, with_graph)
            )
            logits = self.critic_step(batch, fake_images, is_logged and is_last)
        on_phase("generator")
        if self._has_own_real_batch:
            batch = self.to_device(batches[-1])
        assert batch is not None
        self.generator_step(batch, fake_images if reuses_fakes else None, is_logged)
        logits = logits if is_logged else {}
        before_ema(logits)
        self._update_ema()
        return logits

    @section("to the device")
    def to_device(self, batch: Batch | DeviceBatch) -> DeviceBatch:
        """The batch as the networks take it; one that is on the device already stays as it is."""
        if isinstance(batch, DeviceBatch):
            return batch
        device = self.runtime.device
        slots = batch.slots.to(device, non_blocking=True)
        draws = self._drawn(batch)
        images = to_network_range(batch.images.to(device, non_blocking=True)).to(self.state.dtype)
        if self.config.data.flip:
            images = random_flip(images, self.config.seed, slots, draws.get(FLIP.purpose))
        if not self._is_channels_last:
            # `contiguous` alone keeps the strides of channels last for one channel, and
            # convolutions would go on with them.
            images = images.flatten().view(images.shape)
        labels = batch.labels.to(device, non_blocking=True) if self.state.num_classes else None
        return DeviceBatch(images, labels, slots, draws)

    def _drawn(self, batch: Batch | DeviceBatch) -> Mapping[str, Tensor]:
        """What was drawn ahead for the batch, on the device."""
        if isinstance(batch, DeviceBatch):
            return batch.draws
        if batch.draws is None:
            return {}
        values = batch.draws.to(self.runtime.device, non_blocking=True)
        return split_draws(self._draws_ahead, values, len(batch.slots))

    def fakes_together(
        self, batches: Sequence[Batch | DeviceBatch], is_logged: bool
    ) -> Sequence[Tensor]:
        """The fakes of these batches from one forward, where that saves collectives; else none."""
        if not self._makes_fakes_together or len(batches) < 2:
            return ()
        device, has_classes = self.runtime.device, self.state.num_classes > 0
        slots = torch.cat([batch.slots.to(device) for batch in batches])
        labels = [b.labels.to(device) for b in batches if has_classes and b.labels is not None]
        if is_logged:  # time spent waiting for other ranks is not the fakes'
            self.runtime.barrier()
        drawn = [self._drawn(batch).get(CRITIC_LATENTS) for batch in batches]
        made = [each for each in drawn if each is not None]
        draws = {CRITIC_LATENTS: torch.cat(made)} if len(made) == len(batches) else {}
        inputs = {"slots": slots, "labels": torch.cat(labels) if labels else None, "draws": draws}

        def make(inputs: dict[str, Any], _: Mapping[str, Any]) -> Tensor:
            with concatenated_batches(len(batches)):
                return self._fakes(**inputs)

        with section("fakes together"):
            kind = "fakes", len(batches)
            return self._run_step(kind, make, inputs, {}, is_logged).chunk(len(batches))

    def fakes(self, batch: DeviceBatch, is_logged: bool, with_graph: bool = False) -> Tensor:
        """The fakes of one critic step; `with_graph` if they serve the generator's step, too."""
        if with_graph:
            update_spectral_norms(self.state.generator)
        inputs = {"slots": batch.slots, "labels": batch.labels, "draws": batch.draws}

        def make(inputs: dict[str, Any], _: Mapping[str, Any]) -> Tensor:
            with torch.set_grad_enabled(with_graph):
                return self._fakes(**inputs)

        with section("fake images"):
            return self._run_step("fakes", make, inputs, {}, is_logged or with_graph)

    def critic_step(self, batch: DeviceBatch, fake_images: Tensor, is_logged: bool) -> Logits:
        """One update of the critic; afterwards its images count as seen."""
        state, global_batch_size = self.state, self.config.training.global_batch_size
        number = state.images_seen // global_batch_size
        fake_images = fake_images.detach().to(batch.images.dtype)
        seen = state.images_seen
        numbers = {
            "rate": state.critic_updater.learning_rate(seen),
            **scheduled_factors(self.objective.penalties, seen),
        }
        probability = state.augmentation.probability(seen)
        inputs = {"batch": vars(batch), "fake_images": fake_images, "probability": probability}
        kind = "critic", probability is None, *due(self.objective.penalties, number)
        step = partial(self._update_critic, number)
        update = self._run_step(kind, step, inputs, numbers, is_logged)
        state.meters.add(*update)
        if is_logged:
            self._add_logged_meters(batch, fake_images, update.logits)
        state.images_seen += global_batch_size
        state.augmentation.observe(update.logits["real"], state.images_seen)
        return update.logits

    def _update_critic(
        self, number: int, inputs: dict[str, Any], numbers: Mapping[str, Any]
    ) -> Update:
        """The critic's `number`-th update: what a device computes of it."""
        batch, fake_images = DeviceBatch(**inputs["batch"]), inputs["fake_images"]
        update_spectral_norms(self.state.critic)
        draws = Draws(self.config.seed, batch.slots, self._offset(batch), batch.draws)
        factors = {name: numbers[name] for name in self.objective.penalties if name in numbers}
        step_inputs = {
            "real_images": batch.images,
            "fake_images": fake_images,
            "labels": batch.labels,
            "points": self.objective.penalty_points(batch.images, fake_images, draws, number),
            "factors": factors,
            "augmentation": self._augmentation(CRITIC, batch, inputs["probability"]),
            "slots": batch.slots,
        }
        seen = self.state.images_seen
        update = self.state.critic_updater.update(step_inputs, seen, numbers["rate"])
        if self.objective.clip is not None:
            clip_weights(self._clipped, self.objective.clip.value)
        return update

    def generator_step(
        self, batch: DeviceBatch, fake_images: Tensor | None, is_logged: bool
    ) -> None:
        """One update of the generator, for the slots, labels and real images of `batch`.

        fake_images: its fakes in the critic's step, with their graph; None makes new ones
        """
        state, penalties = self.state, self.objective.generator_penalties
        numbers = {
            "rate": state.generator_updater.learning_rate(state.images_seen),
            **scheduled_factors(penalties, state.images_seen),
        }
        names = due(penalties, state.steps)
        probability = state.augmentation.probability(state.images_seen)
        inputs = {"batch": vars(batch), "fake_images": fake_images, "probability": probability}
        step = partial(self._update_generator, is_logged, names)
        is_eager = is_logged or fake_images is not None  # with a graph from outside
        kind = "generator", probability is None, *names
        update = self._run_step(kind, step, inputs, numbers, is_eager)
        state.meters.add(update.meters, update.maxima, update.norms)
        if is_logged:
            state.meters.add(panel_meters("generator", self.objective.panel, update.logits))
        state.steps += 1

    def _update_generator(
        self,
        with_real_logits: bool,
        due_penalties: Sequence[str],
        inputs: dict[str, Any],
        numbers: Mapping[str, Any],
    ) -> Update:
        """What a device computes of `generator_step`."""
        batch, fake_images, latents = DeviceBatch(**inputs["batch"]), inputs["fake_images"], None
        if fake_images is None:
            update_spectral_norms(self.state.generator)
            latents = self._latents(GENERATOR_LATENTS, batch.slots, batch.draws)
        needs_real = with_real_logits or self.objective.loss.generator_needs_real
        purposes = GENERATOR if needs_real else {"fake": GENERATOR["fake"]}
        step_inputs = {
            "latents": latents,
            "fake_images": fake_images,
            "real_images": batch.images,
            "labels": batch.labels,
            "with_real_logits": with_real_logits,
            "augmentation": self._augmentation(purposes, batch, inputs["probability"]),
            "slots": batch.slots,
        }
        if due_penalties:
            step_inputs |= {
                "path_noise": path_noise(self.config.seed, batch.slots, batch.images),
                "mean_lengths": self.state.mean_lengths.of(due_penalties),
                "factors": {name: numbers[name] for name in due_penalties if name in numbers},
            }
        seen = self.state.images_seen
        update = self.state.generator_updater.update(step_inputs, seen, numbers["rate"])
        self.state.mean_lengths.observe(
            {name: update.norms[f"penalty/{name}_gradient_norm"] for name in due_penalties}
        )
        return update

    def _augmentation(
        self, purposes: Purposes, batch: DeviceBatch, probability: Tensor | None
    ) -> dict[str, Drawn] | None:
        images, draws = batch.images, batch.draws
        return self.state.augmentation.drawn(purposes, probability, batch.slots, draws, images)

    def _run_step(
        self,
        kind: Hashable,
        step: Callable[[Any, Mapping[str, Any]], Any],
        inputs: Any,
        numbers: Mapping[str, float],
        is_eager: bool,
    ) -> Any:
        """Runs a step, captured if possible; in logged cycles, which measure more, eagerly."""
        if self.captured_steps is None or is_eager:
            return step(inputs, numbers)
        return self.captured_steps.run(kind, step, inputs, numbers)

    @section("ema")
    def _update_ema(self) -> None:
        ema, state = self.config.ema, self.state
        half_life = value_at(ema.half_life_images, state.images_seen)
        decay = ema_decay(self.images, state.images_seen, half_life, ema.ramp_up)
        update_ema(state.ema, state.generator, decay)

    @section("logging")
    def _add_logged_meters(self, batch: DeviceBatch, fake_images: Tensor, logits: Logits) -> None:
        """Meters of logged steps only; does not wait for the device."""
        state, training = self.state, self.config.training
        state.meters.add(panel_meters("critic", self.objective.panel, logits))
        if self.objective.clip is not None:
            fraction = clipped_fraction(self._clipped, self.objective.clip.value)
            state.meters.add({"clip/fraction": fraction})
        if not self.objective.penalties:
            settings = training.precision, training.accumulate
            inputs = batch.images, batch.labels, *settings, batch.slots, self.config.seed
            state.meters.add(*input_gradient_norm_meters(state.critic, *inputs))
        images = batch.images, fake_images
        offsets = batch.slots - batch.slots[:1] + self._offset(batch)
        size = training.global_batch_size
        state.meters.add(collapse_meters(*images, offsets, size, self.runtime))

    def _offset(self, batch: DeviceBatch) -> int:
        """Of this rank's slots in the global batch."""
        return self.runtime.rank * len(batch.slots)

    def _fakes(self, slots: Tensor, labels: Tensor | None, draws: Mapping[str, Tensor]) -> Tensor:
        latents = self._latents(CRITIC_LATENTS, slots, draws)
        may_draw = generator_draws(self.config.seed, CRITIC_STEP, slots)
        with may_draw, autocast(self.runtime.device, self.config.training.precision):
            return self._run_generator(latents, labels)

    def _latents(self, purpose: str, slots: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        latents = draws.get(purpose)
        if latents is None:
            latents = normal(self.config.seed, purpose, slots, self.config.generator.latent_dim)
        return latents.to(self.state.dtype)
