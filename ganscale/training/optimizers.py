"""Optimizers by name, their state, and the learning rate as a function of the images seen."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.schema import OptimizerConfig, TrainingConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Adam and SGD are fused: one kernel for all parameters, which can also skip its update on the
    device (see NonFiniteGuard). torch has no fused RMSprop."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name == "adam":
        options |= {"betas": (config.betas[0], config.betas[1]), "eps": config.eps}
        return torch.optim.Adam(parameters, fused=True, **options)
    options["momentum"] = config.momentum
    if config.name == "rmsprop":
        options |= {"alpha": config.alpha, "eps": config.eps}
        return torch.optim.RMSprop(parameters, foreach=True, **options)
    sgd = torch.optim.SGD(parameters, fused=True, **options)
    if config.momentum > 0:
        # Fused SGD would allocate these in its first step, uninitialized if that one is skipped.
        for parameter in sgd.param_groups[0]["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def learning_rate_factor(config: TrainingConfig, images_seen: int) -> float:
    """The factor of both learning rates: linear warm-up, then the schedule to the end."""
    if images_seen < config.warmup_images:
        return images_seen / config.warmup_images
    span = config.total_images - config.warmup_images
    fraction = min(1.0, (images_seen - config.warmup_images) / span) if span > 0 else 1.0
    if config.schedule == "linear":
        return 1 - fraction
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * fraction))
    return 1.0


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
            raise ValueError(f"{key} is not a state of {type(optimizer).__name__}")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
