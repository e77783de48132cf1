"""What a training cycle costs against hand-written loops of the same mathematics.

    python -m benchmarks.step [--quick] [--json FILE]

One cycle is `n_critic` critic steps and a generator step on images that lie ready: no data, no
logging. The rivals train copies of the same networks with loss, penalty, optimizer and batch alike,
under the same autocast, in which their penalty is in bfloat16 and ours in float32:

- `plain loop`: well written. Fakes without a graph; real, fake and interpolates in a forward each;
  one backward; only the generator's gradients in the generator step.
- `usual loop`: as it is often written. A backward per term, and the critic's gradients computed in
  the generator step, too.

The ratio is the rival's time over ours, the median of rounds in which all took their turn; low and
high are its quartiles.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import Row, arguments, report
from benchmarks.timing import interleaved, speedup
from ganscale.config import resolve
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.training.cycle import Cycle, DeviceBatch
from ganscale.training.optimizers import build_optimizer
from ganscale.training.state import TrainingState

CONFIGS = Path(__file__).parent.parent / "configs"
NETWORKS = {
    "dcgan32": ("generator.target=dcgan", "critic.target=dcgan"),
    "resnet32": ("generator.target=resnet", "critic.target=resnet"),
}
OBJECTIVES = ("wgan_gp", "non_saturating")
PRECISIONS = {"f32": "float32", "bf16_penalty_f32": "bfloat16"}


def config_of(objective: str, network: str, precision: str, batch: int) -> Config:
    base = [str(CONFIGS / "resnet32.yaml"), str(CONFIGS / "objective" / f"{objective}.yaml")]
    size = ["generator.options.width=32", "critic.options.width=32", "generator.latent_dim=64"]
    return resolve(
        [
            *base,
            *NETWORKS[network],
            *size,
            f"training.global_batch_size={batch}",
            f"training.precision={precision}",
        ]
    ).config


class Ours:
    """The package's own cycle, with its random numbers, average, norms and meters."""

    def __init__(self, config: Config, runtime: Runtime, images: Tensor) -> None:
        objective = build_objective(config.objective)
        self.state = TrainingState(config, objective, runtime, num_classes=0)
        self._cycle = Cycle(config, objective, runtime, self.state)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._n_critic = config.objective.n_critic

    def __call__(self) -> None:
        for _ in range(self._n_critic):
            self._cycle.critic_step(self._next_batch(), with_panel=False)
        self._cycle.generator_step(self._next_batch(), with_panel=False)
        self._cycle.update_average()

    def _next_batch(self) -> DeviceBatch:
        slots = self.state.images_seen + torch.arange(len(self._images))
        return DeviceBatch(self._images, None, slots)


class HandWritten:
    """A loop without this package, for WGAN-GP and the non-saturating loss."""

    def __init__(self, config: Config, ours: Ours, images: Tensor, is_usual: bool) -> None:
        contiguous = torch.contiguous_format
        self.generator = copy.deepcopy(ours.state.generator).to(memory_format=contiguous)  # type: ignore[call-overload]
        self.critic = copy.deepcopy(ours.state.critic).to(memory_format=contiguous)  # type: ignore[call-overload]
        self._optimizers = [
            build_optimizer(network.parameters(), optimizer)
            for network, optimizer in (
                (self.critic, config.optimizer.critic),
                (self.generator, config.optimizer.generator),
            )
        ]
        self._images = images.contiguous()
        self._n_critic = config.objective.n_critic
        self._latent_dim = config.generator.latent_dim
        self._has_penalty = bool(config.objective.penalties)
        self._is_usual = is_usual
        self._autocast = torch.autocast(
            "cpu", torch.bfloat16, enabled=config.training.precision == "bfloat16"
        )

    def __call__(self) -> None:
        for _ in range(self._n_critic):
            self._critic_step()
        self._generator_step()

    def _critic_step(self) -> None:
        real = self._images
        self._optimizers[0].zero_grad(set_to_none=True)
        with self._autocast:
            with torch.no_grad():
                fake = self.generator(torch.randn(len(real), self._latent_dim))
            terms = [
                lambda: self._loss(self.critic(real), is_real=True),
                lambda: self._loss(self.critic(fake), is_real=False),
            ]
            if self._has_penalty:
                terms.append(lambda: 10 * self._penalty(real, fake))
            if self._is_usual:
                for term in terms:
                    term().backward()
            else:
                torch.stack([term() for term in terms]).sum().backward()
        self._optimizers[0].step()

    def _generator_step(self) -> None:
        self._optimizers[1].zero_grad(set_to_none=True)
        with self._autocast:
            fake = self.generator(torch.randn(len(self._images), self._latent_dim))
            loss = self._loss(self.critic(fake), is_real=True)
        loss.backward(inputs=None if self._is_usual else list(self.generator.parameters()))
        self._optimizers[1].step()

    def _loss(self, logits: Tensor, is_real: bool) -> Tensor:
        if self._has_penalty:
            return (-logits if is_real else logits).float().mean()
        target = torch.full_like(logits, float(is_real))
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), target.float())

    def _penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(len(real), 1, 1, 1)
        mixed = (share * real + (1 - share) * fake).requires_grad_()
        scores = self.critic(mixed)
        (gradient,) = torch.autograd.grad(scores.sum(), mixed, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    runtime = Runtime.start()
    batch, rounds = (16, 5) if options.quick else (64, 15)
    images = torch.rand(batch, 3, 32, 32) * 2 - 1
    rows = []
    for objective in OBJECTIVES:
        for network in NETWORKS:
            for label, precision in PRECISIONS.items():
                config = config_of(objective, network, precision, batch)
                ours = Ours(config, runtime, images)
                contestants: dict[str, Callable[[], None]] = {
                    "ours": ours,
                    "plain loop": HandWritten(config, ours, images, is_usual=False),
                    "usual loop": HandWritten(config, ours, images, is_usual=True),
                }
                seconds = interleaved(contestants, rounds)
                for rival in ("plain loop", "usual loop"):
                    ratio, low, high = speedup(seconds[rival], seconds["ours"])
                    name = f"{objective}/{network}/{label}"
                    note = f"ours {1000 * min(seconds['ours']):.0f} ms a cycle of batch {batch}"
                    rows.append(Row(name, rival, ratio, low, high, "x faster", note))
    report(rows, options.json)


if __name__ == "__main__":
    main()
