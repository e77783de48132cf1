"""How `benchmarks.mixtures` judges samples, on samples whose score is known."""

import math

import pytest
import torch

from benchmarks.gaussians import Trained, rows_of
from benchmarks.mixtures import MIXTURES, Mixture, Score, grid25, judge, ring8


@pytest.mark.parametrize("name", MIXTURES)
def test_the_mixture_itself_has_every_mode_and_the_quality_of_a_normal_distribution(
    name: str,
) -> None:
    mixture = MIXTURES[name]()
    score = judge(mixture.draw(seed=0, slots=torch.arange(100_000)), mixture)
    assert score.modes == len(mixture.modes)
    # Within three deviations in two dimensions: 1 - exp(-9/2); four standard errors of 100,000.
    assert score.high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.0014)


def test_a_sample_of_the_mixture_depends_on_its_slot_alone() -> None:
    mixture = grid25()
    together = mixture.draw(seed=3, slots=torch.arange(1000))
    assert torch.equal(mixture.draw(seed=3, slots=torch.arange(600, 700)), together[600:700])


@pytest.mark.parametrize(("distance", "is_good"), [(2.99, True), (3.01, False)])
def test_high_quality_ends_at_three_deviations(distance: float, is_good: bool) -> None:
    mixture = ring8()
    samples = mixture.modes + mixture.deviation * distance * torch.tensor([0.6, -0.8])
    assert judge(samples, mixture) == (Score(8, 1.0) if is_good else Score(0, 0.0))


def test_a_mode_is_covered_by_one_good_sample_and_by_no_number_of_bad_ones() -> None:
    mixture = grid25()
    good = mixture.modes[[4, 4, 4, 11]]
    bad = mixture.modes[[7, 8]].repeat(2, 1) + 0.2  # nearest to theirs, and 5.7 deviations off
    assert judge(torch.cat([good, bad]), mixture) == Score(modes=2, high_quality=0.5)


def test_samples_that_are_no_numbers_score_nothing() -> None:
    mixture = Mixture(torch.zeros(1, 2), deviation=1.0, scale=1.0)
    assert judge(torch.full((5, 2), math.nan), mixture) == Score(0, 0.0)


def test_several_seeds_are_a_mean_with_its_deviation_and_the_range_of_the_ratios() -> None:
    modes = grid25().modes
    runs = [
        Trained(samples, seconds, is_finite=True)
        for samples, seconds in [(modes, 10.0), (torch.cat([modes[:21], modes[:4] + 0.5]), 30.0)]
    ]
    found, quality, seconds = rows_of("wgan_gp", "grid25", runs)
    assert found.note == "23.0 ± 2.8 of 25, published 24.8"
    # Of 25 and 21 modes, the deviation is that of a sample of two: (25 - 21) / sqrt(2).
    assert quality.note == "92.0 ± 11.3 %, published 93.6 %"
    assert (found.ratio, found.low, found.high) == pytest.approx((23 / 24.8, 21 / 24.8, 25 / 24.8))
    assert (seconds.ratio, seconds.low, seconds.high) == (20, 10, 30)
    (alone, *_) = rows_of("wgan_gp", "grid25", runs[:1])
    assert (alone.note, alone.low) == ("25.0 of 25, published 24.8", None)
