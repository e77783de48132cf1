"""One critic step and one generator step: everything that is differentiated, in one forward each.

DDP wraps these two modules. It averages gradients correctly only when a loss is computed in one
forward of the wrapped module and differentiated in one backward: a penalty beside the wrapper, or
one backward per term, would silently leave gradients unsynchronized.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.metrics.meters import Meter, Scaled
from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.forward import run_network
from ganscale.networks.resampling import merged_kernels
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.global_batch_loss import LogitGradients, logit_gradients, surrogate_loss
from ganscale.objectives.losses import Logits, Terms, total
from ganscale.objectives.objective import Objective
from ganscale.objectives.penalties import gradients_of_scores, input_gradients
from ganscale.runtime import at_least_float32, autocast, get_world_size
from ganscale.training.fast_forward import fast_forward

Meters = dict[str, Meter]


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
    ) -> None:
        super().__init__()
        self.critic = critic
        self.loss_terms = objective.loss.critic
        self.needs_global_batch = objective.loss.needs_global_batch
        self._run_critic = fast_forward(critic, compiles)
        self._objective = objective
        self._precision = precision
        self._penalty_precision = penalty_precision
        # Compiled code has no second derivatives.
        self._can_share_forward = precision == penalty_precision and not compiles

    def forward(
        self,
        real_images: Float[Tensor, "batch *sample"],
        fake_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        points: dict[str, Tensor],
        gradients: LogitGradients | None = None,
        micro_batches: int = 1,
    ) -> StepOutput:
        """points: for each penalty that is due, the images at which its gradient is taken
        gradients: for a loss of the global batch, in one of several micro-batches

        Real and fake images share one forward. A penalty has its own, since a double backward
        through all images would drag zeros along for those of the other kind; unless penalties at
        both kinds are due (as R1 and R2 are), which then share it, too.
        """
        with merged_kernels():
            shared = self._penalties_at_both(real_images, fake_images, points)
            if shared:
                logits, found = self._logits_and_gradients(
                    real_images, fake_images, labels, points, shared
                )
            else:
                logits, found = self.logits(real_images, fake_images, labels), {}
            terms, loss = _terms_and_loss(self, logits, gradients, micro_batches)
            detached = {kind: each.detach() for kind, each in logits.items()}
            meters: Meters = {"loss/critic_adversarial": loss.detach()}
            meters |= _term_meters("critic", terms)
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
                        gradient = self._input_gradients(images, labels, penalty.patch_score)
                    value, lengths = penalty.penalty.value_and_norms(gradient)
                factor = penalty.weight * penalty.interval
                loss = torch.add(loss, value, alpha=factor)
                meters[f"loss/penalty_{name}"] = Scaled(value.detach(), factor)
                meters[f"penalty/{name}"] = value.detach()
                gradient_norms[f"penalty/{name}_gradient_norm"] = lengths
        meters["loss/critic"] = loss.detach()
        return StepOutput(loss, meters, gradient_norms, detached)

    def _penalties_at_both(
        self, real_images: Tensor, fake_images: Tensor, points: dict[str, Tensor]
    ) -> list[str]:
        """The penalties that are due at the real or at the fake images themselves, if there are
        some of both kinds."""
        if not self._can_share_forward:
            return []
        at_real = [name for name, images in points.items() if images is real_images]
        at_fake = [name for name, images in points.items() if images is fake_images]
        names = list(dict.fromkeys(at_real + at_fake))
        scores = {self._objective.penalties[name].patch_score for name in names}
        return names if at_real and at_fake and len(scores) == 1 else []

    def _logits_and_gradients(
        self,
        real_images: Tensor,
        fake_images: Tensor,
        labels: Tensor | None,
        points: dict[str, Tensor],
        names: list[str],
    ) -> tuple[Logits, dict[str, Tensor]]:
        """`logits`, and the gradients that these penalties take, from the same forward."""
        both = torch.cat([real_images, fake_images]).requires_grad_()
        with autocast(both.device, self._precision), FastDerivatives(order=2):
            logits = at_least_float32(run_network(self.critic, both, _twice(labels)))
        with section("penalty"), autocast(both.device, self._precision):
            patch_score = self._objective.penalties[names[0]].patch_score
            gradients = gradients_of_scores(logits, both, patch_score)
        halves = dict(zip((id(real_images), id(fake_images)), gradients.chunk(2), strict=True))
        real, fake = logits.chunk(2)
        return {"real": real, "fake": fake}, {name: halves[id(points[name])] for name in names}

    def _input_gradients(self, images: Tensor, labels: Tensor | None, patch_score: str) -> Tensor:
        critic = partial(run_network, self.critic)
        return input_gradients(critic, images, labels, self._penalty_precision, patch_score)

    def logits(
        self, real_images: Tensor, fake_images: Tensor, labels: Tensor | None, **_: object
    ) -> Logits:
        """Of real and fake images, in float32 or better."""
        with autocast(real_images.device, self._precision):
            both = torch.cat([real_images, fake_images])
            logits = self._run_critic(both, _twice(labels))
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
    ) -> None:
        super().__init__()
        self.generator = generator
        self.loss_terms = objective.loss.generator_terms
        self.needs_global_batch = objective.loss.needs_global_batch
        self._run_generator = fast_forward(generator, compiles)
        # The critic is not a submodule, so that DDP does not synchronize it here.
        self._run_critic = fast_forward(critic, compiles, is_frozen=True)
        self._needs_real = objective.loss.generator_needs_real
        self._precision = precision

    def forward(
        self,
        latents: Float[Tensor, "batch latent"] | None,
        real_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        fake_images: Float[Tensor, "batch *sample"] | None = None,
        with_real_logits: bool = False,
        gradients: LogitGradients | None = None,
        micro_batches: int = 1,
    ) -> StepOutput:
        """To be differentiated with respect to the generator's parameters only.

        fake_images: with the generator's graph, in place of latents
        with_real_logits: also where the loss does not need them (the panel does)
        """
        logits = self.logits(latents, real_images, labels, fake_images, with_real_logits)
        terms, loss = _terms_and_loss(self, logits, gradients, micro_batches)
        meters: Meters = {"loss/generator": loss.detach(), **_term_meters("generator", terms)}
        detached = {kind: each.detach() for kind, each in logits.items()}
        return StepOutput(loss, meters, {}, detached)

    def logits(
        self,
        latents: Tensor | None,
        real_images: Tensor,
        labels: Tensor | None,
        fake_images: Tensor | None = None,
        with_real_logits: bool = False,
        **_: object,
    ) -> Logits:
        """Of fake images, and of real ones where they are needed, in float32 or better."""
        with autocast(real_images.device, self._precision):
            if fake_images is None:
                fake_images = self._run_generator(latents, labels)
            logits = {"fake": at_least_float32(self._run_critic(fake_images, labels))}
            if with_real_logits or self._needs_real:
                with torch.no_grad():
                    logits["real"] = at_least_float32(self._run_critic(real_images, labels))
        return logits


def _twice(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else torch.cat([labels, labels])


def _terms_and_loss(
    step: CriticStep | GeneratorStep,
    logits: Logits,
    gradients: LogitGradients | None,
    micro_batches: int,
) -> tuple[Terms, Tensor]:
    scale = get_world_size() * micro_batches
    if scale == 1 or not step.needs_global_batch:
        terms = step.loss_terms(*logits.values())
        return terms, total(terms)
    gradients = gradients or logit_gradients(step.loss_terms, logits)
    return gradients.terms, surrogate_loss(logits, gradients, scale)


def _term_meters(network: str, terms: Terms) -> Meters:
    """The real and the fake term; a term of pairs is the whole loss."""
    return {
        f"loss/{network}_{kind}": terms[kind].detach() for kind in ("real", "fake") if kind in terms
    }
