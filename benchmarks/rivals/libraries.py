"""GAN libraries: torchgan 0.1.0 and torch-mimicry 0.1.16, with our networks in their classes.

Both import torchvision, and mimicry also tensorflow, for data sets and metrics. Training needs
neither, so the `__init__` of their packages is skipped; their code runs as published.
"""

import importlib
import importlib.util
import sys
import types
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.loops import Task


class NotMeasured(Exception):
    """Why a rival cannot be measured."""


def _import(module: str) -> ModuleType:
    """The module, imported without running the `__init__.py` of its packages."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    if spec is not None and spec.submodule_search_locations is not None:
        _add_bare_package(package, list(spec.submodule_search_locations))
    elif package not in sys.modules:
        raise NotMeasured(f"{package} is not installed (make rivals)")
    for name in rest.split(".")[:-1]:
        folders = [f"{folder}/{name}" for folder in sys.modules[package].__path__]
        package = f"{package}.{name}"
        _add_bare_package(package, folders)
    return importlib.import_module(module)


def _add_bare_package(package: str, folders: list[str]) -> None:
    if package not in sys.modules:
        bare = types.ModuleType(package)
        bare.__path__ = folders
        sys.modules[package] = bare


class TorchGAN:
    """torchgan's train ops, called as its trainer does.

    Its gradient penalty is different mathematics: one coefficient for the batch, the norm of the
    whole batch's gradient, and a separate optimizer step, whose backward also runs through the
    generator.
    """

    name = "torchgan"
    reuses_fakes = False

    def __init__(self, task: Task) -> None:
        losses = _import("torchgan.losses")
        objective = task.config.objective
        if objective.loss.name == "wgan" and list(objective.penalties) == ["wgan_gp"]:
            weight = objective.penalties["wgan_gp"].weight
            self._critic_losses = [
                losses.WassersteinDiscriminatorLoss(),
                losses.WassersteinGradientPenalty(lambd=weight),
            ]
            self._generator_loss = losses.WassersteinGeneratorLoss()
        elif objective.loss.name == "non_saturating" and not objective.penalties:
            self._critic_losses = [losses.MinimaxDiscriminatorLoss()]
            self._generator_loss = losses.MinimaxGeneratorLoss()
        else:
            raise NotMeasured("not run for this objective")
        self._task = task
        # Attributes that the train ops expect of torchgan's network classes.
        self._generator: Any = task.generator
        self._generator.encoding_dims = task.config.generator.latent_dim
        self._critic: Any = task.critic
        self._generator.label_type = self._critic.label_type = "none"
        self._optimizers = task.optimizers()

    def __call__(self) -> None:
        task, networks = self._task, (self._generator, self._critic)
        device = task.images.device
        with task.autocast():
            for _ in range(task.config.objective.n_critic):
                for loss in self._critic_losses:
                    loss.train_ops(*networks, self._optimizers[0], task.images, device)
            batch = len(task.images)
            self._generator_loss.train_ops(*networks, self._optimizers[1], device, batch)

    def close(self) -> None:
        pass


class Mimicry:
    """torch-mimicry's `train_step` of both base classes, called as its trainer does.

    The training steps are as published; only `forward` is ours. Its mixed precision is for CUDA
    only, so here the whole step runs under autocast.
    """

    name = "torch-mimicry"
    reuses_fakes = False

    def __init__(self, task: Task) -> None:
        objective = task.config.objective
        if objective.loss.name == "wgan" and list(objective.penalties) == ["wgan_gp"]:
            base = _import("torch_mimicry.nets.wgan_gp.wgan_gp_base")
            bases = (base.WGANGPBaseGenerator, base.WGANGPBaseDiscriminator)
            settings = {"gp_scale": objective.penalties["wgan_gp"].weight}
        elif objective.loss.name == "non_saturating" and not objective.penalties:
            base = _import("torch_mimicry.nets.dcgan.dcgan_base")
            bases = (base.DCGANBaseGenerator, base.DCGANBaseDiscriminator)
            settings = {}
        else:
            raise NotMeasured("not run for this objective")
        self._log = _import("torch_mimicry.training.metric_log").MetricLog

        class Generator(bases[0]):
            def __init__(self, network: nn.Module) -> None:
                super().__init__(task.config.generator.latent_dim, ngf=0, bottom_width=0)
                self.network = network

            def forward(self, latents: Tensor) -> Tensor:
                return self.network(latents)

        class Discriminator(bases[1]):
            def __init__(self, network: nn.Module) -> None:
                super().__init__(ndf=0, **settings)
                self.network = network

            def forward(self, images: Tensor) -> Tensor:
                return self.network(images)[:, None]  # its losses want (batch, 1)

        self._task = task
        self._generator, self._critic = Generator(task.generator), Discriminator(task.critic)
        self._optimizers = task.optimizers()

    def __call__(self) -> None:
        task, log = self._task, self._log()
        batch = (task.images, torch.empty(0))
        device = task.images.device
        with task.autocast():
            for _ in range(task.config.objective.n_critic):
                self._critic.train_step(
                    batch, netG=self._generator, optD=self._optimizers[0], log_data=log,
                    device=device,
                )  # fmt: skip
            self._generator.train_step(
                batch, netD=self._critic, optG=self._optimizers[1], log_data=log, device=device
            )

    def close(self) -> None:
        pass
