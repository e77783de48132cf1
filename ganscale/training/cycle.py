"""One cycle of training on batches that are given: critic steps, a generator step, the average.

What the loop does between data and reports, and what benchmarks measure.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.data.batch import Batch
from ganscale.data.images.preprocessing import random_flip, to_network_range
from ganscale.errors import UserError
from ganscale.metrics.collapse import collapse_meters
from ganscale.metrics.input_gradient_norm import input_gradient_norm_meters
from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.normalization import can_concatenate_batches, concatenated_batches
from ganscale.networks.spectral import update_spectral_norms
from ganscale.objectives.clipping import clip_weights, clipped_fraction, clipped_parameters
from ganscale.objectives.objective import Objective
from ganscale.objectives.panel import critic_panel, generator_panel
from ganscale.objectives.penalties import Draws
from ganscale.randomness import normal
from ganscale.runtime import Runtime, autocast
from ganscale.schema import Config
from ganscale.training.ema import decay, update_ema
from ganscale.training.state import TrainingState
from ganscale.training.steps import make, once


@dataclass(frozen=True)
class DeviceBatch:
    """This rank's share of a global batch, as the networks take it."""

    images: Float[Tensor, "batch channels height width"]  # in [-1, 1]
    labels: Int64[Tensor, " batch"] | None  # None in unconditional training
    slots: Int64[Tensor, " batch"]


def makes_fakes_together(config: Config, generator: nn.Module, world_size: int) -> bool:
    """Whether the fakes of several critic steps are made in one forward. Not with micro-batches:
    who needs them has no memory for that."""
    return world_size > 1 and config.training.accumulate == 1 and can_concatenate_batches(generator)


class Cycle:
    """The steps of a run, as functions of its state and a batch; counts images and steps."""

    def __init__(
        self, config: Config, objective: Objective, runtime: Runtime, state: TrainingState
    ) -> None:
        self.config = config
        self.objective = objective
        self.runtime = runtime
        self.state = state
        self._make = once(partial(make, state.generator), config.training.compile)
        self._makes_fakes_together = makes_fakes_together(
            config, state.generator, runtime.world_size
        )
        self._fakes_ahead: deque[Tensor] = deque()
        self._kept_fakes: Tensor | None = None
        stopwatch.reset(runtime.device)
        self.clipped = []
        if objective.clip is not None:
            self.clipped = clipped_parameters(state.critic, objective.clip.scope)
            if not self.clipped:
                raise UserError("`objective.clip`: the critic has no weights to clip in that scope")

    @property
    def images(self) -> int:
        """Images that the critic sees in a cycle."""
        return self.config.objective.n_critic * self.config.training.global_batch_size

    def begin(self, batches: Sequence[Batch], with_panel: bool) -> None:
        """Before the critic's steps, on these batches in this order.

        The generator stays as it is until they are done, so their fakes may be made together; they
        are where ranks then wait for each other once instead of in every step.
        """
        stopwatch.run(with_panel)
        self._fakes_ahead.clear()
        ahead = batches[: len(batches) - self.config.training.reuse_fakes]
        if self._makes_fakes_together and len(ahead) > 1:
            slots = torch.cat([batch.slots for batch in ahead]).to(self.runtime.device)
            labels = torch.cat([batch.labels for batch in ahead]).to(self.runtime.device)
            if with_panel:  # what ranks wait for each other is not theirs
                self.runtime.barrier()
            with section("fakes together"), concatenated_batches(len(ahead)):
                fakes = self._fakes(slots, labels if self.state.num_classes else None)
            self._fakes_ahead.extend(fakes.chunk(len(ahead)))

    def critic_step(self, batch: DeviceBatch, with_panel: bool, keeps_fakes: bool = False) -> None:
        """One update of the critic; afterwards the batch has been seen.

        keeps_fakes: for the generator's step, with their graph
        """
        state, seed = self.state, self.config.seed
        stopwatch.is_running = with_panel
        update_spectral_norms(state.critic)
        if keeps_fakes:
            update_spectral_norms(state.generator)
        if self._fakes_ahead:
            fake_images = self._fakes_ahead.popleft()
        else:
            with section("fake images"), torch.set_grad_enabled(keeps_fakes):
                fake_images = self._fakes(batch.slots, batch.labels)
        self._kept_fakes = fake_images if keeps_fakes else None
        fake_images = fake_images.detach().to(batch.images.dtype)
        draws = Draws(seed, batch.slots, first_slot=state.images_seen)
        update = state.images_seen // self.config.training.global_batch_size
        inputs = {
            "real_images": batch.images,
            "fake_images": fake_images,
            "labels": batch.labels,
            "points": self.objective.penalty_points(batch.images, fake_images, draws, update),
        }
        meters, maxima, logits = state.critic_updater.update(inputs, state.images_seen)
        state.meters.add(meters, maxima)
        if self.objective.clip is not None:
            clip_weights(self.clipped, self.objective.clip.value)
        if with_panel:
            self._look_closely(batch, fake_images, logits)
        state.images_seen += self.config.training.global_batch_size

    @section("logging")
    def _look_closely(
        self, batch: DeviceBatch, fake_images: Tensor, logits: dict[str, Tensor]
    ) -> None:
        """What is looked at only in a step that is logged; it waits for no device."""
        state, global_batch_size = self.state, self.config.training.global_batch_size
        state.meters.logits = logits
        state.meters.add(critic_panel(self.objective.panel, logits["real"], logits["fake"]))
        if self.objective.clip is not None:
            share = clipped_fraction(self.clipped, self.objective.clip.value)
            state.meters.add({"clip/fraction": share})
        if not self.objective.penalties:
            training = self.config.training
            how = training.precision, training.accumulate
            state.meters.add(
                *input_gradient_norm_meters(state.critic, batch.images, batch.labels, *how)
            )
        if global_batch_size > 1:
            places = batch.slots - state.images_seen
            images = batch.images, fake_images
            state.meters.add(collapse_meters(*images, places, global_batch_size, self.runtime))

    def generator_step(self, batch: DeviceBatch, with_panel: bool) -> None:
        """One update of the generator, for the classes that the critic has just seen."""
        state = self.state
        kept, self._kept_fakes = self._kept_fakes, None
        latents = None
        if kept is None:
            update_spectral_norms(state.generator)
            latents = self._latents("latents/generator", batch.slots)
        inputs = {
            "latents": latents,
            "fake_images": kept,
            "real_images": batch.images,
            "labels": batch.labels,
            "with_real_logits": with_panel,
        }
        meters, maxima, logits = state.generator_updater.update(inputs, state.images_seen)
        state.meters.add(meters, maxima)
        if with_panel:
            state.meters.add(generator_panel(self.objective.panel, logits["fake"], logits["real"]))
        state.steps += 1

    @section("ema")
    def update_ema(self) -> None:
        """Moves the averaged generator over the images of a cycle."""
        ema, state = self.config.ema, self.state
        kept = decay(self.images, state.images_seen, ema.half_life_images, ema.ramp_up)
        update_ema(state.ema, state.generator, kept)

    @section("to the device")
    def on_device(self, batch: Batch) -> DeviceBatch:
        device = self.runtime.device
        slots = batch.slots.to(device, non_blocking=True)
        images = to_network_range(batch.images.to(device, non_blocking=True)).to(self.state.dtype)
        if self.config.data.flip:
            images = random_flip(images, self.config.seed, slots)
        if self.config.training.memory_format == "contiguous":
            images = images.contiguous()
        labels = batch.labels.to(device, non_blocking=True) if self.state.num_classes else None
        return DeviceBatch(images, labels, slots)

    def _fakes(self, slots: Tensor, labels: Tensor | None) -> Tensor:
        latents = self._latents("latents/critic", slots)
        with autocast(self.runtime.device, self.config.training.precision):
            return self._make(latents, labels)

    def _latents(self, purpose: str, slots: Tensor) -> Tensor:
        latents = normal(self.config.seed, purpose, slots, self.config.generator.latent_dim)
        return latents.to(self.state.dtype)
