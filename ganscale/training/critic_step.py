"""The critic's step: everything that is differentiated, in one forward.

DDP wraps this module, and `GeneratorStep`. It averages gradients correctly only when a loss is
computed in one forward of the wrapped module and differentiated in one backward: a penalty beside
the wrapper, or one backward per term, would silently leave gradients unsynchronized.
"""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.augmentation.transformations import Drawn, Pipeline
from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.forward import run_network
from ganscale.networks.resampling import merged_kernels
from ganscale.objectives.double_backward import LossFactors
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.global_batch_loss import LogitGradients
from ganscale.objectives.joint_backward import join_backward
from ganscale.objectives.losses import Logits
from ganscale.objectives.objective import Objective
from ganscale.objectives.penalties import gradients_of_scores, input_gradients
from ganscale.runtime import at_least_float32, autocast
from ganscale.training.fast_forward import fast_forward
from ganscale.training.step_forwards import (
    CRITIC_STEP,
    CriticForwards,
    Forward,
    has_one_precision,
    saves_launches,
    twice,
)
from ganscale.training.step_terms import (
    Meters,
    StepOutput,
    term_meters,
    terms_and_loss,
    with_penalty,
)


class CriticStep(nn.Module):
    """The critic's whole objective: adversarial loss plus weighted penalties."""

    def __init__(
        self,
        critic: nn.Module,
        objective: Objective,
        precision: str,
        penalty_precision: str = "float32",
        compiles: bool = False,
        joins_forwards: bool = True,
        pipeline: Pipeline | None = None,
        seed: int = 0,
    ) -> None:
        """joins_forwards: whether to save launches where they take longer than small batches
        pipeline: what augments images in front of the critic
        seed: of what networks draw
        """
        super().__init__()
        self.critic = critic
        self.loss_terms = objective.loss.critic
        self.needs_global_batch = objective.loss.needs_global_batch
        self._run_critic = fast_forward(critic, compiles)
        self._run_plain_critic = partial(run_network, critic)
        self._forwards = CriticForwards(CRITIC_STEP, seed, pipeline)
        self._objective = objective
        self._precision = precision
        self._penalty_precision = penalty_precision
        self._can_share_forward = not compiles  # compiled code has no second derivatives
        self._joins_forwards = joins_forwards
        self._has_one_precision = has_one_precision(precision, penalty_precision)
        self._scores_single_images = batch_group_size(critic) == 1

    def forward(
        self,
        real_images: Float[Tensor, "batch *sample"],
        fake_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        points: dict[str, Tensor],
        augmentation: dict[str, Drawn] | None = None,
        gradients: LogitGradients | None = None,
        micro_batches: int = 1,
        factors: Mapping[str, float | Tensor] | None = None,
        slots: Int64[Tensor, " batch"] | None = None,
    ) -> StepOutput:
        """points: for each penalty that is due, the images at which its gradient is taken, which
            goes through their augmentation
        augmentation: what was drawn for the "real" and the "fake" images; points between them, or
            around real ones, are augmented as the real image of their slot
        gradients: for a loss of the global batch, in one of several micro-batches
        factors: weight times interval, in this step, of penalties whose weight has a schedule
        slots: for what the critic draws; None for one that does not

        A penalty at the critic's own images takes its gradient from their forward; others have a
        forward of their own, since a double backward through all images would compute with zeros.
        """
        both = {"real": real_images, "fake": fake_images}
        with merged_kernels():
            own = self._penalties_at(both, points)
            if own:
                logits, found = self._logits_and_gradients(both, labels, own, augmentation, slots)
            else:
                logits = self.logits(real_images, fake_images, labels, augmentation, slots)
                found = {}
            terms, loss = terms_and_loss(
                self.loss_terms, self.needs_global_batch, logits, gradients, micro_batches
            )
            detached = {kind: each.detach() for kind, each in logits.items()}
            meters: Meters = {"loss/critic_adversarial": loss.detach()}
            meters |= term_meters("critic", terms)
            gradient_norms: dict[str, Tensor] = {}
            if points:
                stopwatch.time_backward_until(loss, "penalty")
            for name, penalty in self._objective.penalties.items():
                if (images := points.get(name)) is None:
                    # A zero where it is not due, so that its meter is averaged over all steps, as
                    # the loss is, and the terms of a row add up to the loss.
                    meters[f"loss/penalty_{name}"] = 0.0
                    continue
                with section("penalty"):
                    gradient = found.get(name)
                    if gradient is None:
                        kind = next((k for k, each in both.items() if each is images), None)
                        inputs = images, labels, augmentation, slots
                        gradient = self._gradient_by_itself(name, kind, *inputs)
                    value, lengths = penalty.penalty.value_and_norms(gradient)
                weighted = with_penalty(loss, value, penalty, (factors or {}).get(name))
                loss, meters[f"loss/penalty_{name}"] = weighted
                meters[f"penalty/{name}"] = value.detach()
                gradient_norms[f"penalty/{name}_gradient_norm"] = lengths
        meters["loss/critic"] = loss.detach()
        return StepOutput(loss, meters, gradient_norms, detached)

    def _gradient_by_itself(
        self,
        name: str,
        kind: str | None,
        images: Tensor,
        labels: Tensor | None,
        augmentation: dict[str, Drawn] | None,
        slots: Tensor | None,
    ) -> Tensor:
        """Of the penalty `name`, from a forward of its own.

        kind: of the images; None for points between images, or around them, which have draws of
            their own
        """
        drawn_as = (kind or f"penalty {name}",)
        forward = self._forwards.of((kind or "real",), augmentation, slots, drawn_as)
        critic = partial(forward, self._run_plain_critic)
        score = self._penalty_precision, self._objective.penalties[name].patch_score
        return input_gradients(critic, images, labels, *score)

    def _penalties_at(self, images: dict[str, Tensor], points: dict[str, Tensor]) -> dict[str, str]:
        """For each penalty that is due at these images themselves, which of them: it can use their
        forward."""
        if not self._can_share_forward:
            return {}
        kinds = {id(each): kind for kind, each in images.items()}
        return {name: kinds[id(each)] for name, each in points.items() if id(each) in kinds}

    def _joins_images(self, own: dict[str, str], images: dict[str, Tensor]) -> bool:
        """Whether real and fake images have one forward in a step with these penalties."""
        can_join = self._joins_forwards and self._has_one_precision
        is_few = can_join and saves_launches(images["real"])
        return bool(own) and (is_few or len({*own.values()}) == len(images))

    def _logits_and_gradients(
        self,
        images: dict[str, Tensor],
        labels: Tensor | None,
        own: dict[str, str],
        augmentation: dict[str, Drawn] | None,
        slots: Tensor | None,
    ) -> tuple[Logits, dict[str, Tensor]]:
        """`logits`, and the gradients of the penalties of `_penalties_at`, from the same forwards.

        With penalties at one kind of images only, the other kind has a forward without second
        derivatives: in a joint one, the double backward would compute with zeros.
        """
        scores = {name: self._objective.penalties[name].patch_score for name in own}
        logits, found = {}, {}
        if self._joins_images(own, images):
            both = torch.cat([*images.values()])
            forward = self._forwards.of((*images,), augmentation, slots)
            score_names = {*scores.values()}
            joint, gradients = self._differentiated(both, twice(labels), score_names, forward)
            logits = dict(zip(images, joint.chunk(2), strict=True))
            for score, gradient in gradients.items():
                halves = zip(images, gradient.chunk(2), strict=True)
                found |= {(kind, score): half for kind, half in halves}
        else:
            for kind, each in images.items():
                of_kind = {scores[name] for name in own if own[name] == kind}
                forward = self._forwards.of((kind,), augmentation, slots)
                logits[kind], gradients = self._differentiated(each, labels, of_kind, forward)
                found |= {(kind, score): gradient for score, gradient in gradients.items()}
        return logits, {name: found[kind, scores[name]] for name, kind in own.items()}

    def _differentiated(
        self, images: Tensor, labels: Tensor | None, patch_scores: set[str], forward: Forward
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits of these images, and their gradient for each way to score a patch map.

        With a gradient, both are in the penalty's precision: a second forward in bfloat16 would
        take longer than what the loss adds to a joint backward in float32.
        """
        if not patch_scores:
            with autocast(images.device, self._precision):
                return at_least_float32(forward(self._run_critic, images, labels)), {}
        with autocast(images.device, self._penalty_precision):
            images = images.detach().requires_grad_()
            is_joint = self._scores_single_images and len(patch_scores) == 1
            factors = LossFactors(len(images)) if is_joint else None
            with FastDerivatives(2, factors):
                logits = at_least_float32(forward(self._run_plain_critic, images, labels))
            with section("penalty"):
                gradients = {s: gradients_of_scores(logits, images, s) for s in patch_scores}
            if factors is not None:
                (name,) = gradients
                logits, gradients[name] = join_backward(logits, gradients[name], images, factors)
            return logits, gradients

    def logits(
        self,
        real_images: Tensor,
        fake_images: Tensor,
        labels: Tensor | None,
        augmentation: dict[str, Drawn] | None = None,
        slots: Tensor | None = None,
        points: dict[str, Tensor] | None = None,
        **_: object,
    ) -> Logits:
        """Of real and fake images, in float32 or better; with `points`, computed in the precision
        in which a step with these penalties computes them."""
        images = {"real": real_images, "fake": fake_images}
        own = self._penalties_at(images, points or {})
        penalized = {*images} if self._joins_images(own, images) else {*own.values()}
        precisions = {
            kind: self._penalty_precision if kind in penalized else self._precision
            for kind in images
        }
        if len({*precisions.values()}) == 1:
            with autocast(real_images.device, precisions["real"]):
                both = torch.cat([*images.values()])
                forward = self._forwards.of((*images,), augmentation, slots)
                logits = forward(self._run_critic, both, twice(labels))
            return dict(zip(images, at_least_float32(logits).chunk(2), strict=True))
        logits = {}
        for kind, each in images.items():
            with autocast(real_images.device, precisions[kind]):
                forward = self._forwards.of((kind,), augmentation, slots)
                logits[kind] = at_least_float32(forward(self._run_critic, each, labels))
        return logits
