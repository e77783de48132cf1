"""One critic step and one generator step: everything that is differentiated, in one forward each.

DDP averages gradients correctly only when a loss is computed in one forward of the wrapped module
and differentiated in one backward. Arrangements that take the penalty beside the wrapper, or a
backward per term, are silently unsynchronized. Hence these two modules: they are what is wrapped.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.metrics.profiling import section, stopwatch
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.global_batch_loss import logit_gradients, surrogate_loss
from ganscale.objectives.objective import Objective
from ganscale.objectives.penalties import input_gradients, norms
from ganscale.runtime import at_least_float32, autocast, get_world_size

Meters = dict[str, Tensor]


class LogitGradients(NamedTuple):
    """Of a loss that spans the batch: its gradient at each logit, its value and its parts for real
    images and for fakes, if it has such (both repeated)."""

    value: Float[Tensor, " batch"]
    parts: Float[Tensor, "batch parts"]
    real: Float[Tensor, "batch *map"]
    fake: Float[Tensor, "batch *map"]


class StepOutput(NamedTuple):
    """What a forward of a step gives.

    loss: the scalar to differentiate
    meters: detached means over this rank's images
    maxima: detached, the largest of them
    logits: detached, `real` and `fake`, (batch, *map) each
    """

    loss: Tensor
    meters: Meters
    maxima: Meters
    logits: dict[str, Tensor]


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
        self._score = once(partial(score, critic), compiles)
        self.needs_global_batch = objective.loss.needs_global_batch
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
        parts: int = 1,
    ) -> StepOutput:
        """points: for each penalty of this step, the images at which it is taken
        gradients: of a loss that spans the batch, for one of `parts` micro-batches

        Real and fake share one forward; penalties have their own, since a double backward through
        all of them would drag zeros for the first two along.
        """
        logits = self.logits(real_images, fake_images, labels)
        of_kinds: tuple[Tensor, ...] = ()
        if self.needs_global_batch:
            gradients = gradients or self.logit_gradients(logits)
            ordered = (logits["real"], logits["fake"]), (gradients.real, gradients.fake)
            loss = surrogate_loss(gradients.value[0], *ordered, scale=get_world_size() * parts)
            of_kinds = gradients.parts[0].unbind()
        elif self._objective.loss.critic_parts is not None:
            of_kinds = self._objective.loss.critic_parts(logits["real"], logits["fake"])
            loss = of_kinds[0] + of_kinds[1]
        else:
            loss = self._objective.loss.critic(logits["real"], logits["fake"])
        meters = {"loss/critic_adversarial": loss.detach(), **_named("critic", of_kinds)}
        maxima: Meters = {}
        seen = {name: each.detach() for name, each in logits.items()}
        meters |= logit_moments(seen["real"], seen["fake"])
        if points:
            stopwatch.split_backward(loss, "penalty")
        # A penalty that is not due adds nothing: so its part is averaged over all steps, as the
        # loss is, and the parts of a row add up to it.
        for name in self._objective.penalties:
            if name not in points:
                meters[f"loss/penalty_{name}"] = torch.zeros_like(meters["loss/critic_adversarial"])
        for name, images in points.items():
            with section("penalty"):
                weighted = self._objective.penalties[name]
                critic = partial(score, self.critic)
                slopes = input_gradients(critic, images, labels, self._penalty_precision)
                penalty = weighted.penalty.value(slopes)
            addend = weighted.weight * weighted.interval * penalty
            loss = loss + addend
            meters[f"loss/penalty_{name}"] = addend.detach()
            meters[f"penalty/{name}"] = penalty.detach()
            lengths = norms(slopes.detach()).double()
            meters[f"penalty/{name}_gradient_norm"] = lengths.mean()
            meters[f"penalty/{name}_gradient_norm_square"] = lengths.square().mean()
            maxima[f"penalty/{name}_gradient_norm_max"] = lengths.amax()
        meters["loss/critic"] = loss.detach()
        return StepOutput(loss, meters, maxima, seen)

    def logits(
        self, real_images: Tensor, fake_images: Tensor, labels: Tensor | None, **_: object
    ) -> dict[str, Tensor]:
        """`real` and `fake`, in float32 or better."""
        with autocast(real_images.device, self._precision):
            both_labels = None if labels is None else torch.cat([labels, labels])
            logits = self._score(torch.cat([real_images, fake_images]), both_labels)
        real, fake = at_least_float32(logits).chunk(2)
        return {"real": real, "fake": fake}

    def logit_gradients(self, logits: dict[str, Tensor]) -> LogitGradients:
        """Of a loss that spans the batch; `logits` are all of this rank's."""
        loss, ordered = self._objective.loss, (logits["real"], logits["fake"])
        value, (real, fake), parts = logit_gradients(loss.critic, *ordered, parts=loss.critic_parts)
        return _repeated(len(real), value, parts, real, fake)


class GeneratorStep(nn.Module):
    """The generator's objective, read off a critic that takes no gradient from it."""

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
        self.needs_global_batch = objective.loss.needs_global_batch
        self._make = once(partial(make, generator), compiles)
        # No submodule: the critic is not this module's to synchronize
        self._score = once(partial(score, critic), compiles, frozen=critic)
        self._loss = objective.loss
        self._precision = precision

    def forward(
        self,
        latents: Float[Tensor, "batch latent"] | None,
        real_images: Float[Tensor, "batch *sample"],
        labels: Int64[Tensor, " batch"] | None,
        fake_images: Float[Tensor, "batch *sample"] | None = None,
        with_real_logits: bool = False,
        gradients: LogitGradients | None = None,
        parts: int = 1,
    ) -> StepOutput:
        """The loss is to be differentiated for the generator's parameters only.

        fake_images: with the generator's graph, instead of latents
        with_real_logits: also where the loss does not need them (the panel does)
        """
        logits = self.logits(latents, real_images, labels, fake_images, with_real_logits)
        if self.needs_global_batch:
            gradients = gradients or self.logit_gradients(logits)
            ordered = (logits["fake"],), (gradients.fake,)
            loss = surrogate_loss(gradients.value[0], *ordered, scale=get_world_size() * parts)
            of_kinds = gradients.parts[0].unbind()
        else:
            loss, of_kinds = self._loss_of(logits)
        meters = {"loss/generator": loss.detach(), **_named("generator", of_kinds)}
        seen = {name: each.detach() for name, each in logits.items()}
        return StepOutput(loss, meters, {}, seen)

    def _loss_of(self, logits: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(the loss, its parts for real images and for fakes or, alone, for fakes)."""
        ordered = logits["fake"], logits.get("real")
        if self._loss.generator_parts is not None:
            of_real, of_fake = self._loss.generator_parts(*ordered)
            return of_fake + of_real, (of_real, of_fake)
        loss = self._loss.generator(*ordered)
        return loss, () if self._loss.generator_needs_real else (loss,)

    def logits(
        self,
        latents: Tensor | None,
        real_images: Tensor,
        labels: Tensor | None,
        fake_images: Tensor | None = None,
        with_real_logits: bool = False,
        **_: object,
    ) -> dict[str, Tensor]:
        """`fake`, and `real` where it is needed, in float32 or better."""
        with autocast(real_images.device, self._precision):
            if fake_images is None:
                assert latents is not None
                fake_images = self._make(latents, labels)
            logits = {"fake": at_least_float32(self._score(fake_images, labels))}
            if with_real_logits or self._loss.generator_needs_real:
                with torch.no_grad():
                    logits["real"] = at_least_float32(self._score(real_images, labels))
        return logits

    def logit_gradients(self, logits: dict[str, Tensor]) -> LogitGradients:
        """Of a loss that spans the batch; `logits` are all of this rank's."""
        loss, ordered = self._loss, (logits["fake"], logits["real"])
        value, (fake, real), parts = logit_gradients(
            loss.generator, *ordered, parts=loss.generator_parts
        )
        return _repeated(len(fake), value, parts, real, fake)


def logit_moments(real_logits: Tensor, fake_logits: Tensor) -> Meters:
    """Means over this rank's logits from which a row's figures follow (`metrics.rows`)."""
    both = torch.stack([real_logits.flatten(), fake_logits.flatten()]).double()
    names = [f"logits/{kind}_{figure}" for figure in _MOMENTS for kind in ("real", "fake")]
    moments = torch.cat([both, both.square(), both.sign()]).mean(1)
    meters = dict(zip(names, moments.unbind(), strict=True))
    meters["logits/pairs_in_order"] = (both[0] > both[1]).double().mean()
    return meters


_MOMENTS = ("mean", "square", "sign_rate")


def _named(updater: str, of_kinds: tuple[Tensor, ...]) -> Meters:
    kinds = ("real", "fake")[-len(of_kinds) :] if of_kinds else ()
    return {
        f"loss/{updater}_{kind}": part.detach() for kind, part in zip(kinds, of_kinds, strict=True)
    }


def _repeated(
    batch: int, value: Tensor, parts: tuple[Tensor, ...], real: Tensor, fake: Tensor
) -> LogitGradients:
    of_kinds = torch.stack(parts) if parts else value.new_empty(0)
    return LogitGradients(value.expand(batch), of_kinds.expand(batch, -1), real, fake)


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


def once(
    run: Callable[..., Tensor], compiles: bool, frozen: nn.Module | None = None
) -> Callable[..., Tensor]:
    """`run`, a network's forward that is differentiated once or not at all, in its fastest form.

    compiles: by torch.compile, which knows no second derivatives. The result raises UserError for
    a network that cannot be compiled.
    frozen: whose weights' gradients nobody wants; autograd sees that in time, compiled code has to
    be told before
    """
    if not compiles:

        def run_fast(*inputs: Tensor | None) -> Tensor:
            with FastDerivatives():
                return run(*inputs)

        return run_fast

    from torch._dynamo.exc import TorchDynamoException  # a second, for those who need it

    # A limit of forms for each network, and none for batches of any size
    compiled = torch.compile(lambda *inputs: run(*inputs), dynamic=False, isolate_recompiles=True)  # pyright: ignore[reportCallIssue]
    trained = [] if frozen is None else [p for p in frozen.parameters() if p.requires_grad]

    def run_compiled(*inputs: Tensor | None) -> Tensor:
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            return compiled(*inputs)
        except TorchDynamoException as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"`training.compile`: a network cannot be compiled: {why}") from error
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    return run_compiled
