"""The backward of a loss and of a gradient penalty at the same images, as one.

Let h_n be the input of a layer for the image x_n, g_n the derivative of the critic's logit D(x_n)
with respect to the layer's output, and c_n = d loss / d D(x_n). The gradient of the loss for the
layer's weights is sum_n c_n g_n h_n^T. That of the penalty is sum_n g_n v_n^T, where v_n comes from
its double backward (`double_backward`), and its first backward has found the g_n already. Together
they are

    sum_n g_n (v_n + c_n h_n)^T.

That takes one weight gradient, and the loss needs no backward of its own through the layers. The
convolutions of a critic step with R1 and R2, in units of a forward of its images:

    forward                                          1
    backward to the images: the g_n                  1
    double backward to the logits: the v_n           1
    weight gradients                                 1
    backward of the loss                             2   (without a joint backward)

This is exact where an image's logit depends on that image only, and pays where the layers are
piecewise linear. Elsewhere, as with norm layers, second derivatives flow back through the layers
anyway, and the loss goes along with them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ganscale.objectives.double_backward import FastConvolution, InputGradient, LossFactors

_Node = Any  # of autograd's graph


def join_backward(
    logits: Tensor, gradients: Tensor, images: Tensor, factors: LossFactors
) -> tuple[Tensor, Tensor]:
    """(logits, gradients) as given, with a joint backward if that is exact and saves operations.

    logits: of `images`, each of which only affects its own; from a forward in
        `FastDerivatives(2, factors)`
    gradients: of the sum of the logits with respect to `images`, with a graph
    """
    if factors.is_traced or logits.numel() != factors.batch:
        return logits, gradients
    others = _other_weights(logits, gradients, images, factors)
    if others is None:
        return logits, gradients
    return _Joint.apply(factors, _Hidden(logits), gradients, *others)


class _Hidden(NamedTuple):
    """A tensor that autograd does not see among a function's inputs."""

    tensor: Tensor


class _Joint(Function):
    """Both have their backward through the gradients; `others` are weights that it leaves out."""

    @staticmethod
    def forward(
        ctx: Any, factors: LossFactors, logits: _Hidden, gradients: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.factors, ctx.logits, ctx.others = factors, logits.tensor, others
        ctx.gradients = gradients.detach()
        ctx.set_materialize_grads(False)
        return logits.tensor.detach(), gradients

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, logit_factors: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        of_others: tuple[Tensor | None, ...] = (None,) * len(ctx.others)
        if logit_factors is not None:
            ctx.factors.values = logit_factors.flatten()
            # Autograd has to reach all layers, also without a penalty.
            v = torch.zeros_like(ctx.gradients) if v is None else v
            if ctx.others:
                of_others = torch.autograd.grad(
                    ctx.logits, ctx.others, logit_factors, retain_graph=True
                )
        return None, None, v, *of_others


def _other_weights(
    logits: Tensor, gradients: Tensor, images: Tensor, factors: LossFactors
) -> list[Tensor] | None:
    """The weights between the logits and the topmost convolutions; None if a joint backward would
    be wrong or would save nothing."""

    def is_joint(node: _Node, function: type[Function] = FastConvolution) -> bool:
        return getattr(node, "_forward_cls", None) is function and node.factors is factors

    top = [*_walk([logits.grad_fn], lambda node: [] if is_joint(node) else _next(node))]
    others = [leaf for leaf in _leaves(top) if leaf is not images]
    # The first input of a convolution is its images.
    below = [
        *_walk(filter(is_joint, top), lambda node: _next(node)[: 1 if is_joint(node) else None])
    ]
    if any(leaf is not images for leaf in _leaves(below)):
        return None  # for weights of other layers there, the loss passes through the convolutions
    convolutions = [*filter(is_joint, below)]
    weights = _walk((node for each in convolutions for node in _next(each)[1:]), _next)
    own = {id(leaf) for leaf in _leaves(weights)}
    if any(id(leaf) in own for leaf in others):
        return None  # a weight that is used in both ways would count twice
    second = [*_walk([gradients.grad_fn], _next)]
    if any(map(is_joint, second)):
        return None  # second derivatives pass through the convolutions, too
    if sum(is_joint(node, InputGradient) for node in second) < len(convolutions):
        return None  # the penalty's backward does not come to all of them
    return others if convolutions else None


def _walk(
    nodes: Iterable[_Node], next_nodes: Callable[[_Node], Iterable[_Node]]
) -> Iterator[_Node]:
    """All nodes that these lead to, each once."""
    found, left = set[_Node](), [*nodes]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            yield node
            left.extend(next_nodes(node))


def _next(node: _Node) -> list[_Node]:
    return [each for each, _ in node.next_functions if each is not None]


def _leaves(nodes: Iterable[_Node]) -> Iterator[Tensor]:
    return (node.variable for node in nodes if hasattr(node, "variable"))
