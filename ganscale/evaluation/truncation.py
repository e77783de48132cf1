"""Truncation in W: styles are pulled towards their mean, for better images of less variety."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.evaluation.sampling import sampling_draws
from ganscale.networks.batch_groups import batch_group_size, up_to_whole_groups
from ganscale.networks.styles import check_has_styles, run_styles, run_synthesis
from ganscale.randomness import normal

# Of the latents whose styles are averaged. With groups, a chunk is made of whole ones.
_CHUNKS, _CHUNK_SIZE = 20, 500


class TruncatedGenerator(nn.Module):
    """mean + truncation (styles - mean), with the mean of each image's class, then the synthesis:
    Karras et al. 2019 (arXiv:1812.04948), appendix B, at all layers."""

    def __init__(
        self,
        generator: nn.Module,
        truncation: float,
        means: Float[Tensor, "classes layers dim"],
        classes: Int64[Tensor, " classes"] | None,
    ) -> None:
        """classes: of the means, ascending; None for a single mean without classes"""
        super().__init__()
        self.generator, self.truncation = generator, truncation
        self.register_buffer("means", means)
        self.register_buffer("classes", classes)
        self.means: Tensor
        self.classes: Tensor | None

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        styles, means = run_styles(self.generator, latents, labels), self.means
        if self.classes is not None and labels is not None:
            means = means[torch.searchsorted(self.classes, labels)]
        return run_synthesis(self.generator, torch.lerp(means, styles, self.truncation))


@torch.no_grad()
def truncated(
    generator: nn.Module,
    truncation: float,
    seed: int,
    latent_dim: int,
    labels: Int64[Tensor, " images"] | None,
) -> nn.Module:
    """The generator, in evaluation mode, as it makes images with this truncation; itself for 1.

    seed: of the latents of the mean styles
    labels: all that it will get, None without classes

    Raises UserError for a truncation that is not finite and a generator without styles.
    """
    if not math.isfinite(truncation):
        raise UserError(f"a truncation must be a finite number, not {truncation}")
    if truncation == 1:
        return generator
    check_has_styles(generator, "truncation")
    generator.eval()
    weights = next(generator.parameters())
    count = _CHUNKS * up_to_whole_groups(_CHUNK_SIZE, generator)
    latents = normal(seed, "truncation", torch.arange(count), latent_dim).to(weights)
    classes = None if labels is None else labels.to(weights.device).unique()
    batch = 2 * batch_group_size(generator)
    labels = None if classes is None else classes[:1].expand(batch)
    _check_forward(generator, latents[:batch], labels)
    each_class = [None] if classes is None else classes
    means = torch.stack([_mean_styles(generator, latents, label) for label in each_class])
    return TruncatedGenerator(generator, truncation, means, classes).eval()


def _mean_styles(
    generator: nn.Module, latents: Float[Tensor, "count latent"], label: Int64[Tensor, ""] | None
) -> Float[Tensor, "layers dim"]:
    """Summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=latents.device)
    for chunk in latents.chunk(_CHUNKS):
        labels = None if label is None else label.expand(len(chunk))
        with sampling_draws(0, torch.arange(len(chunk), device=chunk.device)):
            styles = run_styles(generator, chunk, labels)
        total = total + styles.double().sum(0)
    return (total / len(latents)).to(latents.dtype)


def _check_forward(generator: nn.Module, latents: Tensor, labels: Tensor | None) -> None:
    """Raises UserError for a generator whose forward does more than its two methods."""
    slots = torch.arange(len(latents), device=latents.device)
    with sampling_draws(0, slots):
        images = run_synthesis(generator, run_styles(generator, latents, labels))
    with sampling_draws(0, slots):
        expected = generator(latents) if labels is None else generator(latents, labels)
    scale = float(expected.abs().max())
    if images.shape != expected.shape or float((images - expected).abs().max()) > 1e-3 * scale:
        raise UserError(
            f"truncation is not possible: {type(generator).__name__} makes other images in its "
            "forward than in synthesis(styles(latents, labels))"
        )
