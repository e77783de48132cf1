"""Meters distinguish a generator of few images from a diverse one; when the alarm is raised."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from ganscale.metrics.collapse import collapse_meters
from ganscale.metrics.health import Health
from ganscale.runtime import Runtime


def draw(count: int, *shape: int, seed: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).double()


def meters_of(real: Tensor, fake: Tensor, runtime: Runtime) -> dict[str, float]:
    found = collapse_meters(real, fake, torch.arange(len(real)), len(real), runtime)
    return {name.removeprefix("collapse/"): value.item() for name, value in found.items()}


def by_pairs(images: Tensor) -> tuple[float, float]:
    """Mean squared distance of all pairs, and to the nearest, one pair at a time."""
    pairs = [[(a - b).square().sum().item() for b in images] for a in images]
    others = [[d for j, d in enumerate(row) if j != i] for i, row in enumerate(pairs)]
    count = len(images)
    return sum(map(sum, others)) / count / (count - 1), sum(map(min, others)) / count


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 4), (2,)])
def test_the_ratios_equal_those_computed_pair_by_pair(runtime, shape):
    real, fake = 2 * draw(9, *shape, seed=1) + 5, draw(9, *shape, seed=2)
    found = meters_of(real, fake, runtime)
    of_real, of_fake = by_pairs(real), by_pairs(fake)
    assert found["diversity"] == pytest.approx(of_fake[0] / of_real[0], rel=1e-10)
    assert found["nearest"] == pytest.approx(of_fake[1] / of_real[1], rel=1e-10)


def test_large_images_are_downsampled_and_large_batches_subsampled(runtime):
    real, fake = draw(500, 1, 32, 32, seed=1), draw(500, 1, 32, 32, seed=2)
    smaller = (e[::2].view(-1, 1, 16, 2, 16, 2).mean(dim=(3, 5)) for e in (real, fake))
    small_real, small_fake = smaller  # 500 -> 250 <= 256
    whole = meters_of(real, fake, runtime)
    assert whole == pytest.approx(meters_of(small_real, small_fake, runtime), rel=1e-10)
    # A rank's images may be in any order: their positions count.
    order = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    found = collapse_meters(real[order], fake[order], order, 500, runtime)
    assert found["collapse/nearest"].item() == pytest.approx(whole["nearest"], rel=1e-10)


def test_one_image_has_no_diversity_and_three_images_have_near_twins(runtime):
    real = draw(64, 1, 16, 16, seed=1)
    one = real[:1].expand(64, -1, -1, -1) + 0.01 * draw(64, 1, 16, 16, seed=2)
    three = draw(3, 1, 16, 16, seed=3).repeat(22, 1, 1, 1)[:64]
    three = three + 0.01 * draw(64, 1, 16, 16, seed=4)
    assert max(meters_of(real, one, runtime).values()) < 1e-3
    found = meters_of(real, three, runtime)
    assert found["diversity"] == pytest.approx(2 / 3, rel=0.1)  # 2 of 3 pairs are different images
    assert found["nearest"] < 1e-3
    healthy = meters_of(real, draw(64, 1, 16, 16, seed=5), runtime)
    assert min(healthy.values()) > 0.8


def test_one_image_or_equal_real_images_are_not_divided_by(runtime):
    assert meters_of(torch.ones(1, 2), torch.ones(1, 2), runtime) == {}
    found = meters_of(torch.ones(4, 2), torch.ones(4, 2), runtime)
    assert found == {"diversity": 0, "nearest": 0}


def alarms(values: list[float], every: int, total: int) -> list[bool]:
    health = Health()
    return [health.update_collapse(value, (i + 1) * every, total) for i, value in enumerate(values)]


def test_the_third_low_row_raises_the_alarm_if_the_generator_was_diverse_before():
    assert alarms([0.01, 0.1, 0.3, 0.05, 0.05, 0.05, 0.05, 0.5], 1000, 10**6) == [
        *[False] * 5,
        *[True] * 2,
        False,
    ]
    assert not any(alarms([0.3, 0.05, 0.05, 0.11, 0.05, 0.05], 1000, 10**6))


def test_similar_images_in_the_first_quarter_of_a_run_raise_no_alarm():
    low = [0.01] * 40
    assert alarms(low, 10_000, 400_000).index(True) == 9  # at 100,000 images
    assert not any(alarms(low, 1_000, 40_000))  # nor in a run that ends so early
    assert alarms(low, 10_000, 100_000).index(True) == 4


def test_the_alarm_survives_a_restart():
    health = Health()
    for nearest in (0.3, 0.05, 0.05):
        assert not health.update_collapse(nearest, 1000, 10**6)
    restarted = Health(**json.loads(json.dumps(asdict(health))))
    assert restarted.update_collapse(0.05, 1000, 10**6)
