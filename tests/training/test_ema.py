"""The average is the closed form of its updates, and stands apart from what it averages."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ganscale.training.ema import decay, ema_copy, update_ema


def network(value: float) -> nn.Sequential:
    made: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    with torch.no_grad():
        for tensor in (*made.parameters(), made[1].running_mean, made[1].running_var):
            tensor.fill_(value)
    return made


def test_after_n_updates_each_network_weighs_what_was_kept_since():
    """kept**n of the first, and (1 - kept) kept**(n - i) of the i-th."""
    kept, values = 0.9, [5.0, -3.0, 2.0, 7.0, 1.0]
    average: Any = ema_copy(network(4.0))
    for value in values:
        update_ema(average, network(value), kept)
    n = len(values)
    expected = kept**n * 4 + sum(
        (1 - kept) * kept ** (n - i) * value for i, value in enumerate(values, 1)
    )
    for parameter in average.parameters():
        assert parameter.unique().tolist() == pytest.approx([expected], rel=1e-12)


def test_buffers_are_copied_and_not_averaged():
    average, generator = ema_copy(network(3.0)), network(8.0)
    generator.train()
    generator(torch.randn(4, 2).double())  # counts a batch
    update_ema(average, generator, 0.5)
    copied, own = dict(average.named_buffers()), dict(generator.named_buffers())
    for name, buffer in own.items():
        assert torch.equal(copied[name], buffer), name
        assert copied[name].data_ptr() != buffer.data_ptr()
    assert copied["1.num_batches_tracked"].item() == 1


def test_keeping_nothing_copies_to_the_bit_and_keeping_all_changes_nothing():
    torch.manual_seed(0)
    average: Any = ema_copy(nn.Linear(50, 50))
    generator = nn.Linear(50, 50)
    before = copy.deepcopy(average)
    update_ema(average, generator, 1.0)
    assert torch.equal(average.weight, before.weight)
    update_ema(average, generator, 0.0)
    assert torch.equal(average.weight, generator.weight)


def test_the_average_is_frozen_in_evaluation_mode_and_owns_its_weights():
    generator: Any = network(1.0).train()
    average: Any = ema_copy(generator)
    assert not average.training
    assert generator.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in generator.parameters())
    with torch.no_grad():
        generator[0].weight.fill_(9)
    assert average[0].weight.unique().tolist() == [1]


def test_a_weight_that_is_used_twice_is_averaged_once():
    generator: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    generator[1].weight = generator[0].weight
    average: Any = ema_copy(generator)
    start = average[0].weight.clone()
    with torch.no_grad():
        generator[0].weight += 1
    update_ema(average, generator, 0.5)
    assert average[1].weight is average[0].weight
    torch.testing.assert_close(average[0].weight, start + 0.5)


def test_after_one_half_life_half_is_kept():
    assert decay(1000, 10**9, 1000, 0.05) == 0.5
    assert decay(2000, 10**9, 1000, 0.05) == 0.25
    assert decay(0, 10**9, 1000, 0.05) == 1
    # How many images an update stands for does not matter: the average has one time scale.
    assert decay(64, 10**9, 1000, 0.05) ** 5 == pytest.approx(decay(320, 10**9, 1000, 0.05))


def test_early_on_the_half_life_is_a_share_of_the_images_seen():
    assert decay(64, 1280, 10_000, 0.05) == 0.5  # 0.05 * 1280 = 64
    assert decay(64, 128_000, 10_000, 0.05) == pytest.approx(0.5 ** (64 / 6400))
    assert decay(64, 200_000, 10_000, 0.05) == decay(64, 10**12, 10_000, 0.05) < 1
    kept = [decay(64, seen, 10_000, 0.05) for seen in range(64, 300_000, 640)]
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("seen", "half_life", "ramp_up"), [(0, 1000, 0.05), (64, 0, 0.05), (64, 9, 0)]
)
def test_a_half_life_of_nothing_keeps_nothing(seen, half_life, ramp_up):
    assert decay(64, seen, half_life, ramp_up) == 0
    assert decay(10**9, 1, 1e-300, 1) == 0
