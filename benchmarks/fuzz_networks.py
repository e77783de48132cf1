"""Random networks out of a grammar of layers, as users write them; some must be refused."""

import copy
import os
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from ganscale.networks.batch_groups import MinibatchStdDev
from ganscale.networks.random_layers import Dropout, NoiseInjection
from ganscale.networks.resampling import PooledConv2d, UpsampledConv2d

Chance = random.Random
Function = Callable[[Tensor], Tensor]


class Lambda(nn.Module):
    def __init__(self, function: Function, name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class Tokens(nn.Module):
    """Attention over the pixels of a map."""

    def __init__(self, chance: Chance, channels: int) -> None:
        super().__init__()
        self.kind = chance.choice(("function", "multi-head", "multi-head with weights", "encoder"))
        heads = 2 if channels % 2 == 0 else 1
        self.layer = nn.Identity()
        if self.kind.startswith("multi-head"):
            self.layer = nn.MultiheadAttention(channels, heads, batch_first=True)
        if self.kind == "encoder":
            first = chance.random() < 0.5
            options = {"dropout": 0.0, "batch_first": True, "norm_first": first}
            self.layer = nn.TransformerEncoderLayer(channels, heads, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if self.kind == "function":
            mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        elif self.kind == "encoder":
            mixed = self.layer(tokens)
        else:
            has_weights = self.kind.endswith("weights")
            mixed = self.layer(tokens, tokens, tokens, need_weights=has_weights)[0]
        return mixed.transpose(1, 2).reshape(x.shape)


class Around(nn.Module):
    """A way to apply a layer; `how` names it."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            return checkpoint(self.layer, x, use_reentrant=False)
        if self.how == "reentrant checkpoint":
            return checkpoint(self.layer, x, use_reentrant=True)
        if self.how == "shared" and (once := self.layer(x)).shape == x.shape:
            return self.layer(once)
        if self.how == "residual" and (y := self.layer(x)).shape == x.shape:
            return x + 0.5 * y
        if self.how == "residual in place" and (y := self.layer(x)).shape == x.shape:
            y += x
            return y
        if self.how == "concatenated" and (y := self.layer(x)).shape[2:] == x.shape[2:]:
            return torch.cat([x, y], dim=1)
        if self.how == "image by image":
            return torch.cat([self.layer(image) for image in x.split(1)])
        if self.how == "slice in place":
            y = self.layer(x).clone()
            y[:, :1] *= 0.5
            return y
        if self.how == "random affine weights" and isinstance(self.layer, nn.Conv2d):
            weight = torch.tanh(self.layer.weight) * self.layer.weight.std()
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return self.layer(x)


def convolution(chance: Chance, channels: int) -> nn.Module:
    outputs, size = chance.choice((2, 4, 6)), chance.choice((1, 2, 3, 4, 5))
    groups = chance.choice([g for g in (1, 1, 2, channels) if channels % g == outputs % g == 0])
    bias, kind = chance.random() < 0.7, chance.random()
    if kind < 0.15:
        layers = PooledConv2d, UpsampledConv2d
        return chance.choice(layers)(channels, outputs, chance.choice((1, 3)), bias=bias)
    if kind < 0.35:
        stride = chance.choice((1, 2))
        extra = chance.choice((0, 1)) if stride == 2 else 0
        padding = chance.choice((0, 1)) if size > 2 else 0
        layer = nn.ConvTranspose2d(
            channels, outputs, size, stride, padding, extra, groups=groups, bias=bias
        )
    else:
        stride = chance.choice((1, 1, 2, (2, 1)))
        padding = "same" if stride == 1 and chance.random() < 0.3 else chance.choice((0, 1, 2))
        mode = chance.choice(("zeros", "zeros", "reflect", "circular", "replicate"))
        dilation = chance.choice((1, 1, 2)) if size < 4 else 1
        layer = nn.Conv2d(
            channels, outputs, size, stride, padding, dilation, groups, bias, padding_mode=mode
        )
    norm = chance.random()
    if norm < 0.1:
        return spectral_norm(layer)
    return weight_norm(layer) if norm < 0.2 else layer


def activation(chance: Chance, channels: int) -> nn.Module:
    inplace, slope = chance.random() < 0.4, chance.choice((0.0, 0.01, 0.2, -0.1))
    functions: dict[str, Function] = {
        "relu_": lambda x: x.clone().relu_(),
        "leaky_relu_": lambda x: F.leaky_relu_(1.5 * x, abs(slope)),
        "abs": torch.abs,
        "clamp": lambda x: x.clamp(-1, 1),
        "gate": lambda x: x * x.sigmoid(),
        "softmax": lambda x: 3 * x.softmax(1),
        "square": lambda x: x + 0.1 * x.square(),
        "sort": lambda x: x.sort(dim=1).values,
        "sine": torch.sin,
        "float32": lambda x: x.float().to(x.dtype) + x,
    }
    modules: list[Callable[[], nn.Module]] = [
        lambda: nn.ReLU(inplace),
        lambda: nn.LeakyReLU(slope, inplace and slope >= 0),
        lambda: nn.ELU(inplace=inplace),
        lambda: nn.SiLU(inplace),
        lambda: nn.Hardtanh(inplace=inplace),
        lambda: nn.Mish(inplace),
        nn.GELU,
        nn.Tanh,
        nn.Softplus,
        lambda: nn.PReLU(channels),
    ]
    modules += [lambda n=name, f=f: Lambda(f, n) for name, f in functions.items()]  # type: ignore[misc]
    return chance.choice(modules)()


class LayerNormOfChannels(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalization(chance: Chance, channels: int) -> nn.Module:
    return chance.choice(
        (
            nn.GroupNorm(2 if channels % 2 == 0 else 1, channels),
            nn.InstanceNorm2d(channels, affine=chance.random() < 0.5),
            nn.LocalResponseNorm(2),
            LayerNormOfChannels(channels),
            Lambda(lambda x: x / (x.square().mean(1, keepdim=True) + 1e-4).sqrt(), "pixel norm"),
            Lambda(lambda x: F.normalize(x, dim=1), "unit vectors"),
        )
    )


def resampling(chance: Chance, channels: int) -> nn.Module:
    size = chance.choice((2, 3, 4))
    mode = chance.choice(("nearest", "bilinear", "bicubic", "area"))
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    angle = torch.tensor([[0.9, 0.3, 0.1], [-0.3, 0.9, 0.0]])

    def blur(x: Tensor) -> Tensor:
        weight = kernel.to(x).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, groups=x.shape[1])

    def rotate(x: Tensor) -> Tensor:
        grid = F.affine_grid(angle.to(x).expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    functions: dict[str, Function] = {
        f"interpolate {mode} {size}": lambda x: F.interpolate(x, (2 + size, 3 + size), mode=mode),
        "blur": blur,
        "rotate": rotate,
        "unshuffle": lambda x: F.pixel_unshuffle(x, 2) if x.shape[2] * x.shape[3] % 4 == 0 else x,
        "roll": lambda x: x.roll(1, 2),
        "flip": lambda x: x.flip(3),
        "transpose": lambda x: x.transpose(2, 3),
        "reflect": lambda x: F.pad(x, (1, 0, 1, 1), mode="reflect"),
        "fourier": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * (0.5 + 0.2j), s=x.shape[2:]),
        "spectrum": lambda x: torch.fft.fft2(x).abs() / 8,
        "cumulative": lambda x: 0.3 * x.cumsum(2),
        "unfold": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1) / 9,
    }
    modules: list[nn.Module] = [
        nn.AvgPool2d(2, chance.choice((1, 2)), ceil_mode=chance.random() < 0.5),
        nn.AvgPool2d(3, 2, 1, count_include_pad=chance.random() < 0.5),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(size),
        nn.AdaptiveMaxPool2d(size),
        nn.LPPool2d(2.0, 2),
    ]
    return chance.choice(modules + [Lambda(f, name) for name, f in functions.items()])


class Offence(nn.Module):
    """What a run must refuse, or what looks like it; "none" is neither."""

    KINDS = (
        "deviation", "gated deviation", "functional batch norm", "detached mean", "batch size",
        "moving average", "counter", "dropout", "noise", "random", "numpy", "own generator",
        "running statistics", "spectral norm by hand", "neighbour", "place", "no second derivative",
        "gradient hook", "state with gradients", "large batches", "world size", "groups",
    )  # fmt: skip

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.gate = nn.Parameter(torch.zeros(()))
        self.matrix = nn.Parameter(torch.eye(channels) + 0.1 * torch.randn(channels, channels))
        self.register_buffer("average", torch.ones(channels))
        self.norm = nn.InstanceNorm2d(channels, track_running_stats=kind == "running statistics")
        self.generator = np.random.default_rng(0)
        self.average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        kind, x = self.kind, x + self.gate + 0 * self.matrix.sum()
        if kind == "deviation":
            return x + 0.5 * x.std(0, unbiased=False).mean()
        if kind == "gated deviation":
            return x + self.gate * x.std(0, unbiased=False).mean()
        if kind == "functional batch norm":
            return F.batch_norm(x, None, None, training=True)
        if kind == "detached mean":
            return x - 0.1 * x.detach().mean(0, keepdim=True)
        if kind == "batch size":
            return x * len(x) / 4
        if kind == "neighbour":
            return x + 0.1 * x.roll(1, 0)
        if kind == "place":
            return x + torch.arange(len(x)).view(-1, 1, 1, 1).to(x)
        if kind == "large batches":
            return x - 0.1 * x.mean(0) if len(x) > 6 else x
        if kind == "groups":
            groups = x.view(max(1, len(x) // 2), -1, *x.shape[1:])
            return x + groups.std(0, unbiased=False).mean()
        if kind == "world size":
            return x * int(os.environ.get("WORLD_SIZE", "1"))
        if kind == "gradient hook":
            x = x.clone()
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient / (1 + gradient.norm()))
            return x
        if kind == "state with gradients":
            if torch.is_grad_enabled():
                self.average.lerp_(x.detach().mean((0, 2, 3)).to(self.average), 0.1)
            return x
        if kind == "moving average":
            with torch.no_grad():
                self.average.lerp_(x.mean((0, 2, 3)).to(self.average), 0.1)
            return x * self.average.view(1, -1, 1, 1)
        if kind == "counter":
            self.calls += 1
            return x * min(1.0, self.calls / 100)
        if kind == "dropout":
            return F.dropout(x, 0.1)
        if kind == "noise":
            return x + self.gate * torch.randn_like(x)
        if kind == "random":
            return 2 * x if random.random() < 0.01 else x
        if kind == "numpy":
            return x * (1 + 0.1 * np.random.rand())  # noqa: NPY002
        if kind == "own generator":
            return x + 0.1 * self.generator.normal()
        if kind == "running statistics":
            return self.norm(x)
        if kind == "spectral norm by hand":
            with torch.no_grad():
                self.average.copy_(F.normalize(self.matrix @ self.average, dim=0))
            return x / (self.matrix @ self.average).norm()
        if kind == "none":
            return x
        return x + torch.cdist(x.flatten(2), x.flatten(2), p=3.0).mean((1, 2)).view(-1, 1, 1, 1)


class GroupOffence(Offence):
    """Declares groups, but looks at others."""

    KINDS = "strided groups", "larger groups", "shifted groups"
    batch_group_size = 2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate + 0 * self.matrix.sum()
        if self.kind == "shifted groups":
            return MinibatchStdDev(2)(x.roll(1, 0)).roll(-1, 0)
        if self.kind == "larger groups":
            return MinibatchStdDev(len(x))(x)
        order = torch.arange(len(x)).view(2, -1).t().flatten()
        return MinibatchStdDev(2)(x[order])[order.argsort()]


def add_groups(
    layers: nn.Sequential,
    channels: int,
    chance: Chance,
    has_offences: bool,
    offences: Sequence[str],
) -> int:
    """Sometimes appends a layer that looks at pairs of images; returns the channels after it."""
    if chance.random() > 0.15:
        return channels
    kind = chance.choice(("pairs", "pairs", *offences))
    is_right = kind == "pairs" or not has_offences
    layers.append(MinibatchStdDev(2) if is_right else GroupOffence(kind, channels))
    return channels + 1


def random_layer(number: int, channels: int) -> nn.Module:
    """For one network in five, after its other layers; made of a chance of its own, so that these
    stay what they are."""
    chance = Chance(f"random layer of {number}")
    if chance.random() < 0.8:
        return nn.Identity()
    noise = NoiseInjection(channels, evaluation=chance.choice(("random", "fixed", "off")))
    nn.init.normal_(noise.strength)
    layer = chance.choice((noise, Dropout(0.2), Dropout(0.1, whole_channels=True)))
    return Around(layer, chance.choice(("plainly", "residual", "checkpoint")))


WAYS = (
    "plainly", "plainly", "plainly", "residual", "residual in place", "concatenated", "shared",
    "checkpoint", "image by image", "slice in place", "random affine weights",
)  # fmt: skip


def stages(
    chance: Chance, shape: Sequence[int], is_critic: bool, has_offences: bool
) -> tuple[nn.Sequential, int, int]:
    """(layers, channels and pixels of their output) for maps of `shape`."""
    makers = [convolution, convolution, convolution, activation, activation, normalization]
    makers += [resampling, resampling, lambda c, n: Tokens(c, n)]
    layers: list[nn.Module] = []
    sample = torch.randn(3, *shape)
    offence_at = chance.randrange(5) if chance.random() < 0.12 else None
    for index in range(chance.randint(2, 6)):
        layer = chance.choice(makers)(chance, sample.shape[1])
        if not is_critic and chance.random() < 0.25:
            layer = nn.BatchNorm2d(sample.shape[1], momentum=0.3)
        elif index == offence_at:
            kind = chance.choice(Offence.KINDS)
            layer = Offence(kind if has_offences else "none", sample.shape[1])
        elif chance.random() < 0.02:
            layer = Around(layer, "reentrant checkpoint")
        else:
            layer = Around(layer, chance.choice(WAYS))
        try:
            with torch.no_grad():
                output = copy.deepcopy(layer).eval()(sample)
        except (RuntimeError, ValueError):  # too small for it
            continue
        if 0 < output[0].numel() <= 2000 and output.ndim == 4:
            layers.append(layer)
            sample = torch.randn_like(output)
    return nn.Sequential(*layers), sample.shape[1], sample.shape[2:].numel()


class RandomCritic(nn.Module):
    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        number: int,
        has_offences: bool = True,
    ) -> None:
        super().__init__()
        chance = Chance(2 * number)
        made = stages(chance, sample_shape, is_critic=True, has_offences=has_offences)
        self.stages, channels, pixels = made
        of_groups = Chance(f"group {2 * number}"), has_offences, GroupOffence.KINDS
        channels = add_groups(self.stages, channels, *of_groups)
        self.random_layer = random_layer(2 * number, channels)
        self.head = chance.choice(("flat", "flat", "patches", "mean", "squeeze"))
        inputs = channels if self.head in ("patches", "mean") else channels * pixels
        self.last = nn.Linear(inputs, 1, bias=chance.random() < 0.7)
        self.is_view = chance.random() < 0.05
        self.classes = nn.Embedding(num_classes, channels) if num_classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        maps = self.random_layer(self.stages(images))
        if self.classes is not None:
            maps = maps * (1 + self.classes(labels)[:, :, None, None])
        if self.head == "patches":
            return self.last(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.head == "mean":
            return self.last(maps.mean((2, 3)))
        flat = maps.view(len(maps), -1) if self.is_view else maps.flatten(1)
        return self.last(flat).squeeze() if self.head == "squeeze" else self.last(flat).squeeze(1)


class RandomGenerator(nn.Module):
    def __init__(
        self,
        latent_dim: int,
        sample_shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        number: int,
        has_offences: bool = True,
    ) -> None:
        super().__init__()
        chance = Chance(2 * number + 1)
        self.size = sample_shape[1:]
        self.first = nn.Linear(latent_dim, 4 * 4 * 4)
        made = stages(chance, (4, 4, 4), is_critic=False, has_offences=has_offences)
        self.stages, channels, _ = made
        of_groups = Chance(f"group {2 * number + 1}"), has_offences, ()
        channels = add_groups(self.stages, channels, *of_groups)
        self.random_layer = random_layer(2 * number + 1, channels)
        self.last = nn.Conv2d(channels, sample_shape[0], 1)
        self.classes = nn.Embedding(num_classes, latent_dim) if num_classes else None

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.classes is not None:
            latents = latents + self.classes(labels)
        maps = self.random_layer(self.stages(self.first(latents).view(-1, 4, 4, 4)))
        return torch.tanh(F.interpolate(self.last(maps), self.size, mode="nearest"))
