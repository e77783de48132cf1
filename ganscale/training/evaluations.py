"""The evaluations of a run: of the EMA generator, at multiples of `evaluation.every_images`."""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ganscale.data.dataset import DataSet
from ganscale.errors import OutOfMemoryError, UnavailableError, UserError
from ganscale.evaluation.evaluator import Evaluator, check_evaluation
from ganscale.evaluation.figures import IDENTITY, is_lower_better
from ganscale.evaluation.images import GeneratedImages, describe_labels, labels_for
from ganscale.evaluation.rounds import Interrupted, OnRound
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.state import TrainingState

logger = logging.getLogger(__name__)

EVALUATED = "eval/failed"
"""Every row of an evaluation has this name: how many have failed so far."""


class Evaluation(NamedTuple):
    """row: the figures with what they depend on, or without them if it failed
    is_new_best: whether `checkpoint.best` is among the figures and better than ever
    """

    row: dict[str, Any]
    is_new_best: bool


class Evaluations:
    def __init__(
        self, config: Config, data: DataSet, runtime: Runtime, state: TrainingState
    ) -> None:
        """Raises UserError for an evaluation that cannot be made, and for a `checkpoint.best` that
        it does not give."""
        self._config, self._data, self._state = config, data, state
        self._is_main = runtime.is_main
        self._evaluator: Evaluator | None = None
        if config.evaluation.every_images:
            classes = describe_labels(data.manifest, config.training.conditional)
            self._evaluator = Evaluator(
                config.evaluation, config.data, data.manifest, runtime, classes=classes
            )
        _check_best(config, self._evaluator.names if self._evaluator is not None else [])

    def is_due(self, before: int, after: int) -> bool:
        """Whether one is due once the images seen have grown from `before` to `after`."""
        every = self._config.evaluation.every_images
        is_last = after >= self._config.training.total_images
        return every > 0 and (is_last or before // every != after // every)

    def make(self, is_stopped: Callable[[], bool], on_round: OnRound) -> Evaluation | None:
        """Evaluates; None when stopped meanwhile. A failure is logged and counted, and training
        goes on. Collective."""
        assert self._evaluator is not None
        config, state = self._config, self._state
        count = config.evaluation.samples
        labels = labels_for(self._data.manifest, count, state.num_classes)
        latent_dim = config.generator.latent_dim
        images = GeneratedImages(state.ema, config.seed, count, latent_dim, labels)
        row: dict[str, Any] = {}
        try:
            row = self._evaluator.evaluate(images, is_stopped, on_round).row()
        except Interrupted:
            return None
        except (UserError, UnavailableError, OutOfMemoryError) as error:
            state.health.failed_evaluations += 1
            if self._is_main:
                seen = f"{state.images_seen:,}"
                logger.error("the evaluation at %s images failed: %s", seen, error)
        is_new_best = config.checkpoint.best in self._note_best(row)
        return Evaluation(row | {EVALUATED: state.health.failed_evaluations}, is_new_best)

    def _note_best(self, row: dict[str, Any]) -> list[str]:
        """Keeps the best figures of the run; returns the names of those that are new."""
        state, identity = self._state, row.get(IDENTITY)
        if identity is not None and state.best_figures.get(IDENTITY) != identity:
            state.best_figures = {IDENTITY: identity}  # others do not compare
        new = []
        for name, value in row.items():
            is_lower = is_lower_better(name)
            if is_lower is None or not math.isfinite(value):
                continue
            best = state.best_figures.get(name, {}).get(
                "value", math.inf if is_lower else -math.inf
            )
            if value < best if is_lower else value > best:
                state.best_figures[name] = {"value": value, "images_seen": state.images_seen}
                new.append(name)
        return new


def check_evaluations(config: Config, data: DataSet) -> None:
    """Raises UserError for what Evaluations would refuse, as far as that can be seen without
    loading the feature network."""
    names = []
    if config.evaluation.every_images:
        names = check_evaluation(config.evaluation, config.data, data.manifest)
    _check_best(config, names)


def _check_best(config: Config, names: list[str]) -> None:
    """names: of the figures that evaluations give, none without evaluations"""
    best, best_is = config.checkpoint.best, config.checkpoint.best_is
    if not best.startswith("eval/"):
        return
    if not names:
        raise UserError(
            f"checkpoint.best={best} needs evaluations: set evaluation.every_images above 0, or "
            "checkpoint.best=\"''\""
        )
    if best not in names:
        raise UserError(
            f"checkpoint.best={best} is not among the figures of this run's evaluations: "
            f"{', '.join(names)}"
        )
    is_lower = is_lower_better(best)
    if is_lower is not None and is_lower != (best_is == "lowest"):
        better = "lowest" if is_lower else "highest"
        raise UserError(f"the best {best} is the {better}: set checkpoint.best_is={better}")
