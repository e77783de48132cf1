"""Gradient penalties: pure functions of critic, real and fake images.

The gradient is that of each sample's own logit, its norm is over all dimensions of the sample and
the coefficient is drawn per sample, as in the papers. Always in float32, also within autocast:
the penalty's gradient in bfloat16 errs by several per cent, most where the norm nears 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.runtime import at_least_float32

Critic = Callable[[Tensor, "Tensor | None"], Tensor]


def input_gradient_norms(
    critic: Critic,
    images: Float[Tensor, "batch *sample"],
    labels: Int64[Tensor, " batch"] | None,
) -> Float[Tensor, " batch"]:
    """||d critic(x_i) / d x_i||_2 for each sample i, differentiable; a patch map is averaged.

    The norm's gradient at zero is zero (`Tensor.norm`; a bare square root would give NaN for a
    dead critic).
    """
    with torch.autocast(images.device.type, enabled=False):
        images = at_least_float32(images.detach()).requires_grad_()
        logits = critic(images, labels)
        # Samples do not see each other, so the gradient of the sum holds each one's own.
        scores = logits.flatten(1).mean(1) if logits.ndim > 1 else logits
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        return gradient.flatten(1).norm(dim=1)


def interpolates(
    real_images: Float[Tensor, "batch *sample"],
    fake_images: Float[Tensor, "batch *sample"],
    coefficients: Float[Tensor, " batch"],
) -> Float[Tensor, "batch *sample"]:
    """epsilon x + (1 - epsilon) G(z), one epsilon per sample (Gulrajani et al., algorithm 1)."""
    shape = (-1, *[1] * (real_images.ndim - 1))
    real_images, fake_images = at_least_float32(real_images), at_least_float32(fake_images)
    return torch.lerp(fake_images, real_images, coefficients.to(real_images.dtype).view(shape))


def wgan_gp(norms: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """E[(||grad|| - 1)^2]: Gulrajani et al. 2017 (arXiv:1704.00028), equation 3."""
    return (norms - 1).square().mean()


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"wgan_gp": wgan_gp}
