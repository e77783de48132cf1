"""Batch normalization over the global batch, plain and class-conditional."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ganscale.errors import UserError
from ganscale.runtime import all_reduce_sum_with_grad, get_world_size


class GlobalBatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1)
    with the mean and variance of the global batch, that is, of the images of all ranks.

    Gradients are exact for a loss that is averaged over ranks, as DDP does, and the running
    statistics are the same bits on all ranks. Unlike torch's SyncBatchNorm it also runs on CPUs.

    Training on several ranks costs one all-reduce of `2 * channels` float64 per forward and one per
    backward. All ranks must therefore call it equally often, with equally many images, and there is
    no second derivative. On one rank, and in evaluation, it is `F.batch_norm`.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, channels: int, *, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch channels *spatial"]:
        if self.training and _batch_count > 1:
            return self._forward_concatenated(images.chunk(_batch_count))
        affine = self.weight, self.bias
        if len(images) == 1:  # see _BatchNormFunction.backward
            images = images.contiguous()
        if not self.training or get_world_size() == 1:
            running = self.running_mean, self.running_var
            return F.batch_norm(images, *running, *affine, self.training, self.momentum, self.eps)
        outputs, mean, variance = _BatchNormFunction.apply(images, *affine, self.eps)
        self._update_running(images, mean, variance)
        return outputs

    @torch.no_grad()
    def _forward_concatenated(self, batches: Sequence[Tensor]) -> Tensor:
        if get_world_size() == 1:
            settings = self.running_mean, self.running_var, self.weight, self.bias, True
            return torch.cat(
                [F.batch_norm(batch, *settings, self.momentum, self.eps) for batch in batches]
            )
        outputs = []
        for batch, mean, variance in zip(batches, *_global_moments(*batches), strict=True):
            self._update_running(batch, mean, variance)
            dtype = _moments_dtype(batch)
            moments = mean.to(dtype), variance.to(dtype)
            outputs.append(F.batch_norm(batch, *moments, self.weight, self.bias, eps=self.eps))
        return torch.cat(outputs)

    @torch.no_grad()
    def _update_running(self, images: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards the batch's; the variance unbiased, as in torch."""
        count = _global_count(images)
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


_batch_count = 1


@contextmanager
def concatenated_batches(count: int) -> Iterator[None]:
    """Within, a network in training takes `count` batches of the same size, concatenated, and
    without gradients. Every GlobalBatchNorm gives each batch its own statistics, as if they came
    one after another, from one all-reduce. Only for networks that pass `can_concatenate_batches`.
    """
    global _batch_count
    _batch_count = count
    try:
        with torch.no_grad():
            yield
    finally:
        _batch_count = 1


def can_concatenate_batches(network: nn.Module) -> bool:
    """Whether `concatenated_batches` is correct for the network: its class promises by
    `can_concatenate_batches = True` that a forward mixes images in batch norms only, draws
    nothing but through `ganscale.random` and changes no other buffers."""
    # Not inherited: a base class cannot promise this for what a subclass adds.
    return vars(type(network)).get("can_concatenate_batches", False)


@contextmanager
def batch_norms_in_evaluation(network: nn.Module) -> Iterator[None]:
    """Within, they use their running statistics, and do not change them."""
    norms = [module for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)


class _BatchNormFunction(torch.autograd.Function):
    """Returns the normalized images, and mean and biased variance of the global batch in float64.
    torch's kernels for one rank do all work on images."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (mean,), (variance,) = _global_moments(images)
        dtype = _moments_dtype(images)
        moments = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(images, weight, *moments)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(images, *moments, weight, bias, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Ioffe & Szegedy 2015, the equations after algorithm 1: the gradient of an image comes
        from its own output, and, through mean and variance, from the outputs of all ranks."""
        images, weight, mean, variance = ctx.saved_tensors
        if len(images) == 1:
            # On a CPU, torch (2.8 to 2.14) misreads a single image or gradient in channels last
            # whose stride over the batch is not that of a whole image.
            grad = grad.contiguous()
        # Terms cancel below: in bfloat16 they would be rounded first.
        wide_images, grad = images.to(mean.dtype), grad.to(mean.dtype)
        deviation = (variance + ctx.eps).sqrt()
        gain = torch.ones_like(mean) if weight is None else weight
        # As in evaluation, with constant moments. The GPU's kernel needs the saved moments, which
        # the CPU's does not, and a weight in any case.
        direct_grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            grad, wide_images, gain, mean, variance, mean, 1 / deviation, False, ctx.eps, [True] * 3
        )
        sums = all_reduce_sum_with_grad(torch.stack([weight_grad, bias_grad]).double())
        slope, offset = (-sums * (gain / deviation / _global_count(images))).to(mean.dtype)
        moments_grad = F.batch_norm(wide_images, mean, variance, slope, offset, eps=ctx.eps)
        # Added in place, into the images' memory format.
        images_grad = moments_grad.add_(direct_grad).to(images.dtype)
        if weight is None:
            weight_grad = bias_grad = None
        return images_grad, weight_grad, bias_grad, None


def _global_moments(
    *batches: Float[Tensor, "batch channels *spatial"],
) -> tuple[Float[Tensor, "batches channels"], Float[Tensor, "batches channels"]]:
    """Means and biased variances per channel of each batch over the images of all ranks, float64.

    Plain sums of x and x^2 lose the variance of channels with a large mean. So each rank computes
    centred moments of its own images, in float32 or better, and only these few numbers are combined
    as sums of squares, in float64, where the cancellation is harmless.
    """
    first = batches[0]
    unused = torch.zeros(2, first.shape[1], dtype=_moments_dtype(first), device=first.device)
    # The kernel of `F.batch_norm`; torch.var_mean takes twenty times as long on a CPU.
    local = [torch.batch_norm_update_stats(batch, *unused.unbind(), 0.0) for batch in batches]  # pyright: ignore[reportCallIssue]
    mean, variance = (torch.stack(rows).double() for rows in zip(*local, strict=True))
    moments = torch.stack([mean, variance + mean.square()])
    global_mean, global_square = all_reduce_sum_with_grad(moments) / get_world_size()
    return global_mean, global_square - global_mean.square()


def _global_count(images: Tensor) -> int:
    """Values per channel in the global batch."""
    return get_world_size() * images.numel() // images.shape[1]


def _moments_dtype(images: Tensor) -> torch.dtype:
    """float32 for the bfloat16 images of autocast, else the images' own."""
    return torch.promote_types(images.dtype, torch.float32)


def convert_global_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with each of torch's batch norms replaced by a GlobalBatchNorm of the same weights.

    A shared batch norm stays shared. Raises UserError for one without an exponential running mean.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _from_torch(module)
    replacements: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                replacements[child] = replacements.get(child) or _from_torch(child)
                parent._modules[name] = replacements[child]
    return module


def _from_torch(norm: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
    if norm.momentum is None or norm.running_mean is None:
        raise UserError(
            f"{norm} has no exponential running mean: give it a momentum and track_running_stats"
        )
    replacement = GlobalBatchNorm(
        norm.num_features, affine=norm.affine, momentum=norm.momentum, eps=norm.eps
    )
    replacement.to(norm.running_mean)  # its dtype and device
    replacement.load_state_dict(norm.state_dict(), strict=False)  # without num_batches_tracked
    for name, parameter in norm.named_parameters():
        getattr(replacement, name).requires_grad_(parameter.requires_grad)
    return replacement.train(norm.training)


class ConditionalBatchNorm2d(nn.Module):
    """Batch normalization with a gain and a bias per class (Dumoulin et al. 2017,
    https://arxiv.org/abs/1610.07629, equation 5), which start at 1 and 0."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.normalize = GlobalBatchNorm(channels, affine=False)
        self.gain = nn.Embedding(num_classes, channels)
        self.bias = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, "batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        gain, bias = (table(labels)[:, :, None, None] for table in (self.gain, self.bias))
        return torch.addcmul(bias, self.normalize(images), gain).to(images.dtype)


BATCH_NORMS = nn.modules.batchnorm._BatchNorm, GlobalBatchNorm, ConditionalBatchNorm2d
"""All layers that tie the images of a batch together."""
