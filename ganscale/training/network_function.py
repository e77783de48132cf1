"""Whether what a network computes for an image depends on anything but that image, or its group.

Looked at in float64, for very different images, and with weights moved away from their initial
values, which may hide a layer behind a zero:

- A forward changes nothing, and draws nothing but through `ganscale.random`: repeated, it gives the
  same output, also on another rank of another world.
- The derivative of one image's output with respect to another image is exactly zero.
- An image's output and derivatives are the same with other images around it, at another place in
  the batch, in a larger batch, and alone.
- The gradient of the weights for a batch is the sum of those for its parts.
- The gradient of a penalty is the one that finite differences give, and goes together with that of
  a loss.

A network may declare that it looks at groups of consecutive images (`networks.batch_groups`). Then
all of this is asked of groups in place of images, with as many groups and as many backwards.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from unittest import mock

import torch
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.networks.batch_groups import MinibatchStdDev, batch_group_size
from ganscale.networks.forward import LowestPrecision, default_dtype, run_network
from ganscale.objectives.double_backward import LossFactors
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.joint_backward import join_backward
from ganscale.objectives.penalties import gradients_of_scores, twice_differentiable_attention
from ganscale.random import drawing
from ganscale.runtime import autocast
from ganscale.training.hidden_state import HiddenState, seeded

GROUPS = 4  # in the batch of a trial; without groups, these are single images
_LARGER_BATCHES, _LARGER_PIXELS = (8, 32), 32 * 128 * 128
_MOVES = (0.3, 0.3, 0.3, 1.0, 1.0, 0.0)  # of the weights; the next if an output is constant
# Of outputs, relative to the largest, by the lowest precision of anything in the forward.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
_DERIVATIVES = {torch.float64: 1e3}  # times more; if they are wrong, it is by their size
# Of weights, relative to their size: a smaller one meets fewer kinks, such as those of ReLUs, at
# which the penalty jumps. One without a kink is enough.
_DIFFERENCE_STEPS, _DIFFERENCE_TOLERANCE = (1e-6, 1e-7, 1e-8, 1e-8), 1e-3

_NO_DRAWS = (
    "which would differ between ranks, micro-batches and restarts: use ganscale.random.normal_like,"
    " uniform_like or bernoulli_like, or ganscale.networks.random_layers.Dropout or NoiseInjection"
)
_NO_CHANGES = (
    "which ranks, micro-batches and penalties would each change differently: use torch.nn.utils."
    "parametrizations.spectral_norm for spectral norms, track_running_stats=False for instance "
    "norms, torch.nn.BatchNorm in the generator for running statistics"
)


@dataclass(frozen=True)
class Subject:
    """One network and its inputs of the trial: `GROUPS` times its group.

    order: how often a step differentiates it
    slots: of its inputs, for what it draws
    lowest: the lowest precision of anything in its forward
    """

    name: str
    network: nn.Module
    inputs: Tensor
    labels: Tensor | None
    precision: str
    order: int
    slots: Tensor
    lowest: torch.dtype = torch.float32

    def run(self) -> Tensor:
        draws = drawing(0, ("trial",), self.slots)
        with draws, autocast(self.inputs.device, self.precision):
            return run_network(self.network, self.inputs, self.labels)

    @cached_property
    def group_size(self) -> int:
        return batch_group_size(self.network)

    def run_fast(self) -> Tensor:
        """The outputs as a step computes them, as (groups, elements)."""
        with FastDerivatives(self.order):
            return self.run().reshape(len(self.inputs) // self.group_size, -1)

    def rows(self, groups: Sequence[int]) -> "Subject":
        """With some groups of its inputs, in that order."""
        size = self.group_size
        rows = [row for group in groups for row in range(size * group, size * (group + 1))]
        labels = None if self.labels is None else self.labels[rows]
        inputs = torch.cat([self.inputs[row : row + 1] for row in rows])  # keeps channels last
        return replace(self, inputs=inputs, labels=labels, slots=self.slots[rows])

    def in_float64(self) -> "Subject":
        """Itself in float64, if it runs in that precision."""
        wide = replace(self, inputs=self.inputs.double(), precision="float64")
        wide.network.double()
        try:
            with default_dtype(torch.float64):
                _derivatives(wide)
        except Exception:  # its code has a float32 in it
            self.network.to(self.inputs.dtype)
            wide = self
        with torch.no_grad(), default_dtype(wide.inputs.dtype), LowestPrecision() as lowest:
            wide.run()
        return replace(wide, lowest=lowest.dtype)


def check_function(subject: Subject) -> None:
    """Refuses a network whose outputs depend on more than their own inputs."""
    weights = {name: p.detach().clone() for name, p in subject.network.named_parameters()}
    outputs = derivatives = own = torch.empty(0)
    for move in _MOVES:
        _move_weights(subject.network, weights, move)
        before = HiddenState(subject.network)
        outputs, derivatives = _derivatives(subject)
        refuse_change(subject, before.change())
        own = derivatives[range(GROUPS), range(GROUPS)]
        is_finite = outputs.isfinite().all() and derivatives.isfinite().all()
        if is_finite and own.flatten(2).any(2).all():
            break
    if not outputs.isfinite().all():
        raise UserError(f"{subject.name} returns NaN or infinity for ordinary inputs")
    if not derivatives.isfinite().all():
        raise UserError(
            f"the derivative of {subject.name} with respect to its inputs is NaN or infinite for "
            "ordinary inputs: look for a root, a norm or a division of what can be zero"
        )
    if subject.order > 1 and not own.any():
        raise UserError(
            f"the output of {subject.name} has no derivative with respect to its images: look for "
            "detach, no_grad or rounding in its forward"
        )
    _check_repeatable(subject)
    others = derivatives.clone()
    others[range(GROUPS), range(GROUPS)] = 0
    if others.any():
        raise UserError(_mixing(subject))
    _check_companions(subject, outputs, own)
    _check_weight_gradients(subject)


@torch.no_grad()
def _check_repeatable(subject: Subject) -> None:
    """Refuses random draws, and whatever a forward leaves behind for the next."""
    outputs = []
    for seed in (0, 0, 1, 2):  # alike, then differently
        with seeded(seed, "trial of draws"), _elsewhere() if seed == 2 else nullcontext():
            before = HiddenState(subject.network)
            outputs.append(subject.run())
            refuse_change(subject, before.change())
        subject.rows([3, 3, 1, 0]).run()
    if not all(is_close(subject, outputs[0], output) for output in outputs[1:]):
        raise UserError(
            f"{subject.name} does not always return the same for the same input: its forward "
            f"remembers something, reads the rank or world size, or draws random numbers, "
            f"{_NO_DRAWS}"
        )


def _check_companions(subject: Subject, outputs: Tensor, own: Tensor) -> None:
    """outputs, own: each group's outputs and derivative in the batch of the trial"""
    alone, alone_derivatives = _derivatives(subject.rows([2]))
    together = _derivatives(subject, together=True)[1][0]
    size = subject.group_size
    pixels = max(size * subject.inputs[0].numel(), outputs.shape[1])
    kept, changed = subject.inputs[2 * size : 3 * size], 1 - 2 * subject.inputs[: 3 * size]
    others = replace(subject, inputs=torch.cat([kept, changed]))
    with torch.no_grad():
        comparisons = [
            (alone, outputs[2:3]),
            (subject.rows([3, 1, 0]).run_fast(), outputs[[3, 1, 0]]),
            (others.rows([3, 0, 1]).run_fast()[1:2], others.rows([0]).run_fast()),
        ]
        for groups in _LARGER_BATCHES:
            if groups == min(_LARGER_BATCHES) or groups * pixels <= _LARGER_PIXELS:
                rows = torch.randint(GROUPS, (groups,)).tolist()
                comparisons.append((subject.rows(rows).run_fast(), outputs[rows]))
    # Derivatives may be nothing but rounding, if a mean follows on a norm, say.
    scale = max(float(own.abs().max()), 1e-6 * float(outputs.abs().max()))
    scale *= _DERIVATIVES.get(subject.lowest, 10.0)
    derivatives = (alone_derivatives[0], own[2:3]), (together, own)
    if not all(is_close(subject, *pair, scale) for pair in derivatives) or not all(
        is_close(subject, *pair) for pair in comparisons
    ):
        raise UserError(_mixing(subject))


def _check_weight_gradients(subject: Subject) -> None:
    """Refuses backwards, such as hooks, that are not sums over images."""
    parameters = [p for p in subject.network.parameters() if p.requires_grad]
    if not parameters:
        return
    whole, first, second = (
        torch.autograd.grad(
            _scores(part.run_fast()).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        for part in (subject, subject.rows([0, 1]), subject.rows([2, 3]))
    )
    largest = max(float(gradient.abs().max()) for gradient in (*whole, *first, *second))
    scale = largest * _DERIVATIVES.get(subject.lowest, 10.0)
    for a, b, both in zip(first, second, whole, strict=True):
        if not is_close(subject, a + b, both, scale):
            raise UserError(
                f"the gradient of {subject.name}'s weights for a batch is not the sum of those for "
                "its parts (look for hooks): it would differ between ranks and micro-batches"
            )


def check_second_derivatives(subject: Subject) -> None:
    """Refuses a critic whose gradient penalty has another gradient than by finite differences:
    where a backward cannot be differentiated, autograd takes it for a constant."""
    if subject.lowest != torch.float64:  # differences would be rounding
        return
    with twice_differentiable_attention(True):
        parameters = [p for p in subject.network.parameters() if p.requires_grad]
        squares, outputs = _squared_derivatives(subject)
        size = max(float(outputs.abs().max()), 1e-6)
        if squares.item() ** 0.5 < 1e-6 * size:  # rounding, or nearly nothing
            return
        exact = torch.autograd.grad(squares, parameters, allow_unused=True, materialize_grads=True)
        if not all(gradient.isfinite().all() for gradient in exact):  # at these images
            return
        if not any(_is_as_by_differences(subject, exact, step) for step in _DIFFERENCE_STEPS):
            raise UserError(
                f"the gradient penalty of {subject.name} would have a wrong gradient: something in "
                "its forward has no second derivative, but does not say so (a torch.autograd."
                "Function whose backward is once_differentiable, uses NumPy or has no graph)"
            )


def check_joint_backward(subject: Subject) -> None:
    """Refuses a critic that would have another gradient for a loss and a penalty that share their
    backward (`objectives.joint_backward`) than for the two by themselves."""
    if subject.group_size > 1:
        return
    with twice_differentiable_attention(True):
        joint = _gradients_of_loss_and_penalty(subject, is_joint=True)
        separate = _gradients_of_loss_and_penalty(subject, is_joint=False)
    scale = max(float(gradient.abs().max()) for gradient in separate)
    scale *= _DERIVATIVES.get(subject.lowest, 10.0)
    if not all(is_close(subject, a, b, scale) for a, b in zip(joint, separate, strict=True)):
        raise UserError(
            f"a loss and a penalty at the same images would give {subject.name} other gradients "
            "than the two by themselves: look for hooks that change gradients, and for layers that "
            "change the order of the images of a batch"
        )


def _gradients_of_loss_and_penalty(subject: Subject, *, is_joint: bool) -> Sequence[Tensor]:
    """For the critic's weights; is_joint: in a joint backward, where there can be one."""
    images = subject.inputs.detach().clone().requires_grad_()
    factors = LossFactors(len(images))
    with FastDerivatives(2, factors):
        logits = replace(subject, inputs=images).run()
    slopes = gradients_of_scores(logits, images, "sum")
    if is_joint:
        logits, slopes = join_backward(logits, slopes, images, factors)
    total = _scores(logits.reshape(1, -1)).sum() + slopes.square().sum()
    parameters = [p for p in subject.network.parameters() if p.requires_grad]
    return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


def _is_as_by_differences(subject: Subject, exact: Sequence[Tensor], step: float) -> bool:
    """In a random direction."""
    parameters = [p for p in subject.network.parameters() if p.requires_grad]
    directions = [p.detach().norm() / p.numel() ** 0.5 * torch.randn_like(p) for p in parameters]
    expected = sum(float((g * d).sum()) for g, d in zip(exact, directions, strict=True))
    values = []
    for distance in (step, -2 * step, step):  # there, to the other side, and back
        torch._foreach_add_([p.data for p in parameters], directions, alpha=distance)
        values.append(_squared_derivatives(subject)[0].item())
    found = (values[0] - values[1]) / (2 * step)
    scale = max(abs(expected), abs(found), 1e-4 * abs(values[2]))
    return abs(found - expected) <= _DIFFERENCE_TOLERANCE * scale


def _squared_derivatives(subject: Subject) -> tuple[Tensor, Tensor]:
    """(the sum of squares of each score's derivative with respect to its own input, outputs)"""
    inputs = subject.inputs.detach().clone().requires_grad_()
    outputs = replace(subject, inputs=inputs).run_fast()
    (derivatives,) = torch.autograd.grad(_scores(outputs).sum(), inputs, create_graph=True)
    return derivatives.square().sum(), outputs.detach()


def _mixing(subject: Subject) -> str:
    if (size := subject.group_size) > 1:
        return (
            f"what {subject.name} computes for an image depends on more than its group, which is a "
            f"run of {size} consecutive images of the batch (its `batch_group_size`), or on the "
            "size of the batch, which differs between ranks: compute statistics within such runs, "
            f"as {MinibatchStdDev.__module__}:MinibatchStdDev does, not over images that are far "
            "apart"
        )
    if subject.order == 1:
        return (
            f"an image of {subject.name} depends on the other latents of its batch or on the size "
            "of the batch, which differ between ranks: of all layers that mix a batch, only batch "
            "norms made of torch.nn.BatchNorm are possible"
        )
    return (
        f"the logit that {subject.name} gives to an image depends on the other images of its batch "
        "(minibatch deviation or discrimination, batch norm) or on the size of the batch, which "
        f"differ between ranks: use {MinibatchStdDev.__module__}:MinibatchStdDev, or a layer that "
        "looks at runs of consecutive images only and declares their number as its "
        "`batch_group_size`"
    )


def _derivatives(subject: Subject, *, together: bool = False) -> tuple[Tensor, Tensor]:
    """(outputs (groups, elements), derivatives (groups, groups, group size, *input)): of each
    group's score, with respect to each input.

    together: of the sum of all scores instead; derivatives are then (1, groups, group size, *input)
    """
    inputs = subject.inputs.detach().clone().requires_grad_()
    outputs = replace(subject, inputs=inputs).run_fast()
    scores = _scores(outputs)
    scores = scores.sum()[None] if together else scores
    size = subject.group_size
    if not scores.requires_grad:
        derivatives = inputs.new_zeros(len(scores), *inputs.shape)
        return outputs, derivatives.unflatten(1, (-1, size))
    rows = [
        torch.autograd.grad(score, inputs, retain_graph=True, materialize_grads=True)[0]
        for score in scores
    ]
    return outputs.detach(), torch.stack(rows).unflatten(1, (-1, size))


def _scores(outputs: Tensor) -> Tensor:
    """A random combination of the elements of each group's outputs."""
    with seeded(0, "combination"):
        return outputs @ torch.randn(outputs.shape[1]).to(outputs)


@torch.no_grad()
def _move_weights(network: nn.Module, weights: dict[str, Tensor], share: float) -> None:
    """To `weights` plus noise: a `share` of their size, or of a usual one where they are zero."""
    for name, parameter in network.named_parameters():
        value = weights[name]
        size = value.abs().square().mean().sqrt()
        usual = value[0].numel() ** -0.5 if value.ndim > 1 and len(value) else 1.0
        scale = share * torch.where(size > 0, size, usual)
        parameter.copy_(value + scale * torch.randn_like(value))


def refuse_change(subject: Subject, change: str | None) -> None:
    if change is not None:
        reason = _NO_DRAWS if change.startswith("draws") else _NO_CHANGES
        raise UserError(f"{subject.name} {change}, {reason}")


def is_close(subject: Subject, first: Tensor, second: Tensor, scale: float | None = None) -> bool:
    scale = float(second.abs().max()) if scale is None else scale
    return bool((first - second).abs().max() <= _TOLERANCES[subject.lowest] * scale)


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Pretends to be rank 3 of 7. Nothing within may communicate."""
    environment = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "7"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch.distributed, "is_initialized", return_value=True),
        mock.patch.object(torch.distributed, "get_rank", return_value=3),
        mock.patch.object(torch.distributed, "get_world_size", return_value=7),
    ):
        yield
