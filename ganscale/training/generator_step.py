"""The generator's step, in one forward that DDP wraps (see `critic_step`)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.augmentation.transformations import Drawn, Pipeline
from ganscale.objectives.generator_penalties import images_and_path_lengths
from ganscale.objectives.global_batch_loss import LogitGradients
from ganscale.objectives.losses import Logits
from ganscale.objectives.objective import Objective
from ganscale.runtime import at_least_float32, autocast
from ganscale.training.fast_forward import fast_forward
from ganscale.training.step_forwards import (
    GENERATOR_STEP,
    CriticForwards,
    generator_draws,
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


class GeneratorStep(nn.Module):
    """The generator's objective, through a critic whose weights get no gradient."""

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        objective: Objective,
        precision: str,
        penalty_precision: str = "float32",
        compiles: bool = False,
        joins_forwards: bool = True,
        pipeline: Pipeline | None = None,
        seed: int = 0,
    ) -> None:
        """Parameters from `precision` on: see `CriticStep`."""
        super().__init__()
        self.generator = generator
        self._forwards = CriticForwards(GENERATOR_STEP, seed, pipeline)
        self._penalties = objective.generator_penalties
        self._penalty_precision = penalty_precision
        # Compiled code has no second derivatives.
        one_precision = has_one_precision(precision, penalty_precision)
        self._can_share_forward = one_precision and not compiles
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
        factors: Mapping[str, float | Tensor] | None = None,
    ) -> StepOutput:
        """To be differentiated with respect to the generator's parameters only.

        fake_images: with the generator's graph, in place of latents
        with_real_logits: also where the loss does not need them (the panel does)
        slots: for what networks draw; None for those that do not
        path_noise, mean_lengths: for the penalties that are due, their noise y, and for each of
            them the moving average of lengths
        factors: as in `CriticStep`

        Penalties share the loss's forward where precision and compilation allow it.
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
            loss, meters[term] = with_penalty(loss, value, penalty, (factors or {}).get(name))
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
            fake_images = fake_images.to(real_images.dtype)  # in all forwards below
            # With or without the panel, a step computes the same bits.
            if self._needs_real and self._joins_forwards and saves_launches(real_images):
                both = torch.cat([fake_images, real_images])
                forward = self._forwards.of(("fake", "real"), augmentation, slots)
                logits = forward(self._run_critic, both, twice(labels))
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
