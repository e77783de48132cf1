"""A network with its optimizer and its wrapped step."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from ganscale.errors import UserError
from ganscale.metrics.meters import Meter, NormOf, Scaled
from ganscale.metrics.profiling import section, stopwatch
from ganscale.networks.batch_groups import every_nth_group
from ganscale.networks.forward import buffers_restored
from ganscale.objectives.global_batch_loss import LogitGradients, logit_gradients
from ganscale.objectives.losses import Logits
from ganscale.objectives.penalties import constant, twice_differentiable_attention
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule, value_at
from ganscale.schema import OptimizerConfig, TrainingConfig
from ganscale.training.critic_step import CriticStep
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.optimizers import Rate, build_optimizer
from ganscale.training.step_terms import Meters, StepOutput


class NonFiniteGuard:
    """Skips every update from the first non-finite gradient on, without waiting for the device; on
    all ranks at the same update, since gradients are averaged before they are checked."""

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)  # 0.0 or 1.0: fused optimizers read it
        self._one = torch.ones((), device=device)

    def watch(self, gradient_norms: list[Tensor]) -> None:
        # In the norms' own precision, where large ones are finite; multiplies them by 1.
        torch._amp_foreach_non_finite_check_and_unscale_(gradient_norms, self.tripped, self._one)

    def has_tripped(self) -> bool:
        """Waits for the device."""
        return bool(self.tripped.item())


class Update(NamedTuple):
    """What an update returns, for MeterAccumulator.add; all of it detached."""

    meters: Meters
    maxima: Meters
    norms: dict[str, Tensor]  # of each of this rank's images
    logits: Logits  # in the order of the batch


class NetworkUpdater:
    """Updates one network from its step's loss, in micro-batches, on all ranks alike."""

    def __init__(
        self,
        name: str,
        step: CriticStep | GeneratorStep,
        network: nn.Module,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        runtime: Runtime,
        non_finite_guard: NonFiniteGuard,
        group_size: int = 1,
    ) -> None:
        """group_size: consecutive images that stay together in micro-batches, since networks look
        at groups of them
        """
        self.name, self._step, self._network = name, step, network
        self._wrapped = runtime.prepare(step, training.gradient_compression)
        self._runtime, self._training = runtime, training
        self._non_finite_guard = non_finite_guard
        self._group_size = group_size
        self._config = optimizer
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, optimizer, non_finite_guard.tripped)

    def update(
        self, inputs: dict[str, Any], images_seen: int, learning_rate: Rate | None = None
    ) -> Update:
        """One optimizer step on `inputs`, whose tensors have this rank's batch as first dimension;
        by default with the learning rate of `images_seen`.

        Micro-batch k of K is every K-th group of images from the k-th on, so that over all ranks it
        holds the same images for every world size. Without groups, these are single images.
        """
        if learning_rate is None:
            learning_rate = self.learning_rate(images_seen)
        count = self._training.accumulate
        self._runtime.watch_averaging(self._wrapped, stopwatch.is_running)
        for parameter in self.parameters:
            parameter.grad = None
        if count > 1 and self._step.needs_global_batch:
            inputs = {**inputs, "gradients": self._logit_gradients(inputs, count)}
        outputs: list[StepOutput] = []
        has_penalties = bool(inputs.get("points") or inputs.get("mean_lengths"))
        for index in range(count):
            # Forward and backward both inside `no_sync`: with only one of them inside, DDP skips
            # the averaging silently.
            is_last = index == count - 1
            sync = nullcontext() if is_last else self._runtime.no_sync(self._wrapped)
            with sync, twice_differentiable_attention(has_penalties):
                with section(f"{self.name} forward"):
                    micro_batch = _micro_batch(inputs, index, count, self._group_size)
                    output: StepOutput = self._wrapped(**micro_batch, micro_batches=count)
                with section(f"{self.name} backward"):
                    loss = output.loss
                    share = constant(1 / count, loss.shape, loss.dtype, loss.device)
                    loss.backward(share, inputs=self.parameters)
            outputs.append(output)
        if any(parameter.grad is None for parameter in self.parameters):
            self._refuse_idle_parameters()
        meters = _means([output.meters for output in outputs])
        norms = _in_batch_order([output.norms for output in outputs], self._group_size)
        logits = _in_batch_order([output.logits for output in outputs], self._group_size)
        with section(f"{self.name} update"):
            norm = self._apply(learning_rate, images_seen)
        meters[f"optim/{self.name}_gradient_norm"] = norm
        maxima = {f"optim/{self.name}_gradient_norm_max": norm}
        return Update(meters, maxima, norms, logits)

    def averaging_seconds(self) -> float:
        """How long the last timed backward took after its own gradients were ready: averaging over
        the ranks, and waiting for the slowest of them. Waits for the device."""
        return self._runtime.averaging_seconds(self._wrapped)

    def learning_rate(self, images_seen: int) -> float:
        return value_at(self._config.learning_rate, images_seen)

    def scheduled(self, images_seen: int) -> dict[str, float]:
        """The learning rate, and those of Adam's betas that have a schedule, by name."""
        betas = self._config.betas if self._config.name == "adam" else []
        scheduled = {
            f"beta{i}": beta.at(images_seen)
            for i, beta in enumerate(betas, start=1)
            if isinstance(beta, Schedule)
        }
        return {"learning_rate": self.learning_rate(images_seen), **scheduled}

    def _logit_gradients(self, inputs: dict[str, Any], count: int) -> LogitGradients:
        """For a loss of the global batch: from a forward of all micro-batches, without a graph."""
        size = self._group_size
        micro_batches = (_micro_batch(inputs, index, count, size) for index in range(count))
        with torch.no_grad(), buffers_restored(self._step):
            logits = [self._step.logits(**each) for each in micro_batches]
        return logit_gradients(self._step.loss_terms, _in_batch_order(logits, size))

    def _refuse_idle_parameters(self) -> NoReturn:
        """Raises UserError for parameters that the loss does not reach: on one rank they would not
        change, on several DDP would wait for their gradients and fail at the next step."""
        names = {id(p): name for name, p in self._network.named_parameters()}
        idle = [names[id(p)] for p in self.parameters if p.grad is None]
        raise UserError(
            f"the {self.name}'s parameters {', '.join(idle)} get no gradient from its loss: "
            "use them in forward, remove them, or set requires_grad=False"
        )

    @torch.no_grad()
    def _apply(self, learning_rate: Rate, images_seen: int) -> Meter:
        """Clips gradients and takes the optimizer's step, unless a gradient was not finite; returns
        the gradient norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = [*torch._foreach_norm(gradients)]
        self._non_finite_guard.watch(norms)
        if self._training.gradient_clip > 0:
            norm = torch.linalg.vector_norm(torch.stack(norms))
            clip_grads_with_norm_(self.parameters, self._training.gradient_clip, norm)
        self.optimizer.step(learning_rate, images_seen)
        return NormOf(tuple(norms))


def _micro_batch(inputs: dict[str, Any], index: int, count: int, group_size: int) -> dict[str, Any]:
    """Every `count`-th group from group `index` on of all tensors within `inputs`."""
    if count == 1:
        return inputs
    return _rows(inputs, partial(every_nth_group, first=index, n=count, group_size=group_size), {})


def _rows(value: Any, cut: Callable[[Tensor], Tensor], taken: dict[int, Tensor]) -> Any:
    """taken: by id, so that a tensor that is there twice stays one"""
    if isinstance(value, Tensor) and value.ndim > 0:
        if id(value) not in taken:
            taken[id(value)] = cut(value)
        return taken[id(value)]
    if isinstance(value, LogitGradients):
        return LogitGradients(*(_rows(each, cut, taken) for each in value))
    if isinstance(value, dict):
        return {name: _rows(each, cut, taken) for name, each in value.items()}
    return value


def _in_batch_order(outputs: list[dict[str, Tensor]], group_size: int) -> dict[str, Tensor]:
    """The inverse of `_micro_batch` for outputs of all micro-batches."""
    if len(outputs) == 1:
        return outputs[0]
    in_groups = [
        {k: value.unflatten(0, (-1, group_size)) for k, value in output.items()}
        for output in outputs
    ]
    return {
        k: torch.stack([each[k] for each in in_groups], dim=1).flatten(0, 2) for k in in_groups[0]
    }


def _means(outputs: list[Meters]) -> Meters:
    if len(outputs) == 1:
        return outputs[0]
    return {name: _mean([meters[name] for meters in outputs]) for name in outputs[0]}


def _mean(meters: list[Meter]) -> Meter:
    first = meters[0]
    if isinstance(first, Scaled):
        values = [meter.value for meter in meters if isinstance(meter, Scaled)]
        return Scaled(torch.stack(values).mean(), first.factor)
    tensors = [meter for meter in meters if isinstance(meter, Tensor)]
    return torch.stack(tensors).mean() if tensors else first
