"""Convolutions with a pool or an up-sampling, as residual networks have them.

A convolution and a mean over 2x2 pixels are together a convolution with stride 2 and a kernel
larger by one. So are, transposed, a nearest up-sampling and a convolution. That takes 4/9 of the
multiplications of a 3x3 kernel. The two layers here are defined by two operations; within
`merged_kernels`, as in a training step, they compute the one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_Kernels = dict[tuple[int, bool], tuple[Tensor, Tensor]]
_avg_pool2d = torch.ops.aten.avg_pool2d  # FastDerivatives has nothing to add here
_kernels: ContextVar[_Kernels | None] = ContextVar("kernels", default=None)


@contextmanager
def merged_kernels() -> Iterator[None]:
    """Within, resampling convolutions are one operation, and the forwards of a step make each
    kernel once. Weights must not change within."""
    if _kernels.get() is not None:
        yield
        return
    token = _kernels.set({})
    try:
        yield
    finally:
        _kernels.reset(token)


def is_traced() -> bool:
    """Whether the calls are being recorded: by a network's own torch.compile, where it is not known
    which derivatives will be needed, or by activation checkpointing, which repeats the forward
    outside of all contexts and must save the same tensors there."""
    if torch.compiler.is_compiling():
        return True
    top_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
    return top_hooks(True) is not None


class _SameConv2d(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, bias: bool = True) -> None:
        """Raises ValueError for an even kernel_size, which cannot keep the resolution."""
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of even size, {kernel_size}, cannot keep the resolution")
        super().__init__(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)


class PooledConv2d(_SameConv2d):
    """The mean over 2x2 pixels of a convolution that keeps the resolution.

    (batch, inputs, height, width) to (batch, outputs, height // 2, width // 2)
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, padding = self.weight, self.kernel_size[0] // 2
        if (kernel := _merged_kernel(pooled_kernel, weight, input)) is not None:
            return F.conv2d(input, kernel, self.bias, 2, padding)
        return F.avg_pool2d(F.conv2d(input, weight, self.bias, padding=padding), 2)


class UpsampledConv2d(_SameConv2d):
    """A convolution of the images doubled in size, each pixel repeated 2x2 times.

    (batch, inputs, height, width) to (batch, outputs, 2 height, 2 width)
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, padding = self.weight, self.kernel_size[0] // 2
        if (kernel := _merged_kernel(upsampled_kernel, weight, input)) is not None:
            return F.conv_transpose2d(input, kernel, self.bias, 2, padding)
        return F.conv2d(upsampled(input), weight, self.bias, padding=padding)


def upsampled(images: Tensor) -> Tensor:
    """Each pixel repeated 2x2 times, in the images' precision: on a GPU, autocast would make them
    float32, and so would be what they are added to."""
    is_cast = images.dtype == torch.bfloat16
    with torch.autocast(images.device.type, enabled=False) if is_cast else nullcontext():
        return F.interpolate(images, scale_factor=2.0, mode="nearest")


def _merged_kernel(
    make: Callable[[Tensor, Tensor], Tensor], weight: Tensor, images: Tensor
) -> Tensor | None:
    """The kernel that `make` makes, from the step's if it was made before; None if the layer is to
    compute its definition."""
    if is_traced() or (kernels := _kernels.get()) is None:
        return None
    key = id(weight), torch.is_grad_enabled()
    if key not in kernels:
        # With its weight, which a parametrization may have made for this forward only, so that no
        # other gets its id.
        kernels[key] = weight, make(weight, images)
    return kernels[key][1]


def pooled_kernel(weight: Tensor, images: Tensor) -> Tensor:
    """The kernel that, with stride 2, does the work of `weight` and a mean over 2x2 pixels.

    The mean of the convolution at four neighbouring pixels is one convolution with the mean of the
    kernel at four neighbouring positions.
    (outputs, inputs, k, k) to (outputs, inputs, k + 1, k + 1), in the memory format that torch
    would choose for the convolution of these images.
    """
    return _avg_pool2d(_in_layout_of(weight, weight, images), [2, 2], [1, 1], [1, 1])


def upsampled_kernel(weight: Tensor, images: Tensor) -> Tensor:
    """The kernel of the transposed convolution with stride 2 that does the work of a nearest
    up-sampling and `weight`: `pooled_kernel` transposed, with a sum for the mean.

    (outputs, inputs, k, k) to (inputs, outputs, k + 1, k + 1), in that memory format.
    """
    flipped = weight.flip(2, 3) if weight.shape[-1] > 1 else weight
    transposed = _in_layout_of(flipped.transpose(0, 1), weight, images)
    return _avg_pool2d(transposed, [2, 2], [1, 1], [1, 1], divisor_override=1)


def _in_layout_of(tensor: Tensor, weight: Tensor, images: Tensor) -> Tensor:
    """In the memory format that torch chooses for a convolution of these images: channels last if
    one of the two has it."""
    is_last = _is_channels_last(weight) or _is_channels_last(images)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def _is_channels_last(tensor: Tensor) -> bool:
    """Maps of one pixel count as contiguous in both formats; only their strides differ."""
    if tensor.ndim != 4:  # a single image, without a batch
        return False
    _, channel, _, column = tensor.stride()
    is_contiguous = tensor.is_contiguous(memory_format=torch.channels_last)
    return is_contiguous and channel == 1 and column >= tensor.shape[1]
