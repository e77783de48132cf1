"""A updater of the two-updater game: a network, its wrapped step and its optimizer."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ganscale.errors import UserError
from ganscale.metrics.profiling import section, stopwatch
from ganscale.runtime import Runtime
from ganscale.schema import OptimizerConfig, TrainingConfig
from ganscale.training.optimizers import build_optimizer, learning_rate_factor
from ganscale.training.steps import (
    CriticStep,
    GeneratorStep,
    LogitGradients,
    Meters,
    StepOutput,
)


class NonFiniteGuard:
    """Holds back every update from the first non-finite gradient on, without asking the host.

    Gradients are averaged over the ranks before they are looked at, so all ranks trip together.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)  # 0.0 or 1.0: fused optimizers read it

    def watch(self, gradient_norm: Tensor) -> None:
        torch.maximum(
            self.tripped, (~gradient_norm.isfinite()).to(self.tripped.dtype), out=self.tripped
        )

    def has_tripped(self) -> bool:
        """Waits for the device."""
        return bool(self.tripped.item())


def micro_batch(inputs: dict[str, Any], part: int, parts: int) -> dict[str, Any]:
    """Every `parts`-th row from row `part` on of all tensors within `inputs`; the rest as it is."""

    def rows(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[part::parts]
        if isinstance(value, LogitGradients):
            return LogitGradients(*map(rows, value))
        if isinstance(value, dict):
            return {name: rows(each) for name, each in value.items()}
        return value

    return inputs if parts == 1 else {name: rows(value) for name, value in inputs.items()}


def _in_batch_order(logits: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `micro_batch` for the logits of all parts."""
    if len(logits) == 1:
        return logits[0]
    return {name: torch.stack([o[name] for o in logits], dim=1).flatten(0, 1) for name in logits[0]}


def _over_parts(parts: list[Meters], reduce: Callable[[Tensor], Tensor]) -> Meters:
    return {name: reduce(torch.stack([part[name] for part in parts])) for name in parts[0]}


class Update(NamedTuple):
    """What is seen of an optimizer step on this rank: means and maxima over its images, detached,
    and its logits in the order of its batch."""

    meters: Meters
    maxima: Meters
    logits: dict[str, Tensor]


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
    ) -> None:
        self.name = name
        self._step = step
        self._network = network
        self._is_checked = False
        self._wrapped = runtime.prepare(step, training.gradient_compression)
        self._runtime = runtime
        self._training = training
        self._tripwire = non_finite_guard
        self._learning_rate = optimizer.learning_rate
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, optimizer)
        self.skipped_updates = torch.zeros((), device=runtime.device)
        self._skips_on_device = optimizer.name != "rmsprop"
        if self._skips_on_device:
            self.optimizer.found_inf = non_finite_guard.tripped  # type: ignore[attr-defined]

    def update(self, inputs: dict[str, Any], images_seen: int) -> Update:
        """One optimizer step on `inputs`, whose tensors have this rank's batch first.

        Micro-batch k of K is every K-th image from the k-th on, so that over all ranks it holds
        the same images for every world size.
        """
        parts = self._training.accumulate
        self._runtime.watch_averaging(self._wrapped, stopwatch.is_running)
        self.optimizer.zero_grad(set_to_none=True)
        if parts > 1 and self._step.needs_global_batch:
            inputs = {**inputs, "gradients": self._logit_gradients(inputs, parts)}
        outputs: list[StepOutput] = []
        for part in range(parts):
            is_last = part == parts - 1
            # Forward and backward both inside: with only one of them there, DDP skips the
            # averaging silently.
            with nullcontext() if is_last else self._runtime.no_sync(self._wrapped):
                with section(f"{self.name} forward"):
                    given = micro_batch(inputs, part, parts)
                    output: StepOutput = self._wrapped(**given, parts=parts)
                with section(f"{self.name} backward"):
                    (output.loss / parts).backward(inputs=self.parameters)
            outputs.append(output)
        if not self._is_checked:
            self._check_gradients()
        meters, maxima = outputs[0].meters, outputs[0].maxima
        if parts > 1:
            meters = _over_parts([output.meters for output in outputs], Tensor.mean)
            maxima = _over_parts([output.maxima for output in outputs], Tensor.amax)
        with section(f"{self.name} update"):
            norm = self._apply(images_seen)
        meters[f"optim/{self.name}_gradient_norm"] = norm
        maxima[f"optim/{self.name}_gradient_norm_max"] = norm
        return Update(meters, maxima, _in_batch_order([output.logits for output in outputs]))

    def _logit_gradients(self, inputs: dict[str, Any], parts: int) -> LogitGradients:
        """What a loss that spans the batch has to know before its first micro-batch: a forward
        without graph, whose traces in buffers (running means) are undone."""
        buffers = list(self._step.buffers())
        before = [buffer.clone() for buffer in buffers]
        with torch.no_grad():
            logits = [self._step.logits(**micro_batch(inputs, k, parts)) for k in range(parts)]
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return self._step.logit_gradients(_in_batch_order(logits))

    def seconds_of_averaging(self) -> float:
        """Of the last timed update: what its backward took after its own gradients were there,
        for the averaging over the ranks and for the slowest of them. Waits for the device."""
        return self._runtime.seconds_of_averaging(self._wrapped)

    def learning_rate(self, images_seen: int) -> float:
        return self._learning_rate * learning_rate_factor(self._training, images_seen)

    def _check_gradients(self) -> None:
        """Raises UserError for a parameter that the loss does not reach: on one rank it would idle,
        on several DDP would wait for its gradient and fail at the next step."""
        names = {id(p): name for name, p in self._network.named_parameters()}
        idle = [names[id(p)] for p in self.parameters if p.grad is None]
        if idle:
            raise UserError(
                f"the {self.name}'s parameters {', '.join(idle)} get no gradient from its loss: "
                "use them in forward, remove them, or set requires_grad=False"
            )
        self._is_checked = True

    @torch.no_grad()
    def _apply(self, images_seen: int) -> Tensor:
        """The optimizer's step, unless a gradient was not finite; the norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        self._tripwire.watch(norm)
        self.skipped_updates += self._tripwire.tripped
        if self._training.gradient_clip > 0:
            clip_grads_with_norm_(self.parameters, self._training.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(images_seen)
        if self._skips_on_device or not self._tripwire.has_tripped():
            self.optimizer.step()
        return norm


_STATE_NAMES = {
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.RMSprop: {"step", "square_avg", "momentum_buffer"},
    torch.optim.SGD: {"momentum_buffer"},
}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and step counts as `<parameter index>.<name>`."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{k}": torch.as_tensor(v) for index, s in state.items() for k, v in s.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse; the optimizer keeps its own hyper-parameters.

    Moments take their parameter's strides: fused optimizers walk both through memory side by side,
    and a channels-last parameter beside contiguous moments is updated wrongly without a word.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = _STATE_NAMES[type(optimizer)]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        if key not in expected:
            raise ValueError(f"{key} is no state of {type(optimizer).__name__}")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
