"""Optimizers by name."""

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ganscale.schedules import value_at
from ganscale.schema import OptimizerConfig

Rate = float | Tensor
"""A number, or a float32 scalar on the device, where it may change between replays of a graph."""


class Optimizer(ABC):
    """An update of all parameters by torch's fused kernels.

    These are the kernels and formulas of torch.optim without its Python and its count of steps for
    each parameter. On a GPU, those would take as long as a small network. Whether an update is
    skipped is known to the device only (see NonFiniteGuard).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        skip: Tensor | None,
        moments: Sequence[str],
    ) -> None:
        """skip: scalar float32; while it is 1, no step changes anything
        moments: names of the tensors that are kept for each parameter, in its shape and strides
        """
        self.parameters, self.config = [*parameters], config
        self._device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._skip = torch.zeros((), device=self._device) if skip is None else skip
        self.skipped_steps = torch.zeros((), device=self._device)
        self._counts, self._increments = [self.skipped_steps], [self._skip]
        # Fused kernels walk through a parameter and its moments side by side.
        self._moments = {
            name: [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
            for name in moments
        }

    @torch.no_grad()
    def step(self, learning_rate: Rate, images_seen: int = 0) -> None:
        """Every parameter must have a gradient, which may be changed.

        learning_rate: rounded to float32 for float32 parameters, as a CUDA graph reads it, so that
            graphs do not change a bit
        images_seen: for numbers that have a schedule, beside the learning rate
        """
        torch._foreach_add_(self._counts, self._increments)
        if isinstance(learning_rate, float) and self.parameters[0].dtype == torch.float32:
            learning_rate = ctypes.c_float(learning_rate).value
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._update(gradients, learning_rate, images_seen)

    @abstractmethod
    def _update(self, gradients: list[Tensor], learning_rate: Rate, images_seen: int) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """The moments as `<parameter index>.<name>`."""
        return {
            f"{index}.{name}": tensor
            for name, tensors in self._moments.items()
            for index, tensor in enumerate(tensors)
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse; moments that are missing stay as they are.

        Raises ValueError for those of other parameters or of another kind of optimizer.
        """
        own = self.tensors()
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"{name} is not a state of {self.config.name} for these networks")
            own[name].copy_(tensor)

    def _adam(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        averages: Sequence[Tensor],
        squares: Sequence[Tensor],
        steps: Tensor,
        learning_rate: Rate,
        betas: Sequence[float],
        weight_decay: float,
    ) -> None:
        torch._fused_adam_(
            [*parameters],
            [*gradients],
            [*averages],
            [*squares],
            [],
            [steps] * len(parameters),
            lr=learning_rate,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            found_inf=self._skip,
        )

    def _sgd(
        self,
        gradients: Sequence[Tensor],
        buffers: Sequence[Tensor],
        learning_rate: Rate,
        weight_decay: float,
    ) -> None:
        torch._fused_sgd_(
            [*self.parameters],
            [*gradients],
            [*buffers],
            weight_decay=weight_decay,
            momentum=self.config.momentum,
            lr=learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # a buffer of zeros comes to the same, and may be skipped
            found_inf=self._skip,
        )


class Adam(Optimizer):
    """Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1.

    A beta with a schedule takes the place of the constant in every formula of a step, the bias
    correction 1 - beta^steps included. So does torch.optim.Adam when the `betas` of a group are
    set, which is how R3GAN's code (arXiv:2501.05441) moves beta2.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        skip: Tensor | None = None,
    ) -> None:
        super().__init__(parameters, config, skip, ("exp_avg", "exp_avg_sq"))
        self._steps = torch.zeros((), device=self._device)  # skipped ones included
        self._counts.append(self._steps)
        self._increments.append(torch.ones((), device=self._device))

    def _update(self, gradients: list[Tensor], learning_rate: Rate, images_seen: int) -> None:
        betas = [value_at(beta, images_seen) for beta in self.config.betas]
        weight_decay = self.config.weight_decay
        averages, squares = self._moments["exp_avg"], self._moments["exp_avg_sq"]
        self._adam(
            self.parameters, gradients, averages, squares, self._steps,
            learning_rate, betas, weight_decay,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"step": self._steps - self.skipped_steps}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        # Older versions stored a count for each parameter.
        steps = [tensor for name, tensor in tensors.items() if name.split(".")[-1] == "step"]
        if steps:
            self._steps.copy_(steps[0] + self.skipped_steps)
        moments = {k: tensor for k, tensor in tensors.items() if k.split(".")[-1] != "step"}
        super().load_tensors(moments)


class SGD(Optimizer):
    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        skip: Tensor | None = None,
    ) -> None:
        super().__init__(parameters, config, skip, _momentum(config))

    def _update(self, gradients: list[Tensor], learning_rate: Rate, images_seen: int) -> None:
        buffers = self._moments.get("momentum_buffer", [])
        self._sgd(gradients, buffers, learning_rate, self.config.weight_decay)


class RMSprop(Optimizer):
    """torch has no fused RMSprop, but with a first beta of 0 and no bias correction, Adam is one.

    Momentum is SGD's, in the direction of such a step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        skip: Tensor | None = None,
    ) -> None:
        super().__init__(parameters, config, skip, ("square_avg", *_momentum(config)))
        # After infinitely many steps, the bias correction is 1.
        self._infinite_steps = torch.full((), math.inf, device=self._device)

    def _update(self, gradients: list[Tensor], learning_rate: Rate, images_seen: int) -> None:
        weight_decay, betas = self.config.weight_decay, (0.0, self.config.alpha)
        averages, squares = gradients, self._moments["square_avg"]  # an average of one gradient
        if self.config.momentum == 0:
            self._adam(
                self.parameters, gradients, averages, squares, self._infinite_steps,
                learning_rate, betas, weight_decay,
            )  # fmt: skip
            return
        if weight_decay > 0:
            torch._foreach_add_(gradients, [*self.parameters], alpha=weight_decay)
        directions = [torch.zeros_like(p) for p in self.parameters]
        self._adam(directions, gradients, averages, squares, self._infinite_steps, -1.0, betas, 0.0)
        self._sgd(directions, self._moments["momentum_buffer"], learning_rate, 0.0)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        # Older versions counted steps.
        super().load_tensors({k: t for k, t in tensors.items() if not k.endswith(".step")})


def _momentum(config: OptimizerConfig) -> tuple[str, ...]:
    return ("momentum_buffer",) if config.momentum > 0 else ()


_OPTIMIZERS: dict[str, type[Adam | SGD | RMSprop]] = {"adam": Adam, "sgd": SGD, "rmsprop": RMSprop}


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, skip: Tensor | None = None
) -> Optimizer:
    return _OPTIMIZERS[config.name](parameters, config, skip)
