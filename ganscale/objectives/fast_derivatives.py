"""`FastDerivatives`: a context that gives the layers of any network faster derivatives.

Within it, calls such as `F.conv2d` go to the functions below, which return None where torch's own
implementation is as good.

`order=2` is for forwards that a gradient penalty differentiates twice: the functions of
`double_backward` replace convolutions, average pools and ReLUs. Everything else keeps autograd's
derivatives; the two mix freely. `order=1` is for forwards that are differentiated once or never: it
replaces average pools and the convolutions that `fast_convolutions` speeds up. Both merge
convolutions with resampling (`networks.resampling`).

Both work around two errors of torch's norms on a CPU (`_norm_per_channel`, `_group_norm`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ganscale.networks.resampling import is_traced, merged_kernels
from ganscale.objectives.double_backward import (
    FastAvgPool2d,
    FastConvolution,
    FastLeakyReLU,
    LossFactors,
)
from ganscale.objectives.fast_convolutions import (
    ConvolutionSettings,
    as_matrix_product,
    convolve,
    is_im2col_faster,
    is_subpixel_faster,
)
from ganscale.runtime import compute_dtype, has_cheap_launches

Sizes = int | Sequence[int]


def first_derivatives(device: torch.device) -> AbstractContextManager[Any]:
    """A context for forwards that are differentiated once or never.

    Merged kernels save work on every device. The other forms of order 1 were found on CPUs; they
    cost calls from Python, and no GPU has tried them (benchmarks.forms does).
    """
    return FastDerivatives() if has_cheap_launches(device) else merged_kernels()


class FastDerivatives(TorchFunctionMode):
    def __init__(self, order: int = 1, factors: LossFactors | None = None) -> None:
        """order: how many times the forward will be differentiated, 1 or 2
        factors: for a joint backward, those of the loss (`joint_backward`)
        """
        super().__init__()
        self.order, self.factors = order, factors

    def __enter__(self) -> "FastDerivatives":
        self._merged = merged_kernels()
        self._merged.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._merged.__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (norm := _NORMS.get(func)) is not None and not torch.compiler.is_compiling():
            return norm(func, *args, **kwargs)
        output, replacement = None, _REPLACEMENTS.get(func)
        if replacement is not None and not is_traced():
            output = replacement(*args, **kwargs, mode=self)
        elif replacement is not None and self.factors is not None:
            self.factors.is_traced = True
        return func(*args, **kwargs) if output is None else output


# Each of these has the parameters of the function that it replaces, plus the mode.


def _leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, mode: FastDerivatives
) -> Tensor | None:
    if mode.order < 2 or negative_slope < 0 or not _is_differentiated(input):
        return None
    return FastLeakyReLU.apply(input, negative_slope, inplace)


def _relu(input: Tensor, inplace: bool = False, *, mode: FastDerivatives) -> Tensor | None:
    if mode.order < 2 or not _is_differentiated(input):
        return None
    return FastLeakyReLU.apply(input, 0.0, inplace, True)


def _avg_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    mode: FastDerivatives,
) -> Tensor | None:
    if not _is_differentiated(input):
        return None
    sizes = [_per_dimension(size, 2) for size in (kernel_size, stride or kernel_size, padding)]
    return FastAvgPool2d.apply(input, *sizes, ceil_mode, count_include_pad, divisor_override)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    is_transposed: bool = False,
    output_padding: Sizes = 0,
    mode: FastDerivatives,
) -> Tensor | None:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _are_plain(*tensors) or isinstance(padding, str) or input.ndim != weight.ndim:
        return None
    in_channels, out_channels = weight.shape[1] * groups, weight.shape[0]
    if is_transposed:
        in_channels, out_channels = out_channels, in_channels
    if input.shape[1] != in_channels or (bias is not None and bias.shape != (out_channels,)):
        return None  # torch raises its own error
    dimensions = weight.ndim - 2
    settings = ConvolutionSettings(
        _per_dimension(stride, dimensions),
        _per_dimension(padding, dimensions),
        _per_dimension(dilation, dimensions),
        is_transposed,
        _per_dimension(output_padding, dimensions),
        groups,
    )
    product = as_matrix_product(input, weight, bias, settings)
    if product is not None:
        return product
    is_twice = mode.order > 1
    if not (_is_differentiated(input) if is_twice else _is_faster_once(input, weight, settings)):
        return None
    input, weight, *biases = [tensor.to(compute_dtype(tensor)) for tensor in tensors]
    inputs = input, weight, biases[0] if biases else None, settings
    if not torch.is_grad_enabled():
        return convolve(*inputs)
    # Not where a network has put together its batch anew.
    takes_part = mode.factors is not None and len(input) == mode.factors.batch
    return FastConvolution.apply(*inputs, mode.factors if takes_part else None)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    mode: FastDerivatives,
) -> Tensor | None:
    return _convolution(
        input, weight, bias, stride, padding, dilation, groups,
        is_transposed=True, output_padding=output_padding, mode=mode,
    )  # fmt: skip


def _norm_per_channel(
    func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """On a CPU, torch (2.8 to 2.14) misreads a single image or gradient in channels last whose
    stride over the batch is not that of a whole image, and returns a wrong gradient. To an instance
    norm, a batch is a single image of more channels."""
    is_single = len(input) == 1 or func in _INSTANCE_NORMS
    if not is_single or input.device.type != "cpu":
        return func(input, *args, **kwargs)
    output = func(_in_one_layout(input), *args, **kwargs)
    if output.requires_grad:
        # Autograd passes None for a gradient of zeros.
        output.register_hook(lambda grad: None if grad is None else _in_one_layout(grad))
    return output


def _in_one_layout(maps: Tensor) -> Tensor:
    """Contiguous, or really in channels last."""
    if len(maps) > 1 and maps.is_contiguous(memory_format=torch.channels_last):
        return maps
    return maps.contiguous()


def _group_norm(func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch (2.8 to 2.13) crashes on a CPU in a backward that needs the gradient of a weight, but
    not that of images in channels last, such as the images of a batch."""
    if input.device.type != "cpu" or not torch.is_grad_enabled():
        return func(input, *args, **kwargs)
    if is_traced() and not input.requires_grad and not input.is_contiguous():
        raise RuntimeError(  # checkpointing repeats the forward without this function
            "torch (2.8 to 2.13) crashes on a CPU where checkpointing repeats a group norm of "
            "images in channels last; `training.memory_format=contiguous` avoids it"
        )
    return func(input.contiguous(), *args, **kwargs)


_INSTANCE_NORMS = F.instance_norm, torch.instance_norm
_NORMS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys(_INSTANCE_NORMS, _norm_per_channel),
    **dict.fromkeys([F.batch_norm, torch.batch_norm], _norm_per_channel),
    **dict.fromkeys([F.group_norm, torch.group_norm], _group_norm),
}
_TRANSPOSED = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys([F.relu, torch.relu, Tensor.relu], _relu),
    **dict.fromkeys([torch.relu_, Tensor.relu_], partial(_relu, inplace=True)),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: partial(_leaky_relu, inplace=True),
    F.avg_pool2d: _avg_pool2d,
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _convolution),
    **dict.fromkeys(_TRANSPOSED, _transposed_convolution),
}


def _is_faster_once(input: Tensor, weight: Tensor, settings: ConvolutionSettings) -> bool:
    """Whether a faster form exists for the convolution or one of its first derivatives."""
    if is_subpixel_faster(weight, settings):
        return settings.is_transposed or _is_differentiated(input)
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    return is_trained and is_im2col_faster(weight, compute_dtype(weight), settings)


def _is_differentiated(input: Tensor) -> bool:
    """Whether its gradient may be needed."""
    return _are_plain(input) and torch.is_grad_enabled() and input.requires_grad


def _are_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary real tensors: no subclass, no torch.func transform."""
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and tensors[0].is_floating_point()
        and not torch._C._are_functorch_transforms_active()
    )


def _per_dimension(size: Sizes, dimensions: int) -> list[int]:
    return [size] * dimensions if isinstance(size, int) else list(size) * (dimensions // len(size))
