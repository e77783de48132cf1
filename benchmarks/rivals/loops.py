"""Loops in plain PyTorch and in Accelerate.

All draw their noise with `torch.randn` and `torch.rand`, and use the config's optimizers, fused as
in ganscale.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from benchmarks.rivals.formulas import LOSSES, clip, path_length, penalty, penalty_of
from ganscale.schedules import value_at
from ganscale.schema import Config, OptimizerConfig


@dataclass
class Task:
    """What a contestant trains: its own networks, always on the same real batch."""

    config: Config
    generator: nn.Module
    critic: nn.Module
    images: Tensor  # (batch, channels, height, width) in [-1, 1]

    @property
    def is_bfloat16(self) -> bool:
        return self.config.training.precision == "bfloat16"

    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """(the critic's, the generator's)."""
        settings = self.config.optimizer
        return (
            optimizer_of(self.critic, settings.critic),
            optimizer_of(self.generator, settings.generator),
        )

    def latents(self) -> Tensor:
        latent_dim = self.config.generator.latent_dim
        return torch.randn(len(self.images), latent_dim, device=self.images.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.is_bfloat16)


def optimizer_of(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fastest form of it."""
    rate = value_at(config.learning_rate, 0)
    options: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
    if config.name == "adam":
        beta1, beta2 = (value_at(beta, 0) for beta in config.betas)
        options |= {"betas": (beta1, beta2), "eps": config.eps}
        return torch.optim.Adam(network.parameters(), fused=True, **options)
    options["momentum"] = config.momentum
    if config.name == "sgd":
        return torch.optim.SGD(network.parameters(), fused=True, **options)
    options |= {"alpha": config.alpha, "eps": config.eps}
    return torch.optim.RMSprop(network.parameters(), foreach=True, **options)


class PlainLoop:
    """Well written: fakes without a graph; a forward each for real and fake, and for a penalty that
    is taken at other images than those; one backward; the generator step computes only the
    generator's gradients."""

    name = "plain loop"
    reuses_fakes = False  # whether the generator step uses the critic step's fakes
    shares_forwards = True  # whether R1 and R2 are taken from the loss's forwards

    def __init__(self, task: Task, *, penalty_in_float32: bool = False) -> None:
        self.task = task
        self.objective = task.config.objective
        self.loss = LOSSES[self.objective.loss.name]
        self.generator, self.critic = task.generator, task.critic
        self.optimizers: tuple[Any, Any] = task.optimizers()
        self._penalty_in_float32 = penalty_in_float32
        self._critic_steps = self._generator_steps = 0
        self._mean_length = torch.zeros((), device=task.images.device)
        self._clipped = [
            parameter
            for parameter in task.critic.parameters()
            if self.objective.clip is not None
            and (self.objective.clip.scope == "all" or parameter.ndim > 1)
        ]

    def __call__(self) -> None:
        """A cycle."""
        for _ in range(self.objective.n_critic):
            self.update_critic(self.fakes_of_critic())
        self.update_generator(None)

    def close(self) -> None:
        """Ends its threads."""

    def fakes_of_critic(self) -> Tensor:
        with torch.no_grad():
            return self.fakes()

    def fakes(self) -> Tensor:
        with self.autocast():
            return self.generator(self.task.latents()).to(self.task.images.dtype)

    def update_critic(self, fake: Tensor) -> None:
        self.optimizers[0].zero_grad()
        with self.autocast():
            terms = self.critic_terms(self.task.images, fake)
        self.backward_critic(terms)
        self.optimizers[0].step()
        self._critic_steps += 1
        self.clip_critic()

    def clip_critic(self) -> None:
        if self.objective.clip is not None:
            clip(self._clipped, self.objective.clip.value)

    def critic_terms(self, real: Tensor, fake: Tensor) -> list[Tensor]:
        """Their sum is what the critic minimizes."""
        own = {"r1": real, "r2": fake}
        due = {
            name: settings
            for name, settings in self.objective.penalties.items()
            if self._critic_steps % settings.interval == 0
        }
        if self.shares_forwards and not self._penalty_in_float32:
            own |= {name: own[name].detach().requires_grad_() for name in own if name in due}
        logits = {name: self.score(images) for name, images in own.items()}
        terms = self.loss.critic(logits["r1"], logits["r2"])
        with self.in_float32() if self._penalty_in_float32 else contextlib.nullcontext():
            for name, settings in due.items():
                if name in own and own[name].requires_grad:
                    value = penalty_of(name, logits[name], own[name])
                else:
                    value = penalty(name, self.score, real, fake)
                terms.append(value_at(settings.weight, 0) * settings.interval * value)
        return terms

    def score(self, images: Tensor) -> Tensor:
        """Logits, in float32 or better."""
        logits = self.critic(images)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def backward_critic(self, terms: list[Tensor]) -> None:
        torch.stack(terms).sum().backward()

    def update_generator(self, fake: Tensor | None) -> None:
        """fake: with their graph; None to make new ones"""
        self.optimizers[1].zero_grad()
        due = self.objective.generator_penalties.get("path_length")
        with self.autocast():
            if due is not None and self._generator_steps % due.interval == 0:
                styles = self.generator.styles(self.task.latents())  # type: ignore[operator]
                images = self.generator.synthesis(styles)  # type: ignore[operator]
                value = path_length(images, styles, self._mean_length, due.decay)
                factor = value_at(due.weight, 0) * due.interval
                loss = self.generator_loss(images) + factor * value
            else:
                loss = self.generator_loss(self.fakes() if fake is None else fake)
        self.backward_generator(loss)
        self.optimizers[1].step()
        self._generator_steps += 1

    def generator_loss(self, fake: Tensor) -> Tensor:
        real_logits = None
        if self.loss.generator_needs_real:
            with torch.no_grad():
                real_logits = self.score(self.task.images)
        return self.loss.generator(self.score(fake), real_logits)

    def backward_generator(self, loss: Tensor) -> None:
        loss.backward(inputs=list(self.generator.parameters()))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.task.autocast()

    def in_float32(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.task.images.device.type, enabled=False)


class UsualLoop(PlainLoop):
    """As it is often written: a forward of its own for every penalty, a backward per term, and in
    the generator step also the critic's gradients, which nobody uses."""

    name = "usual loop"
    shares_forwards = False

    def backward_critic(self, terms: list[Tensor]) -> None:
        for term in terms:
            term.backward()

    def backward_generator(self, loss: Tensor) -> None:
        loss.backward()


class PyTorchGAN(PlainLoop):
    """The loops of the repository PyTorch-GAN, https://github.com/eriklindernoren/PyTorch-GAN.

    With several critic steps, that of `wgan_gp.py`: fakes keep the generator's graph, and the
    critic's backward runs through it. With one, that of `dcgan.py`: the generator step comes first
    and the critic step uses its fakes, so there is one forward of the generator less.
    """

    name = "PyTorch-GAN"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.reuses_fakes = self.objective.n_critic == 1

    def __call__(self) -> None:
        if self.objective.n_critic == 1:
            fake = self.fakes()
            self.update_generator(fake)
            self.update_critic(fake.detach())
            return
        for _ in range(self.objective.n_critic):
            self.update_critic(self.fakes())
        self.update_generator(None)

    def backward_generator(self, loss: Tensor) -> None:
        loss.backward()


class AccelerateLoop(PlainLoop):
    """The plain loop with everything prepared by Accelerate and with its `backward`."""

    name = "Accelerate loop"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # Accelerate has one precision per process, but prepared networks keep theirs.
        AcceleratorState._reset_state()
        self._accelerator = Accelerator(
            cpu=task.images.device.type == "cpu",
            mixed_precision="bf16" if task.is_bfloat16 else "no",
        )
        self.generator, self.critic, *optimizers = self._accelerator.prepare(
            task.generator, task.critic, *self.optimizers
        )
        self.optimizers = (optimizers[0], optimizers[1])
        AcceleratorState._reset_state()
        Accelerator(cpu=task.images.device.type == "cpu", mixed_precision="no")

    def backward_critic(self, terms: list[Tensor]) -> None:
        self._accelerator.backward(torch.stack(terms).sum())

    def backward_generator(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # prepared networks do it in their forward
