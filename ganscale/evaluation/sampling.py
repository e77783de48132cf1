"""Images from a generator as a function of (seed, position)."""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ganscale.data.images.preprocessing import to_bytes
from ganscale.networks.batch_groups import check_whole_groups, up_to_whole_groups
from ganscale.networks.forward import in_evaluation
from ganscale.random import drawing
from ganscale.randomness import normal

CHUNK_SIZE = 16
"""The batch size of every forward, always: kernels may round differently for another batch size,
and then the same seed would not give the same bytes. For a generator that makes images in groups,
the next larger multiple of a group."""


def sample_latents(
    seed: int, first: int, count: int, latent_dim: int
) -> Float[Tensor, "count latent"]:
    """The standard normal latents of positions [first, first + count)."""
    return normal(seed, "samples", torch.arange(first, first + count), latent_dim)


def sample_labels(
    first: int, count: int, num_classes: int, repeats: int = 1
) -> Int64[Tensor, " labels"] | None:
    """The classes in turn from position `first` on, each `repeats` times; None without classes."""
    if not num_classes:
        return None
    return (torch.arange(first, first + count) % num_classes).repeat_interleave(repeats)


def interpolate_latents(
    seed: int, rows: int, columns: int, latent_dim: int
) -> Float[Tensor, "images latent"]:
    """Each row goes from one latent to another in `columns` steps, along the great circle.

    White 2016, "Sampling generative networks" (arXiv:1609.04468), section 2.1: latents on a
    straight line between the two would be shorter than a normal latent almost ever is.
    """
    ends = sample_latents(seed, 0, 2 * rows, latent_dim).view(rows, 2, 1, latent_dim)
    start, stop = ends[:, 0], ends[:, 1]
    cosine = torch.nn.functional.cosine_similarity(start, stop, dim=-1).clamp(-1, 1)
    angle = torch.acos(cosine).view(rows, 1, 1).clamp_min(1e-6)
    fraction = torch.linspace(0, 1, columns).view(1, columns, 1)
    points = torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * stop
    return (points / torch.sin(angle)).reshape(rows * columns, latent_dim)


def sampling_draws(seed: int, positions: Tensor) -> AbstractContextManager[None]:
    """Around a forward of a generator, which may draw random numbers of its own."""
    return drawing(seed, ("samples",), positions)


def interpolation_positions(rows: int, columns: int) -> Int64[Tensor, " images"]:
    """The positions for a generator's own draws: the same within a row."""
    return torch.arange(rows).repeat_interleave(columns)


def generate_images(
    generator: nn.Module,
    latents: Float[Tensor, "count latent"],
    labels: Tensor | None = None,
    *,
    seed: int = 0,
    positions: Int64[Tensor, " count"] | None = None,
) -> Iterator[Float[Tensor, "chunk channels height width"]]:
    """Yields images on the generator's device, at most CHUNK_SIZE at a time. [-1, 1] is black to
    white; generators without tanh also go beyond.

    seed, positions: of what the generator draws itself, by default in the order of the latents;
        images of one position have the same noise

    The generator is in evaluation mode meanwhile. Raises UserError for a generator that makes
    images in groups, if `latents` are not a whole number of them.
    """
    check_whole_groups(generator, "the number of samples", len(latents))
    size = up_to_whole_groups(CHUNK_SIZE, generator)
    weights = next(generator.parameters())
    positions = torch.arange(len(latents)) if positions is None else positions
    with in_evaluation(generator):
        for start in range(0, len(latents), size):
            inputs = [_pad(latents[start : start + size], size).to(weights)]
            if labels is not None:
                inputs.append(_pad(labels[start : start + size], size).to(weights.device))
            slots = _pad(positions[start : start + size], size).to(weights.device)
            # Not around the yield: that would disable the caller's gradients.
            with torch.no_grad(), sampling_draws(seed, slots):
                images = generator(*inputs)
            yield images[: len(latents) - start]


def generate_uint8(
    generator: nn.Module,
    latents: Float[Tensor, "count latent"],
    labels: Tensor | None = None,
    *,
    seed: int = 0,
    positions: Int64[Tensor, " count"] | None = None,
) -> Generator[UInt8[Tensor, "chunk height width channels"], None, None]:
    """`generate_images` as bytes on the host."""
    for images in generate_images(generator, latents, labels, seed=seed, positions=positions):
        yield to_bytes(images).cpu()


def _pad(rows: Tensor, size: int) -> Tensor:
    """Repeats the last row up to `size`."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
