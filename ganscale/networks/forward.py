"""How networks are called: with labels if they are class-conditional, without otherwise."""

from jaxtyping import Float
from torch import Tensor, nn


def run_generator(
    generator: nn.Module, latents: Float[Tensor, "batch latent"], labels: Tensor | None = None
) -> Float[Tensor, "batch *sample"]:
    """G(z), or G(z, y) for a class-conditional generator."""
    return generator(latents) if labels is None else generator(latents, labels)


def run_critic(
    critic: nn.Module, images: Float[Tensor, "batch *sample"], labels: Tensor | None = None
) -> Tensor:
    """D(x), or D(x, y) for a class-conditional critic: logits, one or a map per image."""
    return critic(images) if labels is None else critic(images, labels)
