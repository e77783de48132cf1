"""Fully connected networks, as in the experiments on two-dimensional Gaussians of "Improved
Training of Wasserstein GANs" (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, figure 1).
"""

import math

from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.networks.shapes import require_positive, require_unconditional


class MLPGenerator(nn.Module):
    """Latents through `depth` hidden layers of `width` ReLUs to points, or to images.

    Points, `sample_shape == (D,)`, are a linear function of the last hidden layer; images,
    `(C, H, W)`, end in a tanh, so they are in [-1, 1].
    """

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        require_unconditional(num_classes, "mlp")
        require_positive("mlp", width=width, depth=depth)
        self.sample_shape = tuple(sample_shape)
        self.layers = _layers(latent_dim, math.prod(sample_shape), width, depth)
        if len(sample_shape) == 3:
            self.layers.append(nn.Tanh())

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch *sample_shape"]:
        return self.layers(latents).unflatten(1, self.sample_shape)


class MLPCritic(nn.Module):
    """Flattened samples of any shape through `depth` hidden layers of `width` ReLUs to a logit."""

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        require_unconditional(num_classes, "mlp")
        require_positive("mlp", width=width, depth=depth)
        self.layers = _layers(math.prod(sample_shape), 1, width, depth)

    def forward(
        self,
        images: Float[Tensor, "batch *sample_shape"],
        labels: Int64[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        return self.layers(images.flatten(1)).squeeze(1)


def _layers(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` hidden layers with He's initialization, and a linear one with Glorot's."""
    layers = nn.Sequential()
    for _ in range(depth):
        hidden = nn.Linear(inputs, width)
        nn.init.kaiming_uniform_(hidden.weight, nonlinearity="relu")
        nn.init.zeros_(hidden.bias)
        layers.extend([hidden, nn.ReLU()])
        inputs = width
    last = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(last.weight)
    nn.init.zeros_(last.bias)
    return layers.append(last)
