"""Penalties of the generator, on how far its images move when their styles do.

For an image with styles w, y image-shaped normal noise and J the derivative of the image by its
styles, the length is ||J^T y|| (see `path_lengths`). A penalty compares the lengths with their
moving average, which is a constant to it: that of the steps before, over all images of their global
batches. So it does not depend on how a batch is split over ranks and micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.networks.styles import run_styles, run_synthesis
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.random import drawing, normal_like
from ganscale.runtime import at_least_float32, autocast


@dataclass(frozen=True)
class GeneratorPenalty:
    """value: (lengths (batch,), their moving average, a scalar) -> scalar, the mean over the batch;
    twice differentiable where the lengths are
    """

    value: Callable[[Tensor, Tensor], Tensor]


def path_length() -> GeneratorPenalty:
    """E[(||J^T y|| - a)^2]: Karras et al. 2020 (arXiv:1912.04958), equation 4.

    a is the moving average before the step. The authors' code moves it first, by 1 % of the way to
    the lengths of the same images.
    """
    return GeneratorPenalty(lambda lengths, average: (lengths - average).square().mean())


GENERATOR_PENALTIES: dict[str, Callable[[], GeneratorPenalty]] = {"path_length": path_length}


def path_noise(
    seed: int, slots: Int64[Tensor, " batch"], like: Float[Tensor, "batch channels height width"]
) -> Tensor:
    """y for the images of these slots, as `like` in shape and dtype: standard normal numbers over
    sqrt(height width), with which the lengths hardly depend on the resolution."""
    with drawing(seed, ("path length",), slots):
        return normal_like(like, "noise") * like[0, 0].numel() ** -0.5


def images_and_path_lengths(
    generator: nn.Module,
    latents: Float[Tensor, "batch latent"],
    labels: Int64[Tensor, " batch"] | None,
    noise: Float[Tensor, "batch *sample"],
    precision: str,
) -> tuple[Float[Tensor, "batch *sample"], Float[Tensor, " batch"]]:
    """(G(latents, labels), path lengths), both to be differentiated by the generator's weights.

    precision: of the generator's layers, as in the config; lengths are in float32 or better
    """
    with autocast(latents.device, precision):
        with FastDerivatives(order=2):
            styles = run_styles(generator, latents, labels)
            if not styles.requires_grad:  # no weight of the mapping is trained
                styles = styles.detach().requires_grad_()
            images = run_synthesis(generator, styles)
        # Images do not affect each other, so this holds each one's own J^T y.
        direction = noise.to(images.dtype)
        (gradients,) = torch.autograd.grad(images, styles, direction, create_graph=True)
        return images, path_lengths(at_least_float32(gradients))


def path_lengths(gradients: Float[Tensor, "batch layers dim"]) -> Float[Tensor, " batch"]:
    """The root of the mean over layers of ||g||^2, as in the authors' code. Its derivative at zero
    is zero, not NaN."""
    return torch.linalg.vector_norm(gradients, dim=(1, 2)) * gradients.shape[1] ** -0.5
