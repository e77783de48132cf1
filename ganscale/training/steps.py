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

from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.forward import run_network
from ganscale.objectives.global_batch_loss import LogitGradients, logit_gradients, surrogate_loss
from ganscale.objectives.losses import Logits, Terms, total
from ganscale.objectives.objective import Objective
from ganscale.objectives.penalties import input_gradients, norms
from ganscale.runtime import at_least_float32, autocast, get_world_size
from ganscale.training.fast_forward import fast_forward

Meters = dict[str, Tensor]


class StepOutput(NamedTuple):
    """What the forward of a step returns; all but the loss is detached."""

    loss: Tensor  # the scalar to differentiate
    meters: Meters  # means over this rank's images
    norms: Meters  # of each of this rank's images
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

        Real and fake images share one forward; penalties have their own, since a double backward
        through all images would drag zeros along for the first two kinds.
        """
        logits = self.logits(real_images, fake_images, labels)
        terms, loss = _terms_and_loss(self, logits, gradients, micro_batches)
        detached = {kind: each.detach() for kind, each in logits.items()}
        meters = {"loss/critic_adversarial": loss.detach(), **_term_meters("critic", terms)}
        gradient_norms: Meters = {}
        if points:
            stopwatch.time_backward_until(loss, "penalty")
        for name, penalty in self._objective.penalties.items():
            if (images := points.get(name)) is None:
                # A zero where it is not due, so that its meter is averaged over all steps, as the
                # loss is, and the terms of a row add up to the loss.
                meters[f"loss/penalty_{name}"] = torch.zeros_like(meters["loss/critic_adversarial"])
                continue
            with section("penalty"):
                gradient = input_gradients(
                    partial(run_network, self.critic),
                    images,
                    labels,
                    self._penalty_precision,
                    penalty.patch_score,
                )
                value = penalty.penalty.value(gradient)
            weighted = penalty.weight * penalty.interval * value
            loss = loss + weighted
            meters[f"loss/penalty_{name}"] = weighted.detach()
            meters[f"penalty/{name}"] = value.detach()
            gradient_norms[f"penalty/{name}_gradient_norm"] = norms(gradient.detach())
        meters["loss/critic"] = loss.detach()
        return StepOutput(loss, meters, gradient_norms, detached)

    def logits(
        self, real_images: Tensor, fake_images: Tensor, labels: Tensor | None, **_: object
    ) -> Logits:
        """Of real and fake images, in float32 or better."""
        with autocast(real_images.device, self._precision):
            both_labels = None if labels is None else torch.cat([labels, labels])
            logits = self._run_critic(torch.cat([real_images, fake_images]), both_labels)
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
        meters = {"loss/generator": loss.detach(), **_term_meters("generator", terms)}
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


def _terms_and_loss(
    step: CriticStep | GeneratorStep,
    logits: Logits,
    gradients: LogitGradients | None,
    micro_batches: int,
) -> tuple[Terms, Tensor]:
    if not step.needs_global_batch:
        terms = step.loss_terms(*logits.values())
        return terms, total(terms)
    gradients = gradients or logit_gradients(step.loss_terms, logits)
    scale = get_world_size() * micro_batches
    return gradients.terms, surrogate_loss(logits, gradients, scale)


def _term_meters(network: str, terms: Terms) -> Meters:
    """The real and the fake term; a term of pairs is the whole loss."""
    return {
        f"loss/{network}_{kind}": terms[kind].detach() for kind in ("real", "fake") if kind in terms
    }
