"""The EMA equals the closed form of its updates, and shares no memory with the generator."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.invariance import Combination, config_of, synthetic_batch
from ganscale.objectives.objective import build_objective
from ganscale.training.cycle import Cycle
from ganscale.training.ema import ema_copy, ema_decay, update_ema
from ganscale.training.state import TrainingState


def network(value: float) -> nn.Sequential:
    made: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    with torch.no_grad():
        for tensor in (*made.parameters(), made[1].running_mean, made[1].running_var):
            tensor.fill_(value)
    return made


def test_after_n_updates_each_network_has_its_exponential_weight():
    """decay**n for the first, and (1 - decay) decay**(n - i) for the i-th."""
    decay, values = 0.9, [5.0, -3.0, 2.0, 7.0, 1.0]
    ema: Any = ema_copy(network(4.0))
    for value in values:
        update_ema(ema, network(value), decay)
    n = len(values)
    expected = decay**n * 4 + sum(
        (1 - decay) * decay ** (n - i) * value for i, value in enumerate(values, 1)
    )
    for parameter in ema.parameters():
        assert parameter.unique().tolist() == pytest.approx([expected], rel=1e-12)


def test_buffers_are_copied_and_not_averaged():
    ema, generator = ema_copy(network(3.0)), network(8.0)
    generator.train()
    generator(torch.randn(4, 2).double())  # counts a batch
    update_ema(ema, generator, 0.5)
    copied, own = dict(ema.named_buffers()), dict(generator.named_buffers())
    for name, buffer in own.items():
        assert torch.equal(copied[name], buffer), name
        assert copied[name].data_ptr() != buffer.data_ptr()
    assert copied["1.num_batches_tracked"].item() == 1


def test_a_decay_of_zero_copies_to_the_bit_and_one_of_one_changes_nothing():
    torch.manual_seed(0)
    ema: Any = ema_copy(nn.Linear(50, 50))
    generator = nn.Linear(50, 50)
    before = copy.deepcopy(ema)
    update_ema(ema, generator, 1.0)
    assert torch.equal(ema.weight, before.weight)
    update_ema(ema, generator, 0.0)
    assert torch.equal(ema.weight, generator.weight)


def test_the_ema_is_frozen_in_evaluation_mode_and_owns_its_weights():
    generator: Any = network(1.0).train()
    ema: Any = ema_copy(generator)
    assert not ema.training
    assert generator.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in generator.parameters())
    with torch.no_grad():
        generator[0].weight.fill_(9)
    assert ema[0].weight.unique().tolist() == [1]


def test_a_weight_that_is_used_twice_is_averaged_once():
    generator: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    generator[1].weight = generator[0].weight
    ema: Any = ema_copy(generator)
    start = ema[0].weight.clone()
    with torch.no_grad():
        generator[0].weight += 1
    update_ema(ema, generator, 0.5)
    assert ema[1].weight is ema[0].weight
    torch.testing.assert_close(ema[0].weight, start + 0.5)


def test_after_one_half_life_half_is_kept():
    assert ema_decay(1000, 10**9, 1000, 0.05) == 0.5
    assert ema_decay(2000, 10**9, 1000, 0.05) == 0.25
    assert ema_decay(0, 10**9, 1000, 0.05) == 1
    # The EMA has one time scale, however many images an update covers.
    assert ema_decay(64, 10**9, 1000, 0.05) ** 5 == pytest.approx(ema_decay(320, 10**9, 1000, 0.05))


def test_early_on_the_half_life_is_a_fraction_of_the_images_seen():
    assert ema_decay(64, 1280, 10_000, 0.05) == 0.5  # 0.05 * 1280 = 64
    assert ema_decay(64, 128_000, 10_000, 0.05) == pytest.approx(0.5 ** (64 / 6400))
    assert ema_decay(64, 200_000, 10_000, 0.05) == ema_decay(64, 10**12, 10_000, 0.05) < 1
    decays = [ema_decay(64, seen, 10_000, 0.05) for seen in range(64, 300_000, 640)]
    assert decays == sorted(decays)


@pytest.mark.parametrize(
    ("seen", "half_life", "ramp_up"), [(0, 1000, 0.05), (64, 0, 0.05), (64, 9, 0)]
)
def test_a_half_life_of_zero_keeps_nothing(seen, half_life, ramp_up):
    assert ema_decay(64, seen, half_life, ramp_up) == 0
    assert ema_decay(10**9, 1, 1e-300, 1) == 0


def test_a_cycle_updates_the_ema_once_after_the_generator_for_the_images_it_has_seen(runtime):
    """Written out: a half-life of min(h, r n) images after n; e <- d e + (1 - d) g per cycle."""
    config = config_of(Combination("wgan", "wgan_gp"), 1, "float64")
    config.ema.half_life_images, config.ema.ramp_up = 40, 1.5
    objective = build_objective(config.objective)
    state = TrainingState(config, objective, runtime, 0)
    cycle = Cycle(config, objective, runtime, state)
    assert cycle.images == 16

    def weights(network: nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    before: list[torch.Tensor] = []
    expected = weights(state.ema)
    for seen, half_life in ((16, 24), (32, 40), (48, 40)):
        batches = [synthetic_batch(config, runtime, state.images_seen + 8 * k) for k in range(2)]
        start = weights(state.generator)
        cycle.run(batches, is_logged=False, before_ema=lambda _: before.append(weights(state.ema)))
        assert state.images_seen == seen
        torch.testing.assert_close(before[-1], expected, rtol=1e-12, atol=1e-14)
        assert not torch.equal(start, weights(state.generator))
        decay = 0.5 ** (16 / half_life)
        expected = decay * expected + (1 - decay) * weights(state.generator)
        torch.testing.assert_close(weights(state.ema), expected, rtol=1e-12, atol=1e-14)
