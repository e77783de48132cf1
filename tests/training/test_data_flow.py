"""Which real images each step of a run sees, held against a loop written out."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.data.dataset import open_data
from ganscale.data.images.preprocessing import to_network_range
from ganscale.randomness import normal
from ganscale.runtime import Runtime
from ganscale.training.data_flow import batches_per_cycle, data_position
from ganscale.training.device_batch import CRITIC_LATENTS, GENERATOR_LATENTS
from ganscale.training.trainer import Trainer
from tests.helpers.runs import Runs

BATCH, CYCLES, LATENT_DIM, RATE, R1 = 8, 3, 5, 0.05, 0.2


class WrittenOut:
    """The relativistic loss with R1 in plain autograd, and gradient descent by hand."""

    def __init__(self, generator: nn.Module, critic: nn.Module, seed: int) -> None:
        self.generator, self.critic = copy.deepcopy(generator), copy.deepcopy(critic)
        self._seed = seed

    def critic_step(self, batch: Batch) -> None:
        real = to_network_range(batch.images).double().requires_grad_()
        fake = self._fakes(CRITIC_LATENTS, batch).detach()
        of_real = self.critic(real)
        (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        penalty = gradient.square().flatten(1).sum(1).mean() / 2
        loss = softplus(self.critic(fake) - of_real).mean() + R1 * penalty
        self._descend(self.critic, loss)

    def generator_step(self, batch: Batch) -> None:
        real = to_network_range(batch.images).double()
        fake = self._fakes(GENERATOR_LATENTS, batch)
        loss = softplus(self.critic(real).detach() - self.critic(fake)).mean()
        self._descend(self.generator, loss)

    def _fakes(self, purpose: str, batch: Batch) -> Tensor:
        return self.generator(normal(self._seed, purpose, batch.slots, LATENT_DIM).double())

    def _descend(self, network: nn.Module, loss: Tensor) -> None:
        parameters = [*network.parameters()]
        with torch.no_grad():
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter -= RATE * gradient


@pytest.mark.parametrize("n_critic", [1, 2])
@pytest.mark.parametrize("generator_real", ["critic", "fresh"])
def test_a_run_trains_as_a_loop_that_takes_real_batches_in_their_order(
    runs: Runs, runtime: Runtime, n_critic: int, generator_real: str
) -> None:
    sgd = f"{{name: sgd, learning_rate: {RATE}}}"
    file = runs.folder.parent / "sgd.yaml"  # in place of the demo's objective and optimizers
    file.write_text(
        f"objective: {{loss: {{name: relativistic}}, penalties: {{r1: {{weight: {R1}}}}}}}\n"
        f"optimizer: {{critic: {sgd}, generator: {sgd}}}\n"
        f"generator: {{target: mlp, latent_dim: {LATENT_DIM}}}\n"
        "critic: {target: mlp}\n"
    )
    settings = runs.settings(
        "run",
        str(file),
        "generator.options.width=8",
        "critic.options.width=8",
        f"objective.n_critic={n_critic}",
        f"training.generator_real={generator_real}",
        f"training.global_batch_size={BATCH}",
        f"training.total_images={CYCLES * n_critic * BATCH}",
        "training.precision=float64",
    )
    config = resolve(settings).config
    trainer = Trainer(resolve(settings), runtime)
    state = trainer.state
    expected = WrittenOut(state.generator, state.critic, config.seed)
    loader = open_data(config.data).make_loader(
        seed=config.seed, global_batch_size=BATCH, rank=0, world_size=1, position=0
    )
    for _ in range(CYCLES):
        batch = next(loader)
        expected.critic_step(batch)
        for _ in range(n_critic - 1):
            batch = next(loader)
            expected.critic_step(batch)
        expected.generator_step(next(loader) if generator_real == "fresh" else batch)
    loader.close()

    assert trainer.run() == 0
    assert state.images_seen == CYCLES * n_critic * BATCH
    for network, by_hand in (
        (state.generator, expected.generator),
        (state.critic, expected.critic),
    ):
        for name, weights in network.named_parameters():
            torch.testing.assert_close(
                weights, by_hand.get_parameter(name), rtol=1e-10, atol=1e-12, msg=name
            )


@pytest.mark.parametrize("n_critic", [1, 3])
@pytest.mark.parametrize(("generator_real", "batches"), [("critic", 0), ("fresh", 1)])
def test_cycles_follow_each_other_in_the_data_from_wherever_a_session_begins(
    n_critic: int, generator_real: str, batches: int
) -> None:
    """Also in the middle of a cycle, where a step that was not finite ended the session before."""
    settings = (
        f"objective.n_critic={n_critic}",
        f"training.generator_real={generator_real}",
        f"training.global_batch_size={BATCH}",
    )
    config = resolve(["r3gan_emoji32", *settings]).config
    assert batches_per_cycle(config) == n_critic + batches
    assert data_position(config, 0) == 0
    for start in range(0, 10 * BATCH, BATCH):
        following = data_position(config, start + n_critic * BATCH)
        assert following - data_position(config, start) == (n_critic + batches) * BATCH
