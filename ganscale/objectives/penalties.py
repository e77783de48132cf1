"""Gradient penalties as published: where the critic's input gradient is taken, and its penalty.

The gradient is that of each sample's own score, its norm is over all dimensions of the sample, and
coefficients are drawn per sample, as in the papers. The score of a patch critic is the sum of its
map, as in published code. Where a critic looks at groups of images, a sample's gradient is that of
the sum of its group's scores, which has its effect on the others in it; so it is in the published
code of critics with a minibatch deviation (R1 of StyleGAN2, WGAN-GP of Progressive GAN). Everything
is in float32, also under autocast, unless the config says otherwise: in bfloat16 the penalty's
gradient errs by about 2 %, and by more when the norm is near 1.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from ganscale.objectives.fast_derivatives import FastDerivatives, first_derivatives
from ganscale.randomness import uniform, uniform_noise
from ganscale.runtime import all_reduce_sum_with_grad, at_least_float32, autocast, get_world_size
from ganscale.tensor_cache import cached_tensors


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, as functions of seed, purpose and slot."""

    seed: int
    slots: Int64[Tensor, " batch"]
    offset: int = 0  # of these slots in the global batch
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
        return uniform(self.seed, purpose, self.slots[:1] - self.offset).to(like.dtype)

    def per_element(self, purpose: str, like: Tensor) -> Tensor:
        """One uniform number in [0, 1) per element of each sample."""
        drawn = uniform_noise(self.seed, purpose, self.slots, like[0].numel())
        return drawn.to(like.dtype).view(like.shape)


@dataclass(frozen=True)
class Penalty:
    """points: (real_images, fake_images, draws) -> images at which the gradient is taken
    value: gradients (batch, *sample) -> scalar, the mean over the batch; or (scalar, norms) if it
        knows their detached 2-norms (batch,), which are metered, anyway
    draws: purposes of numbers per sample that may be made ahead; others are made when asked for
    """

    points: Callable[[Tensor, Tensor, Draws], Tensor]
    value: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    draws: tuple[str, ...] = ()

    def value_and_norms(self, gradients: Float[Tensor, "batch *sample"]) -> tuple[Tensor, Tensor]:
        value = self.value(gradients)
        return value if isinstance(value, tuple) else (value, norms(gradients.detach()))


def input_gradients(
    critic: Callable[[Tensor, Tensor | None], Tensor],
    images: Float[Tensor, "batch *sample"],
    labels: Int64[Tensor, " batch"] | None,
    precision: str = "float32",
    patch_score: str = "sum",
    *,
    is_differentiable: bool = True,
) -> Float[Tensor, "batch *sample"]:
    """The gradient of each image's score, the sum of its logits, with respect to that image; of a
    critic that looks at groups of images, that of the sum of the group's scores.

    precision: of the critic's layers, as in the config; the gradients are in float32 or better
    patch_score: "mean" takes the mean of an image's logits for its score
    is_differentiable: whether the gradients can be differentiated again
    """
    device = images.device
    derivatives = FastDerivatives(order=2) if is_differentiable else first_derivatives(device)
    with autocast(device, precision), twice_differentiable_attention(is_differentiable):
        images = at_least_float32(images.detach()).requires_grad_()
        with derivatives:
            logits = at_least_float32(critic(images, labels))
        return gradients_of_scores(logits, images, patch_score, is_differentiable=is_differentiable)


def gradients_of_scores(
    logits: Float[Tensor, "batch *map"],
    images: Float[Tensor, "batch *sample"],
    patch_score: str,
    *,
    is_differentiable: bool = True,
) -> Float[Tensor, "batch *sample"]:
    """`input_gradients`, from the logits of these images."""
    # Only images of a group affect each other, so the gradient of the sum holds each group's own.
    scale = 1.0 if patch_score == "sum" else logits.shape[0] / logits.numel()
    weights = constant(scale, logits.shape, logits.dtype, logits.device)
    (gradients,) = torch.autograd.grad(logits, images, weights, create_graph=is_differentiable)
    return gradients


@cached_tensors(maxsize=64)
def constant(value: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once; not to be changed."""
    return torch.full(shape, value, dtype=dtype, device=device)


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
    return Penalty(interpolates, _SquaredDeviation.apply, _INTERPOLATION)


def wgan_lp() -> Penalty:
    """E[max(0, ||grad|| - 1)^2]: Petzka et al. 2018 (arXiv:1709.08894), equation 8."""
    return Penalty(
        interpolates, lambda gradients: _SquaredDeviation.apply(gradients, True), _INTERPOLATION
    )


def dragan() -> Penalty:
    """E[(||grad|| - 1)^2] around real images: Kodali et al. 2017 (arXiv:1705.07215), section 2.3.

    As in the authors' code: x + alpha u std(x) / 2, alpha uniform per sample, u uniform per
    element, std over all elements of the (global) batch.
    """

    def points(real_images: Tensor, _: Tensor, draws: Draws) -> Tensor:
        noise = draws.per_element("dragan noise", real_images)
        share = draws.per_sample("dragan share", real_images)
        return torch.addcmul(real_images, share * global_deviation(real_images), noise, value=0.5)

    return Penalty(points, _SquaredDeviation.apply, ("dragan share",))


def r1() -> Penalty:
    """E[||grad||^2] / 2 at real images: Mescheder et al. 2018 (arXiv:1801.04406), equation 9."""
    return Penalty(lambda real_images, _, __: real_images, _HalfSquare.apply)


def r2() -> Penalty:
    """E[||grad||^2] / 2 at fakes: Mescheder et al. 2018 (arXiv:1801.04406), equation 10."""
    return Penalty(lambda _, fake_images, __: fake_images, _HalfSquare.apply)


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
    variance, mean = torch.var_mean(images.double(), correction=0)
    if (world_size := get_world_size()) > 1:
        moments = torch.stack([mean, variance + mean.square()])
        mean, square = all_reduce_sum_with_grad(moments) / world_size
        variance = (square - mean.square()).clamp_min(0)
    return variance.sqrt().to(images.dtype)


class _SquaredDeviation(Function):
    """(E[d^2], norms) of gradients g, with d = ||g|| - 1; or d = max(0, ||g|| - 1) if it is
    one-sided. In half the operators that autograd would take."""

    @staticmethod
    def forward(ctx: Any, gradients: Tensor, is_one_sided: bool = False) -> tuple[Tensor, Tensor]:
        lengths = norms(gradients)
        deviations = lengths - 1
        if is_one_sided:
            deviations.clamp_min_(0)
        ctx.save_for_backward(gradients, lengths, deviations)
        ctx.mark_non_differentiable(lengths)
        ctx.set_materialize_grads(False)
        return torch.dot(deviations, deviations) / len(lengths), lengths

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:  # type: ignore[override]
        """2 d g / (||g|| batch); a gradient of zero stays zero."""
        gradients, lengths, deviations = ctx.saved_tensors
        smallest = torch.finfo(lengths.dtype).tiny ** 0.75  # squares of smaller ones underflow
        factors = deviations / lengths.clamp_min(smallest) * (grad * (2 / len(lengths)))
        return gradients * factors.view(-1, *[1] * (gradients.ndim - 1)), None


class _HalfSquare(Function):
    """(E[||g||^2] / 2, norms) of gradients g, likewise."""

    @staticmethod
    def forward(ctx: Any, gradients: Tensor) -> tuple[Tensor, Tensor]:
        lengths = norms(gradients)
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(lengths)
        ctx.set_materialize_grads(False)
        return torch.dot(lengths, lengths) / (2 * len(lengths)), lengths

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        return gradients * (grad / len(gradients))


def _sample_dimensions(gradients: Tensor) -> tuple[int, ...]:
    """All but the first: with channels last, `flatten` would copy."""
    return tuple(range(1, gradients.ndim))
