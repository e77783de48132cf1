"""A player of the two-player game: a network, its wrapped step and its optimizer."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ganscale.runtime import Runtime
from ganscale.schema import OptimizerConfig, TrainingConfig
from ganscale.training.optimizers import build_optimizer, rate_factor
from ganscale.training.step import Meters


class Tripwire:
    """Holds back every update from the first non-finite gradient on, without asking the host.

    Gradients are averaged over the ranks before they are looked at, so all ranks trip together.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)  # 0.0 or 1.0: fused optimizers read it

    def watch(self, gradient_norm: Tensor) -> None:
        torch.maximum(
            self.tripped, (~gradient_norm.isfinite()).to(self.tripped.dtype), out=self.tripped
        )

    def is_tripped(self) -> bool:
        """Waits for the device."""
        return bool(self.tripped.item())


class Player:
    """Updates one network from its step's loss, in micro-batches, on all ranks alike."""

    def __init__(
        self,
        name: str,
        step: nn.Module,
        network: nn.Module,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        runtime: Runtime,
        tripwire: Tripwire,
    ) -> None:
        self._name = name
        self._wrapped = runtime.prepare(step)
        self._runtime = runtime
        self._training = training
        self._tripwire = tripwire
        self._learning_rate = optimizer.learning_rate
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, optimizer)
        self.updates_held_back = torch.zeros((), device=runtime.device)
        self._skips_on_device = optimizer.name != "rmsprop"
        if self._skips_on_device:
            self.optimizer.found_inf = tripwire.tripped  # type: ignore[attr-defined]

    def update(
        self, inputs: dict[str, Tensor | None], images_seen: int, with_panel: bool
    ) -> Meters:
        """One optimizer step on `inputs` (each with this rank's batch first); detached meters.

        Micro-batch k of K is every K-th image from the k-th on, so that over all ranks it holds
        the same images for every world size.
        """
        parts = self._training.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        sums: Meters = {}
        for part in range(parts):
            micro = {k: None if v is None else v[part::parts] for k, v in inputs.items()}
            is_last = part == parts - 1
            # Forward and backward both inside: with only one of them there, DDP skips the
            # averaging silently.
            with nullcontext() if is_last else self._runtime.no_sync(self._wrapped):
                loss, meters = self._wrapped(**micro, with_panel=with_panel)
                (loss / parts).backward(inputs=self.parameters)
            sums = meters if not sums else {k: sums[k] + v for k, v in meters.items()}
        meters = sums if parts == 1 else {name: total / parts for name, total in sums.items()}
        meters[f"optim/{self._name}_gradient_norm"] = self._apply(images_seen)
        return meters

    def learning_rate(self, images_seen: int) -> float:
        return self._learning_rate * rate_factor(self._training, images_seen)

    @torch.no_grad()
    def _apply(self, images_seen: int) -> Tensor:
        """The optimizer's step, unless a gradient was not finite; the norm before clipping."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        self._tripwire.watch(norm)
        self.updates_held_back += self._tripwire.tripped
        if self._training.gradient_clip > 0:
            clip_grads_with_norm_(self.parameters, self._training.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(images_seen)
        if self._skips_on_device or not self._tripwire.is_tripped():
            self.optimizer.step()
        return norm


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
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
