"""The smallest networks that have every layer through which ranks could differ."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as normalize_spectrally
from torch.utils.checkpoint import checkpoint

from ganscale.networks.batch_groups import MinibatchStdDev
from ganscale.networks.random_layers import Dropout, NoiseInjection
from ganscale.random import bernoulli_like, uniform_like


class TinyGenerator(nn.Module):
    """Latents, and the class, to a map of half the size, and that to an image in [-1, 1].

    `norm` is "batch" (torch's, which a run replaces with a GlobalBatchNorm), "spectral" (of all
    weights) or "none". `draws` mixes each latent with its reverse, and adds noise to the map, which
    `checkpoints` computes again in the backward.
    """

    can_concatenate_batches = True

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        norm: str = "none",
        width: int = 4,
        draws: bool = False,
        checkpoints: bool = False,
    ) -> None:
        super().__init__()
        channels, height, _ = sample_shape
        self.draws, self.checkpoints = draws, checkpoints
        self.map_shape = (width, height // 2, height // 2)
        self.input = nn.Linear(latent_dim, width * self.map_shape[1] ** 2)
        self.classes = nn.Embedding(num_classes, latent_dim) if num_classes else None
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.Identity()
        self.noise = NoiseInjection(width) if draws else nn.Identity()
        if isinstance(self.noise, NoiseInjection):
            nn.init.normal_(self.noise.strength)
        self.output = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
        if norm == "spectral":
            for layer in (self.input, self.output):
                normalize_spectrally(layer)

    def forward(
        self, latents: Float[Tensor, "batch latent"], labels: Int64[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        if self.classes is not None:
            latents = latents + self.classes(labels)
        if self.draws:
            is_mixed = bernoulli_like(latents[:, 0], "is mixed", 0.7)
            weights = (is_mixed * uniform_like(latents[:, 0], "mixing"))[:, None]
            latents = torch.lerp(latents, latents.flip(1), weights)
        features = self.input(latents).unflatten(1, self.map_shape)
        if self.checkpoints:
            return checkpoint(self._images, features, use_reentrant=False)  # type: ignore[return-value]
        return self._images(features)

    def _images(self, features: Tensor) -> Tensor:
        features = torch.relu(self.noise(self.norm(features)))
        return torch.tanh(self.output(features))


class TinyStyleGenerator(nn.Module):
    """A mapping to two styles, and two convolutions whose inputs the styles scale and whose outputs
    have unit variance for any style (Karras et al. 2020, arXiv:1912.04958, equations 1 and 3)."""

    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        width: int = 4,
        dim: int = 5,
    ) -> None:
        super().__init__()
        channels, height, _ = sample_shape
        self.classes = nn.Embedding(num_classes, latent_dim) if num_classes else None
        self.mapping = nn.Sequential(
            nn.Linear(latent_dim, dim), nn.LeakyReLU(0.2), nn.Linear(dim, dim)
        )
        self.constant = nn.Parameter(torch.randn(width, height // 2, height // 2))
        self.scales = nn.ModuleList(nn.Linear(dim, width) for _ in range(2))
        self.kernels = nn.ParameterList(
            torch.randn(outputs, width, 3, 3) for outputs in (width, channels)
        )

    def styles(
        self, latents: Float[Tensor, "batch latent"], labels: Int64[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch layers dim"]:
        if self.classes is not None:
            latents = latents + self.classes(labels)
        return self.mapping(latents)[:, None].expand(-1, len(self.scales), -1)

    def synthesis(
        self, styles: Float[Tensor, "batch layers dim"]
    ) -> Float[Tensor, "batch channels height width"]:
        maps = self.constant.expand(len(styles), -1, -1, -1)
        for layer, (scale, kernel) in enumerate(zip(self.scales, self.kernels, strict=True)):
            if layer > 0:
                maps = F.interpolate(F.leaky_relu(maps, 0.2), scale_factor=2, mode="nearest")
            scales = 1 + scale(styles[:, layer])
            sizes = (scales.square() @ kernel.square().sum((2, 3)).T + 1e-8).sqrt()
            maps = F.conv2d(maps * scales[:, :, None, None], kernel, padding=1)
            maps = maps / sizes[:, :, None, None]
        return torch.tanh(maps)

    def forward(
        self, latents: Float[Tensor, "batch latent"], labels: Int64[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        return self.synthesis(self.styles(latents, labels))


class TinyCritic(nn.Module):
    """Images to a map of half the size, and that to a logit, or to a map of logits (`patches`).

    `norm` is "none", "layer", "instance" or "spectral" (of all weights); `group_size`, if it is not
    0, that of a minibatch standard deviation. `draws` drops elements and channels of the map, which
    `checkpoints` computes again in each backward.
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        norm: str = "none",
        patches: bool = False,
        final_bias: bool = True,
        group_size: int = 0,
        width: int = 4,
        draws: bool = False,
        checkpoints: bool = False,
    ) -> None:
        super().__init__()
        channels, height, _ = sample_shape
        self.checkpoints = checkpoints
        layers = Dropout(0.2), Dropout(0.1, whole_channels=True)
        self.dropout = nn.Sequential(*layers) if draws else nn.Identity()
        self.input = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.norm = nn.Identity()
        if norm == "layer":
            self.norm = nn.LayerNorm([width, height // 2, height // 2])
        elif norm == "instance":
            self.norm = nn.InstanceNorm2d(width, affine=True)
        self.deviation = MinibatchStdDev(group_size) if group_size else nn.Identity()
        self.middle = nn.Conv2d(width + (group_size > 0), width, 3, padding=1)
        self.activation = nn.LeakyReLU(0.2)
        self.output: nn.Module
        if patches:
            self.output = nn.Conv2d(width, 1, 3, bias=final_bias)
        else:
            pixels = width * (height // 2) ** 2
            self.output = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 1, bias=final_bias))
        self.classes = nn.Embedding(num_classes, width) if num_classes else None
        if norm == "spectral":
            for layer in (self.input, self.middle, self.output):
                normalize_spectrally(layer[1] if isinstance(layer, nn.Sequential) else layer)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *map"]:
        features = self.activation(self.norm(self.input(images)))
        if self.checkpoints:
            features: Tensor = checkpoint(self._middle, features, use_reentrant=False)  # type: ignore[assignment]
        else:
            features = self._middle(features)
        logits = self.output(features).squeeze(1)
        if self.classes is not None:  # the projection of Miyato & Koyama 2018
            logits = logits + (features.mean([2, 3]) * self.classes(labels)).sum(1)
        return logits

    def _middle(self, features: Tensor) -> Tensor:
        return self.dropout(self.activation(self.middle(self.deviation(features))))


class TinyFeatures(nn.Module):
    """A feature network: eight projections of the pixels, in float64, so that sums in any order
    agree."""

    def __init__(self, sample_shape: tuple[int, int, int]) -> None:
        super().__init__()
        pixels = sample_shape[0] * sample_shape[1] * sample_shape[2]
        self.weight = nn.Buffer(torch.randn(pixels, 8, dtype=torch.float64))

    def features(self, images: Tensor) -> Float[Tensor, "batch 8"]:
        return (images.flatten(1).double() / 255 @ self.weight).tanh()
