"""Layers that draw random numbers through `ganscale.random`, so that these are the same on every
cluster. A layer without a name takes its path in the network, such as `blocks.2.dropout`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.random import bernoulli_like, drawing, normal_like

EVALUATION_NOISES = "random", "fixed", "off"


class RandomLayer(nn.Module):
    """name: what it draws under, unique in the network; None: its path"""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.draw_name = name

    def name_of_draw(self) -> str:
        if self.draw_name is None:
            raise UserError(
                f"a {type(self).__name__} has no name to draw with: give it one, or call "
                "`name_random_layers` with its network"
            )
        return self.draw_name


def name_random_layers(network: nn.Module) -> None:
    """Names each layer without a name by its path in the network, as `build_network` does.

    A layer that is used at several places has the first of its paths, so calling it twice in a
    forward is refused as any two draws of one name are.
    """
    for path, module in network.named_modules():
        if isinstance(module, RandomLayer) and module.draw_name is None:
            module.draw_name = path or type(module).__name__


class Dropout(RandomLayer):
    """In training, zeros each element with probability p, and multiplies the others by 1 / (1 - p).

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting";
    whole channels as in Tompson et al. 2015 (arXiv:1411.4280), section 3.2.
    """

    def __init__(
        self, p: float = 0.5, name: str | None = None, *, whole_channels: bool = False
    ) -> None:
        """whole_channels: of (batch, channels, ...), zeros channels instead of elements

        Raises UserError unless 0 <= p < 1.
        """
        super().__init__(name)
        if not 0 <= p < 1:
            raise UserError(f"the probability of dropout must be at least 0 and below 1, not {p}")
        self.p, self.whole_channels = p, whole_channels

    def forward(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        if not self.training or self.p == 0:
            return x
        like = x[(..., *[slice(1)] * (x.ndim - 2))] if self.whole_channels else x
        kept = bernoulli_like(like, self.name_of_draw(), 1 - self.p)
        return x * (kept * (1 / (1 - self.p)))


def noise_like(
    maps: Float[Tensor, "batch channels *size"], name: str, is_training: bool, evaluation: str
) -> Float[Tensor, "images 1 *size"] | None:
    """A map of normal noise for each image. In evaluation, "random" is the same, "fixed" is one map
    for all images, and "off" is None."""
    if is_training or evaluation == "random":
        return normal_like(maps[:, :1], name)
    if evaluation == "off":
        return None
    with drawing(0, ("fixed noise",), torch.zeros(1, dtype=torch.int64)):
        return normal_like(maps[:1, :1], name)


class NoiseInjection(RandomLayer):
    """Adds one map of normal noise, times a learned strength that starts at zero.

    Karras et al. 2019 (arXiv:1812.04948), section 2, with a strength per channel; a single one
    for all channels as in StyleGAN2 (arXiv:1912.04958).
    """

    def __init__(
        self,
        channels: int = 1,
        name: str | None = None,
        *,
        evaluation: str = "random",
    ) -> None:
        """channels: of the maps, each with a strength of its own; 1: the same for all
        evaluation: in evaluation mode, noise that follows from the seed of the samples ("random"),
            the same noise for every image ("fixed"), or none ("off")

        Raises UserError for another evaluation.
        """
        super().__init__(name)
        self.strength = nn.Parameter(torch.zeros(channels))
        if evaluation not in EVALUATION_NOISES:
            raise UserError(f"noise in evaluation is random, fixed or off, not {evaluation!r}")
        self.evaluation = evaluation

    def forward(
        self, maps: Float[Tensor, "batch channels *size"]
    ) -> Float[Tensor, "batch channels *size"]:
        noise = noise_like(maps, self.name_of_draw(), self.training, self.evaluation)
        if noise is None:
            return maps
        strength = self.strength.view(-1, *[1] * (maps.ndim - 2))
        return torch.addcmul(maps, noise, strength.to(maps.dtype))
