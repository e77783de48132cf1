"""PyTorch Lightning: manual optimization as its documentation shows it for a GAN
(https://lightning.ai/docs/pytorch/stable/model/manual_optimization.html), with a penalty."""

import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.loops import PlainLoop, Task


class LightningLoop:
    """A real `Trainer.fit`, in a thread that waits between cycles.

    As in the documentation, fakes keep the generator's graph, the critic gets them detached, the
    generator step uses them again, and `log_dict` is called at every step. So a cycle has one
    forward of the generator less than in loops that draw new fakes.
    """

    name = "PyTorch Lightning"

    def __init__(self, task: Task) -> None:
        self.reuses_fakes = task.config.objective.n_critic == 1  # else only few of them
        self._turn = threading.Semaphore(0)
        self._ready = threading.Semaphore(0)
        self._is_closing = False
        self._failure: BaseException | None = None
        self._task = task
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()
        self._await()

    def __call__(self) -> None:
        """A cycle, with all that Lightning does around batches."""
        self._turn.release()
        self._await()

    def close(self) -> None:
        self._is_closing = True
        self._turn.release()
        self._thread.join()

    def wait_for_turn(self) -> bool:
        """Called at the start of every cycle; False if there are no more."""
        if not self._is_closing:
            self._ready.release()
            self._turn.acquire()
        return not self._is_closing

    def _await(self) -> None:
        self._ready.acquire()
        if self._failure is not None:
            raise self._failure

    def _fit(self) -> None:
        torch.set_num_threads(1)  # of this thread
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _fit(self._task, self)
        except BaseException as failure:
            self._failure = failure
        self._ready.release()


def _fit(task: Task, loop: LightningLoop) -> None:
    from pytorch_lightning import LightningModule, Trainer

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class GAN(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.loop = PlainLoop(task)
            self.generator, self.critic = task.generator, task.critic
            self.n_critic = task.config.objective.n_critic

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return list(self.loop.optimizers)

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx % self.n_critic == 0 and not loop.wait_for_turn():
                self.trainer.should_stop = True
                return
            critic_optimizer, generator_optimizer = self.optimizers()  # type: ignore[misc]
            fake = self.generator(task.latents()).to(batch.dtype)
            critic_loss = torch.stack(self.loop.critic_terms(batch, fake.detach())).sum()
            critic_optimizer.zero_grad()
            self.manual_backward(critic_loss)
            critic_optimizer.step()
            self.loop.clip_critic()
            self.log_dict({"critic_loss": critic_loss})
            if (batch_idx + 1) % self.n_critic == 0:
                generator_loss = self.loop.generator_loss(fake)
                generator_optimizer.zero_grad()
                self.manual_backward(generator_loss)
                generator_optimizer.step()
                self.log_dict({"generator_loss": generator_loss})

    trainer = Trainer(
        accelerator="cpu" if task.images.device.type == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        precision="bf16-mixed" if task.is_bfloat16 else _PRECISIONS[task.images.dtype],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(GAN(), _Repeat(task.images))


_PRECISIONS: dict[torch.dtype, Any] = {torch.float32: "32-true", torch.float64: "64-true"}


class _Repeat:
    """The same batch forever."""

    def __init__(self, batch: Tensor) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._batch
