"""Latents and classes to styles."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.networks.stylegan2.equalized import ACTIVATION_GAIN, EqualizedLinear, activate
from ganscale.runtime import autocast

_RATE_MULTIPLIER = 0.01


class Mapping(nn.Module):
    """Fully connected layers, which learn at 1/100 of the learning rate (Karras et al. 2019,
    https://arxiv.org/abs/1812.04948, appendix C), always in float32 or better.

    The latent and the learned embedding of the class are each normalized to a mean square of 1, and
    concatenated. Without a latent, the class alone is mapped.
    """

    def __init__(self, latent_dim: int, num_classes: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = _ClassEmbedding(num_classes, width) if num_classes > 0 else None
        inputs = latent_dim + (width if num_classes > 0 else 0)
        self.layers = nn.ModuleList(
            EqualizedLinear(
                width if index > 0 else inputs,
                width,
                gain=ACTIVATION_GAIN,
                rate_multiplier=_RATE_MULTIPLIER,
            )
            for index in range(layers)
        )

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"] | None,
        labels: Int64[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch width"]:
        with autocast(next(self.parameters()).device, "float32"):
            parts = [] if latents is None else [_normalized(latents)]
            if self.embedding is not None:
                assert labels is not None
                parts.append(_normalized(self.embedding(labels)))
            features = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            for layer in self.layers:
                features = activate(layer(features))
            return features


class _ClassEmbedding(nn.Embedding):
    """A linear layer of one-hot classes with equalized rates, as in the authors' code."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes, width)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Int64[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
        return torch.add(self.bias, super().forward(input), alpha=self.num_embeddings**-0.5)


def _normalized(vectors: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
    """With a mean square of 1."""
    return vectors * (vectors.square().mean(1, keepdim=True) + 1e-8).rsqrt()
