"""Derivatives of networks, above all second ones, without autograd's detours.

A gradient penalty differentiates g(x) = d D(x) / d x once more, for the weights. The first backward
pass sends a gradient through a layer y = f(x) as f'(x)^T times it. So the second has two ways to
go: back along the first one, and back through x, but the latter only where f'(x) changes with x. In
a map that is linear (convolution, pooling) or linear in pieces (ReLU) it does not. Autograd writes
that as tensors of zeros, which it sends through all convolutions below.

In units of a forward of the critic, its convolutions cost

    the forward                                            1
    the gradient with respect to the images                1
    back along it, towards the logits                      1
    back along it, to the weights                          1
    zeros, back through the forward                        2   in autograd alone

Autograd's fourth line, besides, is a convolution with a whole image for a kernel, which is slow. It
is the weight gradient of a layer A with input v and output gradient g, as <v, A^T g> = <A v, g>.

Within `FastDerivatives(order=2)` the functions in `_FAST` have derivatives that mind this. All
others, as normalization and smooth activations, keep autograd's, with their way back through x; the
two mix freely, and derivatives of every order are exact. On a CPU, in float32 and channels last, a
penalty then takes 0.6 of autograd's time with DCGAN's critic and 0.4 with ResNet's; with a norm
layer after each convolution, whose way back through x is no zero, as long as before.

`FastDerivatives()`, for what is differentiated once or not at all, leaves to autograd all but the
layers that `forms` does faster.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ganscale.networks.resampling import convolve_and_pool, upsample_and_convolve
from ganscale.objectives.fast_convolutions import (
    Settings,
    as_matrix_product,
    convolve,
    gradients,
    has_patches,
    has_phases,
    pooled_kernel,
    unpool,
    upsampled_kernel,
)

Sizes = int | Sequence[int]

aten = torch.ops.aten


class FastDerivatives(TorchFunctionMode):
    """A context for the forward of any network, as it stands."""

    def __init__(self, order: int = 1) -> None:
        """order: how many times it will be differentiated, 1 or 2"""
        super().__init__()
        self._fast = _FAST if order > 1 else _FAST_ONCE

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = None
        if func in self._fast and not _is_traced():
            output = self._fast[func](*args, **kwargs)
        return func(*args, **kwargs) if output is None else output


# Each of these takes the arguments of the function it stands for, under their names, and returns
# None for what is autograd's to do.


def _leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor | None:
    if not _is_differentiated(input) or negative_slope < 0:
        return None
    return _LeakyReLU.apply(input, negative_slope, inplace)


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    return _leaky_relu(input, 0.0, inplace)


def _average_pool(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    if not _is_differentiated(input):
        return None
    windows = [_for_each(size, 2) for size in (kernel_size, stride or kernel_size, padding)]
    return _AveragePool.apply(input, *windows, ceil_mode, count_include_pad, divisor_override)


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
    order: int = 2,
) -> Tensor | None:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _are_plain(*tensors) or isinstance(padding, str) or input.ndim != weight.ndim:
        return None
    places = weight.ndim - 2
    taken, given = weight.shape[1] * groups, weight.shape[0]
    if is_transposed:
        taken, given = given, taken
    if input.shape[1] != taken or (bias is not None and bias.shape != (given,)):
        return None  # torch has the words for that
    settings = Settings(
        _for_each(stride, places),
        _for_each(padding, places),
        _for_each(dilation, places),
        is_transposed,
        _for_each(output_padding, places),
        groups,
    )
    product = as_matrix_product(input, weight, bias, settings)
    if product is not None:
        return product
    gains = _is_differentiated(input) if order > 1 else _gains_once(input, weight, settings)
    if not gains:
        return None
    input, weight, *rest = map(_as_autocast, tensors)
    function = _Convolution.apply if torch.is_grad_enabled() else convolve
    return function(input, weight, rest[0] if rest else None, settings)


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
    order: int = 2,
) -> Tensor | None:
    return _convolution(
        input, weight, bias, stride, padding, dilation, groups,
        is_transposed=True, output_padding=output_padding, order=order,
    )  # fmt: skip


def _convolution_and_pool(
    images: Tensor, weight: Tensor, bias: Tensor | None, *, order: int = 2
) -> Tensor:
    kernel, padding = pooled_kernel(weight), weight.shape[-1] // 2
    output = _convolution(images, kernel, bias, 2, padding, order=order)
    return F.conv2d(images, kernel, bias, 2, padding) if output is None else output


def _upsampling_and_convolution(
    images: Tensor, weight: Tensor, bias: Tensor | None, *, order: int = 2
) -> Tensor:
    kernel, padding = upsampled_kernel(weight), weight.shape[-1] // 2
    output = _transposed_convolution(images, kernel, bias, 2, padding, order=order)
    return F.conv_transpose2d(images, kernel, bias, 2, padding) if output is None else output


_Fast = dict[Callable[..., Any], Callable[..., Tensor | None]]
_CONVOLUTIONS = F.conv1d, F.conv2d, F.conv3d
_TRANSPOSED_CONVOLUTIONS = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d

_FAST: _Fast = {
    **dict.fromkeys([F.relu, torch.relu, Tensor.relu], _relu),
    **dict.fromkeys([torch.relu_, Tensor.relu_], partial(_relu, inplace=True)),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: partial(_leaky_relu, inplace=True),
    F.avg_pool2d: _average_pool,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_TRANSPOSED_CONVOLUTIONS, _transposed_convolution),
    convolve_and_pool: _convolution_and_pool,
    upsample_and_convolve: _upsampling_and_convolution,
}
_FAST_ONCE: _Fast = {
    F.avg_pool2d: _average_pool,
    **dict.fromkeys(_CONVOLUTIONS, partial(_convolution, order=1)),
    **dict.fromkeys(_TRANSPOSED_CONVOLUTIONS, partial(_transposed_convolution, order=1)),
    convolve_and_pool: partial(_convolution_and_pool, order=1),
    upsample_and_convolve: partial(_upsampling_and_convolution, order=1),
}


class _LeakyReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        y = F.leaky_relu(x, slope, inplace) if slope > 0 else F.relu(x, inplace)
        if inplace:
            ctx.mark_dirty(x)
        # Keeps what autograd keeps: the critic may go on to change the other one in place.
        ctx.slope, ctx.keeps_output = slope, inplace or slope == 0
        ctx.save_for_backward(y if ctx.keeps_output else x)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradient is None:
            return None, None, None
        signs = ctx.saved_tensors[0].detach()  # constant next to x: no way back through it
        return aten.leaky_relu_backward(gradient, signs, ctx.slope, ctx.keeps_output), None, None


class _AveragePool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return aten.avg_pool2d(x, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        nothing = [None] * len(ctx.settings)
        if gradient is None:
            return None, *nothing
        shape = ctx.saved_tensors[0].detach()  # its numbers do not matter
        (window, other), strides, paddings, _, _, divisor = ctx.settings
        tiled = [size * window for size in gradient.shape[2:]] == [*shape.shape[-2:]]
        is_plain = other == window and strides == [window, window] and paddings == [0, 0]
        if tiled and is_plain and divisor is None and gradient.ndim == 4:
            return _Unpool.apply(gradient, window), *nothing
        return aten.avg_pool2d_backward(gradient, shape, *ctx.settings), *nothing


class _Unpool(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, window: int) -> Tensor:
        ctx.window = window
        ctx.set_materialize_grads(False)
        return unpool(gradient, window)

    @staticmethod
    def backward(ctx: Any, direction: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None if direction is None else F.avg_pool2d(direction, ctx.window), None


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
    ) -> Tensor:
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.settings = settings
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return convolve(x, weight, bias, settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradient is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        asked = _asked_for(ctx)
        asked += [False] * (3 - len(asked))
        if asked == [True, False, False]:
            return _InputGradient.apply(gradient, weight, x.detach(), ctx.settings), *[None] * 3
        return *gradients(gradient, x, weight, ctx.bias_shape, ctx.settings, asked), None


class _InputGradient(Function):
    """A convolution's gradient with respect to its input, of which `x` gives but the shape."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, weight: Tensor, x: Tensor, settings: Settings
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(gradient, weight)
        ctx.set_materialize_grads(False)
        found = gradients(gradient, x, weight, None, settings, [True, False, False])[0]
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, direction: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """direction: d loss / d output, of the shape of x"""
        of_gradient = of_weight = None
        if direction is not None:
            gradient, weight = ctx.saved_tensors
            asked = _asked_for(ctx)
            if asked[0]:
                of_gradient = convolve(direction, weight, None, ctx.settings)
            if asked[1]:
                only_weight = [False, True, False]
                of_weight = gradients(gradient, direction, weight, None, ctx.settings, only_weight)[
                    1
                ]
        return of_gradient, of_weight, None, None


def _is_traced() -> bool:
    """Whether somebody else looks at what is computed: a network's own torch.compile, which does
    not see who asks for a derivative, or activation checkpointing, which computes it again outside
    and expects the same tensors to be saved."""
    if torch.compiler.is_compiling():
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks is not None


def _gains_once(input: Tensor, weight: Tensor, settings: Settings) -> bool:
    """Whether a convolution or its first derivatives have a faster form."""
    if has_phases(weight, settings):
        return settings.is_transposed or _is_differentiated(input)
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    return is_trained and has_patches(weight, _computed_in(weight), settings)


def _is_differentiated(input: Tensor) -> bool:
    """Whether derivatives with respect to it will be asked for."""
    return _are_plain(input) and torch.is_grad_enabled() and input.requires_grad


def _are_plain(*tensors: Tensor) -> bool:
    """Whether they are no more than tensors of real numbers."""
    return (
        all(type(each) in (Tensor, nn.Parameter) for each in tensors)
        and tensors[0].is_floating_point()
        and not torch._C._are_functorch_transforms_active()
    )


def _asked_for(node: Any) -> list[bool]:
    """For each tensor that `node` took: does the backward pass that is going on need its gradient?

    `needs_input_grad` says which could be needed: the weights' always, if they are trained.
    """
    return [
        successor is not None and _is_executed(successor) for successor, _ in node.next_functions
    ]


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch does not say so of a leaf that `autograd.grad` was asked for
        return True


def _computed_in(tensor: Tensor) -> torch.dtype:
    """The type that autocast, where it is on, lets convolutions have."""
    device = tensor.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not is_autocast or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def _as_autocast(tensor: Tensor) -> Tensor:
    return tensor.to(_computed_in(tensor))


def _for_each(size: Sizes, places: int) -> list[int]:
    return [size] * places if isinstance(size, int) else list(size) * (places // len(size))
