"""Second derivatives of a critic without the zeros: what autograd computes, at two thirds the cost.

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

Within `FastDoubleBackward` the functions in `_FAST` have derivatives that mind this. All others,
as normalization and smooth activations, keep autograd's, with their way back through x; the two mix
freely, and derivatives of every order are exact. On a CPU, in float32 and channels last, a penalty
then takes 0.6 of autograd's time with DCGAN's critic and 0.4 with ResNet's; with a norm layer after
each convolution, whose way back through x is no zero, as long as before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Sizes = int | Sequence[int]

aten = torch.ops.aten


class FastDoubleBackward(TorchFunctionMode):
    """A context for a forward that will be differentiated twice; any network's, as it stands."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = None
        if func in _FAST and torch.is_grad_enabled():
            output = _FAST[func](*args, **kwargs)
        return func(*args, **kwargs) if output is None else output


# Each of these takes the arguments of the function it stands for, under their names, and returns
# None for what is autograd's to do.


def _leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor | None:
    if not _is_ours(input) or negative_slope < 0:
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
    if not _is_ours(input):
        return None
    windows = (kernel_size, kernel_size if stride is None else stride, padding)
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
) -> Tensor | None:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _is_ours(*tensors) or isinstance(padding, str) or input.ndim != weight.ndim:
        return None
    input, weight, *rest = map(_as_autocast, tensors)
    places = weight.ndim - 2
    sizes = [_for_each(size, places) for size in (stride, padding, dilation, output_padding)]
    settings = (*sizes[:3], is_transposed, sizes[3], groups)
    return _Convolution.apply(input, weight, rest[0] if rest else None, settings)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor | None:
    return _convolution(
        input, weight, bias, stride, padding, dilation, groups,
        is_transposed=True, output_padding=output_padding,
    )  # fmt: skip


_FAST: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys([F.relu, torch.relu, Tensor.relu], _relu),
    **dict.fromkeys([torch.relu_, Tensor.relu_], partial(_relu, inplace=True)),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: partial(_leaky_relu, inplace=True),
    F.avg_pool2d: _average_pool,
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _convolution),
    **dict.fromkeys(
        [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], _transposed_convolution
    ),
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
        return aten.avg_pool2d_backward(gradient, shape, *ctx.settings), *nothing


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.settings = settings
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return aten.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gradient is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        asked = _asked_for(ctx)
        asked += [False] * (3 - len(asked))
        if asked == [True, False, False]:
            return _InputGradient.apply(gradient, weight, x.detach(), ctx.settings), *[None] * 3
        gradients = aten.convolution_backward(
            gradient, x, weight, ctx.bias_shape, *ctx.settings, asked
        )
        return *gradients, None


class _InputGradient(Function):
    """A convolution's gradient with respect to its input, of which `x` gives but the shape."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, weight: Tensor, x: Tensor, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(gradient, weight)
        ctx.set_materialize_grads(False)
        only_input = [True, False, False]
        return aten.convolution_backward(gradient, x, weight, None, *settings, only_input)[0]

    @staticmethod
    def backward(ctx: Any, direction: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """direction: d loss / d output, of the shape of x"""
        of_gradient = of_weight = None
        if direction is not None:
            gradient, weight = ctx.saved_tensors
            asked = _asked_for(ctx)
            if asked[0]:
                of_gradient = aten.convolution(direction, weight, None, *ctx.settings)
            if asked[1]:
                only_weight = [False, True, False]
                of_weight = aten.convolution_backward(
                    gradient, direction, weight, None, *ctx.settings, only_weight
                )[1]
        return of_gradient, of_weight, None, None


def _is_ours(input: Tensor, *others: Tensor) -> bool:
    """Whether a derivative will be asked for, of tensors that are no more than tensors."""
    return (
        input.requires_grad
        and input.is_floating_point()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (input, *others))
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


def _as_autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the type that autocast, where it is on, lets convolutions have."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _for_each(size: Sizes, places: int) -> list[int]:
    return [size] * places if isinstance(size, int) else list(size) * (places // len(size))
