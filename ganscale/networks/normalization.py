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
    whose mean and variance are those of the global batch, the images of all ranks together.

    So N ranks with B images each compute what one rank computes with N*B. Gradients are exact for
    a loss that is averaged over ranks, as DDP averages, and the running statistics are the same
    bits on all ranks. Unlike torch's SyncBatchNorm it also runs on CPUs.

    Cost on several ranks, in training only: one all-reduce of `2 * channels` float64 per forward
    and one per backward, which wait for every rank; so all ranks must go through it equally often,
    with equally many images. On one rank, and in evaluation anywhere, it is `F.batch_norm`. Within
    `batches_together`, several batches share the all-reduce. It has no second derivative there.
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
        self, images: Float[Tensor, "batch channels *places"]
    ) -> Float[Tensor, "batch channels *places"]:
        if self.training and _batches > 1:
            return self._forward_together(images.chunk(_batches))
        if not self.training or get_world_size() == 1:
            return F.batch_norm(
                images,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        outputs, mean, variance = _NormalizeGlobally.apply(images, self.weight, self.bias, self.eps)
        self._update_running(images, mean, variance)
        return outputs

    @torch.no_grad()
    def _forward_together(self, batches: Sequence[Tensor]) -> Tensor:
        outputs = []
        for batch, mean, variance in zip(batches, *_global_moments(*batches), strict=True):
            self._update_running(batch, mean, variance)
            moments = mean.to(_wide(batch)), variance.to(_wide(batch))
            outputs.append(F.batch_norm(batch, *moments, self.weight, self.bias, eps=self.eps))
        return torch.cat(outputs)

    @torch.no_grad()
    def _update_running(self, images: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards the batch's, the variance unbiased as in torch."""
        count = get_world_size() * images.numel() // images.shape[1]
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


_batches = 1


@contextmanager
def batches_together(count: int) -> Iterator[None]:
    """Within, what a network in training is given are `count` batches of one size, in a row: each
    has its own moments in every GlobalBatchNorm, as if they came one after another, but their sums
    travel together. Not differentiable.

    Right for a network that mixes the images of a batch nowhere else, and changes nothing else in
    a forward.
    """
    global _batches
    _batches = count
    try:
        with torch.no_grad():
            yield
    finally:
        _batches = 1


def normalizes_together(network: nn.Module) -> bool:
    """Whether `batches_together` saves collectives of `network`, and is right for it, as its class
    has to say: `mixes_images_in_batch_norm_only = True`."""
    has_norms = any(isinstance(module, GlobalBatchNorm) for module in network.modules())
    # What a class inherits from is no promise for what it adds.
    return has_norms and vars(type(network)).get("mixes_images_in_batch_norm_only", False)


class _NormalizeGlobally(torch.autograd.Function):
    """(the images, normalized; the mean and the biased variance of the global batch, in float64).

    All that is done with images is done by torch's kernels for one rank; what passes between the
    ranks are sums per channel, in float64.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (mean,), (variance,) = _global_moments(images)
        moments = mean.to(_wide(images)), variance.to(_wide(images))
        ctx.save_for_backward(images, weight, *moments)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(images, *moments, weight, bias, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, gradients: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Ioffe & Szegedy 2015, the equations after algorithm 1: an image's gradient comes directly
        from its output, and through the mean and the variance from the outputs of all ranks."""
        images, weight, mean, variance = ctx.saved_tensors
        # In bfloat16, what cancels here would be rounded before it does.
        wide, gradients = images.to(mean.dtype), gradients.to(mean.dtype)
        deviation = (variance + ctx.eps).sqrt()
        gain = torch.ones_like(mean) if weight is None else weight
        # As in evaluation, with constant moments. The GPU's kernel wants the moments that the CPU's
        # does without, and a weight even if there is none.
        directly, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients, wide, gain, mean, variance, mean, 1 / deviation, False, ctx.eps, [True] * 3
        )
        sums = all_reduce_sum_with_grad(torch.stack([of_weight, of_bias]).double())
        count = get_world_size() * images.numel() // images.shape[1]
        of_variance, of_mean = (-sums * (gain / deviation / count)).to(mean.dtype)
        through_moments = F.batch_norm(wide, mean, variance, of_variance, of_mean, eps=ctx.eps)
        of_images = through_moments.add_(directly).to(images.dtype)  # in the images' memory format
        if weight is None:
            of_weight = of_bias = None
        return of_images, of_weight, of_bias, None


def _global_moments(
    *batches: Float[Tensor, "batch channels *places"],
) -> tuple[Float[Tensor, "batches channels"], Float[Tensor, "batches channels"]]:
    """Means and biased variances per channel of batches over the images of all ranks, float64.

    Plain sums of x and x^2 lose the variance of channels whose mean is large. So each rank takes
    its own moments, centred, in float32 or better; only these few numbers are combined as sums of
    squares, in float64, where the cancellation is harmless. Subtracting a running mean first would
    do as well, but only while the buffers of all ranks are the same.
    """
    first = batches[0]
    unused = torch.zeros(2, first.shape[1], dtype=_wide(first), device=first.device)
    # The kernel of `F.batch_norm`; torch.var_mean takes twenty times as long on a CPU.
    of_batches = [torch.batch_norm_update_stats(each, *unused.unbind(), 0.0) for each in batches]  # pyright: ignore[reportCallIssue]
    mean, variance = (torch.stack(rows).double() for rows in zip(*of_batches, strict=True))
    moments = torch.stack([mean, variance + mean.square()])
    global_mean, global_square = all_reduce_sum_with_grad(moments) / get_world_size()
    return global_mean, global_square - global_mean.square()


def _wide(images: Tensor) -> torch.dtype:
    """Of the moments: float32 for bfloat16 images, which come under autocast."""
    return torch.promote_types(images.dtype, torch.float32)


def with_global_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every batch norm of torch's replaced by a GlobalBatchNorm of the same weights.

    One that stands in several places stays one. Raises UserError for a batch norm that keeps no
    running mean, or the mean of all batches so far.
    """
    replacements: dict[nn.Module, nn.Module] = {}

    def replaced(child: nn.Module) -> nn.Module:
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if child not in replacements:
                replacements[child] = _globalized(child)
            return replacements[child]
        for name, grandchild in child._modules.items():
            if grandchild is not None:
                child._modules[name] = replaced(grandchild)
        return child

    return replaced(module)


def _globalized(module: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
    if module.momentum is None or module.running_mean is None:
        raise UserError(
            f"{module} has no exponential running mean: give it a momentum and track_running_stats"
        )
    replacement = GlobalBatchNorm(
        module.num_features, affine=module.affine, momentum=module.momentum, eps=module.eps
    )
    replacement.to(module.running_mean)  # its type and device
    replacement.load_state_dict(module.state_dict(), strict=False)  # has no count of batches
    for name, parameter in module.named_parameters():
        getattr(replacement, name).requires_grad_(parameter.requires_grad)
    return replacement.train(module.training)


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
        gain = self.gain(labels)[:, :, None, None]
        bias = self.bias(labels)[:, :, None, None]
        return torch.addcmul(bias, self.normalize(images), gain).to(images.dtype)
