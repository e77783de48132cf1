"""One critic step and one generator step: everything that is differentiated, in one forward each.

DDP averages gradients correctly only when a loss is computed in one forward of the wrapped module
and differentiated in one backward. Arrangements that take the penalty beside the wrapper, or a
backward per term, are silently unsynchronized. Hence these two modules: they are what is wrapped.
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.objectives.objective import Objective
from ganscale.objectives.panel import critic_panel, generator_panel
from ganscale.objectives.penalties import input_gradient_norms, interpolates
from ganscale.runtime import at_least_float32, autocast

Meters = dict[str, Tensor]


class CriticStep(nn.Module):
    """The critic's whole objective: adversarial loss plus weighted penalties."""

    def __init__(self, critic: nn.Module, objective: Objective, precision: str) -> None:
        super().__init__()
        self.critic = critic
        self._objective = objective
        self._precision = precision

    def forward(
        self,
        real_images: Float[Tensor, "batch *sample"],
        fake_images: Float[Tensor, "batch *sample"],
        coefficients: Float[Tensor, " batch"],
        labels: Int64[Tensor, " batch"] | None,
        with_panel: bool,
    ) -> tuple[Float[Tensor, ""], Meters]:
        """The loss to differentiate, and detached meters (means over this rank's images).

        Real and fake share one forward; the interpolates have their own, since a double backward
        through all three would drag zeros for the first two along.
        """
        with autocast(real_images.device, self._precision):
            both_labels = None if labels is None else torch.cat([labels, labels])
            logits = score(self.critic, torch.cat([real_images, fake_images]), both_labels)
        real_logits, fake_logits = at_least_float32(logits).chunk(2)
        loss = self._objective.loss.critic(real_logits, fake_logits)
        meters = {
            "loss/critic_adversarial": loss.detach(),
            "logits/real_mean": real_logits.detach().mean(),
            "logits/fake_mean": fake_logits.detach().mean(),
        }
        if self._objective.penalties:
            images = interpolates(real_images, fake_images, coefficients)
            norms = input_gradient_norms(partial(score, self.critic), images, labels)
            meters["penalty/gradient_norm"] = norms.detach().mean()
            for name, (weight, penalty) in self._objective.penalties.items():
                value = penalty(norms)
                loss = loss + weight * value
                meters[f"penalty/{name}"] = value.detach()
        meters["loss/critic"] = loss.detach()
        if with_panel:
            meters |= critic_panel(real_logits, fake_logits)
        return loss, meters


class GeneratorStep(nn.Module):
    """The generator's objective, read off a critic that takes no gradient from it."""

    def __init__(
        self, generator: nn.Module, critic: nn.Module, objective: Objective, precision: str
    ) -> None:
        super().__init__()
        self.generator = generator
        self._critic = [critic]  # in a list: not a submodule, so not this module's to synchronize
        self._objective = objective
        self._precision = precision

    def forward(
        self,
        latents: Float[Tensor, "batch latent"],
        real_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        with_panel: bool,
    ) -> tuple[Float[Tensor, ""], Meters]:
        """The loss to differentiate for the generator's parameters only, and detached meters."""
        (critic,) = self._critic
        with autocast(latents.device, self._precision):
            fake_images = make(self.generator, latents, labels)
            fake_logits = at_least_float32(score(critic, fake_images, labels))
            real_logits = None
            if with_panel or self._objective.loss.generator_needs_real:
                with torch.no_grad():
                    real_logits = at_least_float32(score(critic, real_images, labels))
        loss = self._objective.loss.generator(fake_logits, real_logits)
        meters = {"loss/generator": loss.detach()}
        if with_panel and real_logits is not None:
            meters |= generator_panel(fake_logits, real_logits)
        return loss, meters


def make(
    generator: nn.Module, latents: Float[Tensor, "batch latent"], labels: Tensor | None
) -> Float[Tensor, "batch *sample"]:
    """G(z), or G(z, y) for a class-conditional generator."""
    return generator(latents) if labels is None else generator(latents, labels)


def score(
    critic: nn.Module, images: Float[Tensor, "batch *sample"], labels: Tensor | None = None
) -> Tensor:
    """D(x), or D(x, y) for a class-conditional critic: logits, one or a map per image."""
    return critic(images) if labels is None else critic(images, labels)
