"""Gradient penalties as published: where the critic's input gradient is taken, and its penalty.

The gradient is that of each sample's own score, its norm is over all dimensions of the sample, and
coefficients are drawn per sample, as in the papers. The score of a patch critic is the sum of its
map, as in published code. Everything is in float32, also under autocast,
unless the config says otherwise: in bfloat16 the penalty's gradient errs by several per cent, most
of all when the norm is near 1.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.randomness import uniform
from ganscale.runtime import all_reduce_sum_with_grad, at_least_float32, autocast, get_world_size


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, as functions of seed, purpose and slot."""

    seed: int
    slots: Int64[Tensor, " batch"]
    first_slot: int  # of the global batch
    ahead: Mapping[str, Float[Tensor, "batch columns"]] = field(default_factory=dict[str, Tensor])
    """Those of `Penalty.draws`, by purpose, where they were made ahead."""

    def per_sample(self, purpose: str, like: Tensor) -> Tensor:
        """One uniform number in [0, 1) per sample, in a shape that broadcasts to `like`."""
        drawn = self.ahead.get(purpose)
        if drawn is None:
            drawn = uniform(self.seed, purpose, self.slots)
        return drawn.to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def per_batch(self, purpose: str, like: Tensor) -> Tensor:
        """One uniform number in [0, 1) for the whole global batch."""
        first = torch.full_like(self.slots[:1], self.first_slot)
        return uniform(self.seed, purpose, first).to(like.dtype)

    def per_element(self, purpose: str, like: Tensor) -> Tensor:
        """One uniform number in [0, 1) per element of each sample."""
        drawn = uniform(self.seed, purpose, self.slots, like[0].numel())
        return drawn.to(like.dtype).view(like.shape)


@dataclass(frozen=True)
class Penalty:
    """points: (real_images, fake_images, draws) -> images at which the gradient is taken
    value: gradients (batch, *sample) -> scalar, the mean over the batch
    draws: purposes of numbers per sample that may be made ahead; others are made when asked for"""

    points: Callable[[Tensor, Tensor, Draws], Tensor]
    value: Callable[[Tensor], Tensor]
    draws: tuple[str, ...] = ()


def input_gradients(
    critic: Callable[[Tensor, Tensor | None], Tensor],
    images: Float[Tensor, "batch *sample"],
    labels: Int64[Tensor, " batch"] | None,
    precision: str = "float32",
    patch_score: str = "sum",
    *,
    is_differentiable: bool = True,
) -> Float[Tensor, "batch *sample"]:
    """The gradient of each image's score, the sum of its logits, with respect to that image.

    precision: of the critic's layers, as in the config; the gradients are in float32 or better
    patch_score: "mean" takes the mean of an image's logits for its score
    is_differentiable: whether the gradients can be differentiated again
    """
    attention = twice_differentiable_attention(is_differentiable)
    with autocast(images.device, precision), attention:
        images = at_least_float32(images.detach()).requires_grad_()
        with FastDerivatives(order=2 if is_differentiable else 1):
            logits = at_least_float32(critic(images, labels))
        # Images do not affect each other, so the gradient of the sum holds each one's own.
        score = logits.sum() if patch_score == "sum" else logits.sum() / logits[0].numel()
        (gradients,) = torch.autograd.grad(score, images, create_graph=is_differentiable)
        return gradients


def twice_differentiable_attention(is_needed: bool) -> AbstractContextManager[Any]:
    """Within, scaled dot product attention has second derivatives if they are needed. torch's fused
    kernels are faster, but have none.

    For the backward, too: activation checkpointing repeats forwards there.
    """
    return sdpa_kernel(SDPBackend.MATH) if is_needed else nullcontext()


def norms(gradients: Float[Tensor, "batch *sample"]) -> Float[Tensor, " batch"]:
    """The 2-norm of each sample's gradient. Its own gradient at zero (a dead critic) is zero, not
    NaN as that of a square root of a sum of squares."""
    return torch.linalg.vector_norm(gradients, dim=_sample_dimensions(gradients))


_INTERPOLATION = ("interpolation",)


def interpolates(real_images: Tensor, fake_images: Tensor, draws: Draws) -> Tensor:
    """epsilon x + (1 - epsilon) G(z), one epsilon per sample (Gulrajani et al., algorithm 1)."""
    return torch.lerp(fake_images, real_images, draws.per_sample("interpolation", real_images))


def wgan_gp() -> Penalty:
    """E[(||grad|| - 1)^2]: Gulrajani et al. 2017 (arXiv:1704.00028), equation 3."""
    return Penalty(interpolates, _deviation_from_one, _INTERPOLATION)


def wgan_lp() -> Penalty:
    """E[max(0, ||grad|| - 1)^2]: Petzka et al. 2018 (arXiv:1709.08894), equation 8."""
    return Penalty(
        interpolates,
        lambda gradients: (norms(gradients) - 1).clamp_min(0).square().mean(),
        _INTERPOLATION,
    )


def dragan() -> Penalty:
    """E[(||grad|| - 1)^2] around real images: Kodali et al. 2017 (arXiv:1705.07215), section 2.3.

    As in the authors' code: x + alpha u std(x) / 2, alpha uniform per sample, u uniform per
    element, std over all elements of the (global) batch.
    """

    def points(real_images: Tensor, _: Tensor, draws: Draws) -> Tensor:
        noise = draws.per_element("dragan noise", real_images)
        share = draws.per_sample("dragan share", real_images)
        return real_images + share * 0.5 * global_deviation(real_images) * noise

    return Penalty(points, _deviation_from_one, ("dragan share",))


def r1() -> Penalty:
    """E[||grad||^2] / 2 at real images: Mescheder et al. 2018 (arXiv:1801.04406), equation 9."""
    return Penalty(lambda real_images, _, __: real_images, _half_square)


def r2() -> Penalty:
    """E[||grad||^2] / 2 at fakes: Mescheder et al. 2018 (arXiv:1801.04406), equation 10."""
    return Penalty(lambda _, fake_images, __: fake_images, _half_square)


def wgan_gp_pixel() -> Penalty:
    """The variant of single-image GANs (SinGAN, Shaham et al. 2019, arXiv:1905.01164, its code).

    The norm is over the channels at each pixel, and the whole batch shares one coefficient.
    """

    def points(real_images: Tensor, fake_images: Tensor, draws: Draws) -> Tensor:
        share = draws.per_batch("interpolation of the batch", real_images)
        return torch.lerp(fake_images, real_images, share)

    return Penalty(points, lambda gradients: (gradients.norm(dim=1) - 1).square().mean())


_BUILT_IN = wgan_gp, wgan_lp, dragan, r1, r2, wgan_gp_pixel
PENALTIES: dict[str, Callable[[], Penalty]] = {penalty.__name__: penalty for penalty in _BUILT_IN}


@torch.no_grad()
def global_deviation(images: Tensor) -> Tensor:
    """The standard deviation of all elements of the global batch, a scalar."""
    wide = images.double()
    moments = torch.stack([wide.mean(), wide.square().mean()])
    mean, square = all_reduce_sum_with_grad(moments) / get_world_size()
    return (square - mean.square()).clamp_min(0).sqrt().to(images.dtype)


def _deviation_from_one(gradients: Tensor) -> Tensor:
    return (norms(gradients) - 1).square().mean()


def _half_square(gradients: Tensor) -> Tensor:
    return 0.5 * gradients.square().sum(_sample_dimensions(gradients)).mean()


def _sample_dimensions(gradients: Tensor) -> tuple[int, ...]:
    """All but the first: with channels last, `flatten` would copy."""
    return tuple(range(1, gradients.ndim))
