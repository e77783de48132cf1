"""The augmentation of a run: its pipeline, its probability over time, and its draws."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.augmentation.adaptive import AdaptiveProbability
from ganscale.augmentation.pipelines import build_pipeline
from ganscale.augmentation.transformations import Drawn, Pipeline
from ganscale.errors import UserError
from ganscale.objectives.losses import Loss, total
from ganscale.objectives.objective import Objective
from ganscale.random import drawing, normal_like
from ganscale.randomness import Draw
from ganscale.runtime import Runtime
from ganscale.schedules import value_at
from ganscale.schema import Config

Purposes = Mapping[str, str]
"""The purpose of the draws for each kind of images. Images of one slot are augmented differently in
the critic's and in the generator's step, and real ones differently from fakes."""

CRITIC: Purposes = {kind: f"augmentation/critic {kind}" for kind in ("real", "fake")}
GENERATOR: Purposes = {kind: f"augmentation/generator {kind}" for kind in ("real", "fake")}


def run_pipeline(config: Config) -> Pipeline | None:
    """Raises UserError as `build_pipeline` does."""
    settings = config.augmentation
    if settings.pipeline == "none":
        return None
    return build_pipeline(settings.pipeline, settings.strengths, config.data.channels)


def augmentation_draws(config: Config, objective: Objective) -> tuple[Draw, ...]:
    """The random numbers of a batch that every cycle needs; noise is not among them."""
    pipeline = run_pipeline(config)
    if pipeline is None:
        return ()
    purposes = [*CRITIC.values(), GENERATOR["fake"]]
    if objective.loss.generator_needs_real:
        purposes.append(GENERATOR["real"])
    return tuple(map(pipeline.draw, purposes))


class Augmentation:
    """What is applied to images in front of the critic in a run, if anything."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        runtime: Runtime,
        guard_tripped: Float[Tensor, ""],
    ) -> None:
        """Raises UserError as `check_augmentation` does."""
        check_augmentation(config, objective)
        self._config, self._device = config, runtime.device
        self.pipeline = run_pipeline(config)
        self._controller = None
        self._constant: tuple[float, Tensor] | None = None
        settings = config.augmentation
        if self.pipeline is not None and settings.adaptive is not None:
            start = value_at(settings.probability, 0)
            self._controller = AdaptiveProbability(settings.adaptive, start, runtime, guard_tripped)

    def probability(self, images_seen: int) -> Float[Tensor, ""] | None:
        """On the device; None if nothing is applied."""
        if self.pipeline is None:
            return None
        if self._controller is not None:
            return self._controller.probability()
        value = value_at(self._config.augmentation.probability, images_seen)
        if value == 0:
            return None
        if self._constant is None or self._constant[0] != value:
            tensor = torch.full((), value, dtype=torch.float64, device=self._device)
            self._constant = value, tensor
        return self._constant[1]

    def drawn(
        self,
        purposes: Purposes,
        probability: Tensor | None,
        slots: Int64[Tensor, " batch"],
        ahead: Mapping[str, Tensor],
        like: Float[Tensor, "batch *sample"],
    ) -> dict[str, Drawn] | None:
        """What is drawn for images of these slots, by their kind; None if nothing is applied.

        ahead: numbers by purpose that were made ahead; like: images of the same shape and dtype
        """
        if self.pipeline is None or probability is None:
            return None
        seed, numbers = self._config.seed, []
        for purpose in purposes.values():
            drawn = ahead.get(purpose)
            numbers.append(self.pipeline.draw(purpose).at(seed, slots) if drawn is None else drawn)
        parameters = self.pipeline.parameters(torch.cat(numbers), probability).split(len(slots))
        found: dict[str, Drawn] = {
            kind: {"parameters": each} for kind, each in zip(purposes, parameters, strict=True)
        }
        if self.pipeline.adds_noise:
            for kind, purpose in purposes.items():
                with drawing(seed, (purpose,), slots):
                    found[kind]["noise"] = normal_like(like, "noise")
        return found

    def observe(self, real_logits: Tensor, images_seen: int) -> None:
        """Takes this rank's logits of a critic step, after which so many images were seen."""
        if self._controller is not None:
            self._controller.observe(real_logits, images_seen)

    def metrics(self, images_seen: int) -> dict[str, float]:
        """What a row shows of it. Waits for the device."""
        if self.pipeline is None:
            return {}
        probability = self.probability(images_seen)
        row = {"augment/probability": 0.0 if probability is None else probability.item()}
        return row if self._controller is None else row | self._controller.metrics()

    def audited(self) -> dict[str, Tensor]:
        """What has to be the same bits on all ranks."""
        return {} if self._controller is None else self._controller.audited()

    def state_dict(self) -> dict[str, Any] | None:
        """Collective; waits for the device."""
        return None if self._controller is None else self._controller.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """state: None of a run that had no controller"""
        if self._controller is not None:
            self._controller.load_state_dict(state)


def check_augmentation(config: Config, objective: Objective) -> None:
    """Raises UserError for settings that do not fit the data or the loss."""
    if run_pipeline(config) is not None and config.augmentation.adaptive is not None:
        _check_sign_has_a_meaning(config.objective.loss.name, objective.loss)


def _check_sign_has_a_meaning(name: str, loss: Loss) -> None:
    """Raises UserError unless logits of 0 are those that say nothing: among equal logits of real
    and fake images, the critic's loss is smallest there."""

    def of_equal(logit: float) -> float:
        logits = torch.full((2,), logit, dtype=torch.float64)
        return total(loss.critic(logits, logits)).item()

    far, near, middle = (min(of_equal(x), of_equal(-x)) for x in (3.0, 0.5, 0.0))
    if middle > near + 1e-6 or middle > far - 1e-6:
        raise UserError(
            "`augmentation.adaptive` follows the sign of real logits, but among equal logits the "
            f"loss {name} with these options is not smallest at 0: use minimax, non_saturating "
            "(with little smoothing), hinge or lsgan with a = -b, or set only "
            "`augmentation.probability`"
        )
