"""Autograd functions whose double backward, as a gradient penalty needs it, computes no zeros.

A gradient penalty differentiates the critic's input gradient d D(x) / d x once more, for the
weights. The backward of a layer y = f(x) multiplies the incoming gradient by f'(x)^T. The double
backward then has two paths: back through this multiplication, and back through x, on which f'(x)
depends. The second is zero where the layer is linear (convolution, pooling) or piecewise linear
(ReLU). Autograd still takes it, and sends zeros through all convolutions below.

A penalty's convolutions cost, in units of one forward of the critic:

    forward                                  1
    backward to the images                   1
    double backward to the logits            1
    double backward to the weights           1
    zeros, back through the forward          2   (autograd only)

Autograd also computes the fourth line as a convolution with a whole image for a kernel, which is
slow. Because <v, A^T g> = <A v, g>, it is just the weight gradient of the layer A for the input v
and the output gradient g. A loss at the same images can have its own weight gradients from the same
operations (`joint_backward`).

On a CPU, in float32 and channels last, a penalty takes 0.6 of autograd's time with DCGAN's critic
and 0.4 with ResNet's. With a norm layer after each convolution, whose second path is not zero, it
takes as long as with autograd. Derivatives of every order are exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ganscale.objectives.fast_convolutions import (
    ConvolutionSettings,
    convolution_gradients,
    convolve,
)
from ganscale.runtime import has_cheap_launches

aten = torch.ops.aten


class FastLeakyReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool, is_relu: bool = False) -> Tensor:
        y = F.relu(x, inplace) if is_relu else F.leaky_relu(x, slope, inplace)
        if inplace:
            ctx.mark_dirty(x)
        # Save what autograd saves: the critic may change the other tensor in place later.
        ctx.slope, ctx.saves_output = slope, inplace or is_relu
        ctx.save_for_backward(y if ctx.saves_output else x)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return None, None, None, None
        signs = ctx.saved_tensors[0].detach()  # piecewise constant: no path back through it
        return aten.leaky_relu_backward(grad, signs, ctx.slope, ctx.saves_output), None, None, None


class FastAvgPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return aten.avg_pool2d(x, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        no_grads = [None] * len(ctx.settings)
        if grad is None:
            return None, *no_grads
        x = ctx.saved_tensors[0].detach()  # only its shape matters
        (window, width), stride, padding, _, _, divisor = ctx.settings
        is_tiling = [size * window for size in grad.shape[2:]] == [*x.shape[-2:]]
        is_plain = width == window and stride == [window, window] and padding == [0, 0]
        is_copied = is_tiling and is_plain and divisor is None and grad.ndim == 4
        if is_copied and has_cheap_launches(grad.device):
            return _Unpool.apply(grad, window), *no_grads
        return aten.avg_pool2d_backward(grad, x, *ctx.settings), *no_grads


class _Unpool(Function):
    """The gradient of an average over adjacent windows: each pixel is spread over its window. On a
    CPU, copying takes half the time of torch's kernel."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, window: int) -> Tensor:
        ctx.window = window
        ctx.set_materialize_grads(False)
        return F.interpolate(grad / window**2, scale_factor=window, mode="nearest")

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None if grad is None else F.avg_pool2d(grad, ctx.window), None


class LossFactors:
    """The derivative of the loss with respect to the logit of each of `batch` images, (batch,), for
    the convolutions of a forward; None before a joint backward."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.values: Tensor | None = None
        self.is_traced = False  # whether layers of the forward could not take part


class FastConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: ConvolutionSettings,
        factors: LossFactors | None = None,
    ) -> Tensor:
        ctx.has_bias, ctx.settings, ctx.factors = bias is not None, settings, factors
        ctx.save_for_backward(x, weight, *([] if bias is None else [bias]))
        ctx.set_materialize_grads(False)
        return convolve(x, weight, bias, settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        no_grads = None, None
        if grad is None:
            return None, None, None, *no_grads
        x, weight, *biases = ctx.saved_tensors
        bias = biases[0] if biases else None
        mask = _output_mask(ctx)
        mask += [False] * (3 - len(mask))
        if mask == [True, False, False]:
            inputs = grad, weight, bias if ctx.factors else None, x.detach()
            return InputGradient.apply(*inputs, ctx.settings, ctx.factors), None, None, *no_grads
        bias_shape = None if bias is None else list(bias.shape)
        return *convolution_gradients(grad, x, weight, bias_shape, ctx.settings, mask), *no_grads


class InputGradient(Function):
    """A convolution's gradient with respect to its input `x`, of which only the shape matters but
    in a joint backward."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        settings: ConvolutionSettings,
        factors: LossFactors | None,
    ) -> Tensor:
        ctx.has_bias, ctx.settings, ctx.factors = bias is not None, settings, factors
        ctx.save_for_backward(grad, weight, *([] if factors is None else [x]))
        ctx.set_materialize_grads(False)
        mask = [True, False, False]
        input_grad = convolution_gradients(grad, x, weight, None, settings, mask)[0]
        assert input_grad is not None
        return input_grad

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """v: of the shape of x, as in the module's docstring"""
        grad_grad = weight_grad = bias_grad = None
        grad, weight, *inputs = ctx.saved_tensors
        needs_grad, needs_weight, *needs_bias = _output_mask(ctx)
        if v is not None and needs_grad:
            grad_grad = convolve(v, weight, None, ctx.settings)
        if ctx.factors is not None and ctx.factors.values is not None:
            (x,), factors = inputs, ctx.factors.values.to(grad.dtype)
            per_image = factors.view(-1, *[1] * (x.ndim - 1))
            if needs_weight:
                v = x * per_image if v is None else torch.addcmul(v, x, per_image)
            if ctx.has_bias and needs_bias[0]:
                bias_grad = torch.mv(grad.flatten(2).sum(2).t(), factors)
        if v is not None and needs_weight:
            mask = [False, True, False]
            weight_grad = convolution_gradients(grad, v, weight, None, ctx.settings, mask)[1]
        return grad_grad, weight_grad, bias_grad, None, None, None


def _output_mask(node: Any) -> list[bool]:
    """For each tensor input of `node`, whether the current backward pass needs its gradient.

    `needs_input_grad` only says whether some pass could: for trained weights it is always true.
    """
    return [next is not None and _is_executed(next) for next, _ in node.next_functions]


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch cannot answer this for a leaf passed to `autograd.grad`
        return True
