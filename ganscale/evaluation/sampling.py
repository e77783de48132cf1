"""Images from a generator as a function of (seed, position)."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ganscale.data.images.preprocessing import to_bytes
from ganscale.randomness import normal

CHUNK = 16
"""Images that pass the network at once, always: kernels may round differently for another batch
size, and then the same seed would not give the same bytes."""


def sample_latents(
    seed: int, first: int, count: int, latent_dim: int
) -> Float[Tensor, "count latent"]:
    """The standard normal latents of positions [first, first + count)."""
    return normal(seed, "samples", torch.arange(first, first + count), latent_dim)


def sample_labels(first: int, count: int, num_classes: int) -> Int64[Tensor, " count"] | None:
    """The classes in turn, None without classes."""
    return torch.arange(first, first + count) % num_classes if num_classes else None


def interpolated_latents(
    seed: int, rows: int, columns: int, latent_dim: int
) -> Float[Tensor, "images latent"]:
    """Each row walks in `columns` steps between two latents of its own.

    Along the great circle (White 2016, "Sampling generative networks", arXiv:1609.04468, section
    2.1): a straight line passes lengths that a normal latent almost never has.
    """
    ends = sample_latents(seed, 0, 2 * rows, latent_dim).view(rows, 2, 1, latent_dim)
    start, stop = ends[:, 0], ends[:, 1]
    cosine = torch.nn.functional.cosine_similarity(start, stop, dim=-1).clamp(-1, 1)
    angle = torch.acos(cosine).view(rows, 1, 1).clamp_min(1e-6)
    share = torch.linspace(0, 1, columns).view(1, columns, 1)
    walk = torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * stop
    return (walk / torch.sin(angle)).reshape(rows * columns, latent_dim)


def generate_images(
    generator: nn.Module, latents: Float[Tensor, "count latent"], labels: Tensor | None = None
) -> Iterator[Float[Tensor, "chunk channels height width"]]:
    """The images of `latents`, on the generator's device, at most CHUNK at a time; in evaluation
    mode."""
    weights = next(generator.parameters())
    was_training = generator.training
    generator.eval()
    try:
        for start in range(0, len(latents), CHUNK):
            inputs = [_padded(latents[start : start + CHUNK]).to(weights)]
            if labels is not None:
                inputs.append(_padded(labels[start : start + CHUNK]).to(weights.device))
            with torch.no_grad():  # not around the yield: it would hold for the caller, too
                images = generator(*inputs)
            yield images[: len(latents) - start]
    finally:
        generator.train(was_training)


def generate(
    generator: nn.Module, latents: Float[Tensor, "count latent"], labels: Tensor | None = None
) -> Iterator[UInt8[Tensor, "chunk height width channels"]]:
    """The same as bytes, on the host."""
    for images in generate_images(generator, latents, labels):
        yield to_bytes(images).cpu()


def generate_array(
    generator: nn.Module, latents: Float[Tensor, "count latent"], labels: Tensor | None = None
) -> np.ndarray:
    """All of `generate` in one (count, height, width, channels) uint8 array."""
    return torch.cat(list(generate(generator, latents, labels))).numpy()


def _padded(rows: Tensor) -> Tensor:
    """`rows` with its last row repeated up to CHUNK."""
    return torch.cat([rows, rows[-1:].expand(CHUNK - len(rows), *rows.shape[1:])])
