"""One critic step and one generator step: everything that is differentiated, in one forward each.

DDP wraps these two modules. It averages gradients correctly only when a loss is computed in one
forward of the wrapped module and differentiated in one backward: a penalty beside the wrapper, or
one backward per term, would silently leave gradients unsynchronized.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.augmentation.transformations import Drawn, Pipeline
from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.forward import run_network
from ganscale.networks.resampling import merged_kernels
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.generator_penalties import images_and_path_lengths
from ganscale.objectives.global_batch_loss import LogitGradients
from ganscale.objectives.losses import Logits
from ganscale.objectives.objective import Objective
from ganscale.objectives.penalties import gradients_of_scores, input_gradients
from ganscale.runtime import at_least_float32, autocast, has_cheap_launches
from ganscale.training.fast_forward import fast_forward
from ganscale.training.step_forwards import (
    CRITIC_STEP,
    GENERATOR_STEP,
    CriticForwards,
    Forward,
    generator_draws,
)
from ganscale.training.step_terms import Meters, term_meters, terms_and_loss, with_penalty

_FEW_PIXELS = 1 << 18  # 64 images of 64 pixels; no GPU has tried another number


class StepOutput(NamedTuple):
    """What the forward of a step returns; all but the loss is detached."""

    loss: Tensor  # the scalar to differentiate
    meters: Meters  # means over this rank's images
    norms: dict[str, Tensor]  # of each of this rank's images
    logits: Logits


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
        self._can_share_forward = _can_share_forward(precision, penalty_precision, compiles)
        self._joins_forwards = joins_forwards

    def forward(
        self,
        real_images: Float[Tensor, "batch *sample"],
        fake_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        points: dict[str, Tensor],
        augmentation: dict[str, Drawn] | None = None,
        gradients: LogitGradients | None = None,
        micro_batches: int = 1,
        weights: Mapping[str, float | Tensor] | None = None,
        slots: Int64[Tensor, " batch"] | None = None,
    ) -> StepOutput:
        """points: for each penalty that is due, the images at which its gradient is taken, which
            goes through their augmentation
        augmentation: what was drawn for the "real" and the "fake" images; points between them, or
            around real ones, are augmented as the real image of their slot
        gradients: for a loss of the global batch, in one of several micro-batches
        weights: of penalties whose weight has a schedule, in this step
        slots: for what the critic draws; None for one that does not

        A penalty at the critic's own images takes its gradient from their forward; others have a
        forward of their own, since a double backward through all images would drag zeros along.
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
                        # Points between images, or around them, have draws of their own.
                        kind = next((k for k, each in both.items() if each is images), None)
                        forward = self._forwards.of(
                            (kind or "real",), augmentation, slots, (kind or f"penalty {name}",)
                        )
                        critic = partial(forward, self._run_plain_critic)
                        score = self._penalty_precision, penalty.patch_score
                        gradient = input_gradients(critic, images, labels, *score)
                    value, lengths = penalty.penalty.value_and_norms(gradient)
                weighted = with_penalty(loss, value, penalty, (weights or {}).get(name))
                loss, meters[f"loss/penalty_{name}"] = weighted
                meters[f"penalty/{name}"] = value.detach()
                gradient_norms[f"penalty/{name}_gradient_norm"] = lengths
        meters["loss/critic"] = loss.detach()
        return StepOutput(loss, meters, gradient_norms, detached)

    def _penalties_at(self, images: dict[str, Tensor], points: dict[str, Tensor]) -> dict[str, str]:
        """For each penalty that is due at these images themselves, which of them: as a penalty in
        the training's precision, it can use their forward."""
        if not self._can_share_forward:
            return {}
        kinds = {id(each): kind for kind, each in images.items()}
        return {name: kinds[id(each)] for name, each in points.items() if id(each) in kinds}

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
        is_few = self._joins_forwards and _saves_launches(images["real"])
        if is_few or len(set(own.values())) == len(images):
            both = torch.cat([*images.values()])
            forward = self._forwards.of((*images,), augmentation, slots)
            score_names = {*scores.values()}
            joint, gradients = self._differentiated(both, _twice(labels), score_names, forward)
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
        """The logits of these images, and their gradient for each way to score a patch map."""
        with autocast(images.device, self._precision):
            if not patch_scores:
                return at_least_float32(forward(self._run_critic, images, labels)), {}
            images = images.detach().requires_grad_()
            with FastDerivatives(order=2):
                logits = at_least_float32(forward(self._run_plain_critic, images, labels))
            with section("penalty"):
                return logits, {s: gradients_of_scores(logits, images, s) for s in patch_scores}

    def logits(
        self,
        real_images: Tensor,
        fake_images: Tensor,
        labels: Tensor | None,
        augmentation: dict[str, Drawn] | None = None,
        slots: Tensor | None = None,
        **_: object,
    ) -> Logits:
        """Of real and fake images, in float32 or better."""
        with autocast(real_images.device, self._precision):
            both = torch.cat([real_images, fake_images])
            forward = self._forwards.of(("real", "fake"), augmentation, slots)
            logits = forward(self._run_critic, both, _twice(labels))
        real, fake = at_least_float32(logits).chunk(2)
        return {"real": real, "fake": fake}


class GeneratorStep(nn.Module):
    """The generator's objective, through a critic whose weights get no gradient."""

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        objective: Objective,
        precision: str,
        compiles: bool = False,
        joins_forwards: bool = True,
        pipeline: Pipeline | None = None,
        seed: int = 0,
        penalty_precision: str = "float32",
    ) -> None:
        """joins_forwards, pipeline, seed: as of `CriticStep`"""
        super().__init__()
        self.generator = generator
        self._forwards = CriticForwards(GENERATOR_STEP, seed, pipeline)
        self._penalties = objective.generator_penalties
        self._penalty_precision = penalty_precision
        self._can_share_forward = _can_share_forward(precision, penalty_precision, compiles)
        self.loss_terms = objective.loss.generator_terms
        self.needs_global_batch = objective.loss.needs_global_batch
        self._run_generator = fast_forward(generator, compiles)
        # The critic is not a submodule, so that DDP does not synchronize it here.
        self._run_critic = fast_forward(critic, compiles, is_frozen=True)
        self._needs_real = objective.loss.generator_needs_real
        self._precision = precision
        self._joins_forwards = joins_forwards

    def forward(
        self,
        latents: Float[Tensor, "batch latent"] | None,
        real_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        fake_images: Float[Tensor, "batch *sample"] | None = None,
        with_real_logits: bool = False,
        augmentation: dict[str, Drawn] | None = None,
        gradients: LogitGradients | None = None,
        micro_batches: int = 1,
        slots: Int64[Tensor, " batch"] | None = None,
        path_noise: Float[Tensor, "batch *sample"] | None = None,
        mean_lengths: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, float | Tensor] | None = None,
    ) -> StepOutput:
        """To be differentiated with respect to the generator's parameters only.

        fake_images: with the generator's graph, in place of latents
        with_real_logits: also where the loss does not need them (the panel does)
        slots: for what networks draw; None for those that do not
        path_noise, mean_lengths: if penalties are due, y, and for each of them the moving average
            of the lengths
        weights: as of `CriticStep`

        Penalties use the loss's own forward if they may, as all its images have a path length.
        """
        lengths = None
        if mean_lengths:
            assert latents is not None
            assert path_noise is not None
            precision = self._precision if self._can_share_forward else self._penalty_precision
            inputs = latents, labels, path_noise, precision
            with generator_draws(self._forwards.seed, GENERATOR_STEP, slots):
                images, lengths = images_and_path_lengths(self.generator, *inputs)
            fake_images = images if self._can_share_forward else None
        logits = self.logits(
            latents, real_images, labels, fake_images, with_real_logits, augmentation, slots
        )
        terms, loss = terms_and_loss(
            self.loss_terms, self.needs_global_batch, logits, gradients, micro_batches
        )
        meters: Meters = term_meters("generator", terms)
        norms: dict[str, Tensor] = {}
        if self._penalties:
            meters["loss/generator_adversarial"] = loss.detach()
        for name, penalty in self._penalties.items():
            term = f"loss/generator_penalty_{name}"
            if lengths is None or mean_lengths is None or name not in mean_lengths:
                meters[term] = 0.0  # as in the critic's step
                continue
            value = penalty.penalty.value(lengths, mean_lengths[name])
            loss, meters[term] = with_penalty(loss, value, penalty, (weights or {}).get(name))
            meters[f"penalty/{name}"] = value.detach()
            norms[f"penalty/{name}_gradient_norm"] = lengths.detach()
        meters["loss/generator"] = loss.detach()
        detached = {kind: each.detach() for kind, each in logits.items()}
        return StepOutput(loss, meters, norms, detached)

    def logits(
        self,
        latents: Tensor | None,
        real_images: Tensor,
        labels: Tensor | None,
        fake_images: Tensor | None = None,
        with_real_logits: bool = False,
        augmentation: dict[str, Drawn] | None = None,
        slots: Tensor | None = None,
        **_: object,
    ) -> Logits:
        """Of fake images, and of real ones where they are needed, in float32 or better."""
        with autocast(real_images.device, self._precision):
            if fake_images is None:
                with generator_draws(self._forwards.seed, GENERATOR_STEP, slots):
                    fake_images = self._run_generator(latents, labels)
            # With or without the panel, a step computes the same bits.
            if self._needs_real and self._joins_forwards and _saves_launches(real_images):
                both = torch.cat([fake_images, real_images.to(fake_images.dtype)])
                forward = self._forwards.of(("fake", "real"), augmentation, slots)
                logits = forward(self._run_critic, both, _twice(labels))
                fake, real = at_least_float32(logits).chunk(2)
                return {"fake": fake, "real": real.detach()}
            forward = self._forwards.of(("fake",), augmentation, slots)
            fake = forward(self._run_critic, fake_images, labels)
            logits = {"fake": at_least_float32(fake)}
            if with_real_logits or self._needs_real:
                with torch.no_grad():
                    forward = self._forwards.of(("real",), augmentation, slots)
                    real = forward(self._run_critic, real_images, labels)
                    logits["real"] = at_least_float32(real)
        return logits


def _can_share_forward(precision: str, penalty_precision: str, compiles: bool) -> bool:
    """Whether a penalty may use the loss's forward: compiled code has no second derivatives."""
    return (precision == "bfloat16") == (penalty_precision == "bfloat16") and not compiles


def _saves_launches(images: Tensor) -> bool:
    """Whether the device would wait longer for the launches of another forward than for computing
    as much as that of these images."""
    is_small = images.shape[0] * images.shape[2:].numel() <= _FEW_PIXELS
    return is_small and not has_cheap_launches(images.device)


def _twice(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else torch.cat([labels, labels])
