import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.kid import poly_mmd

from ganscale.errors import UserError
from ganscale.evaluation.quality.kernel_distance import (
    SUBSET_SIZE,
    kernel_distance,
    kernel_distance_of_subsets,
    mean_kernel,
)
from ganscale.randomness import permutation


def random_features(count, dim, seed, scale=1.0):
    """Like those after a ReLU; float32."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dim, generator=generator).relu() + 0.1


def distance_by_numpy(real, fake):
    real, fake = (np.asarray(features, np.float64) for features in (real, fake))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_others(x):
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))

    return mean_of_others(real) + mean_of_others(fake) - 2 * kernel(real, fake).mean()


# Beside and across the chunks of 256 rows and 2,048 columns.
@pytest.mark.parametrize("counts", [(2, 2), (256, 257), (600, 3), (300, 2100)])
def test_distance_is_the_formula_in_float64(counts):
    real, fake = random_features(counts[0], 24, 1), random_features(counts[1], 24, 2, scale=1.1)
    expected = distance_by_numpy(real, fake)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9, abs=1e-13)
    term = mean_kernel(real)
    assert kernel_distance(real, fake, real_term=term) == kernel_distance(real, fake)


def test_distance_equals_torchmetrics():
    real, fake = random_features(400, 64, 1).double(), random_features(400, 64, 2, 1.2).double()
    expected = poly_mmd(real, fake).item()
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_subsets_of_everything_are_the_full_estimate():
    real, fake = random_features(120, 16, 1), random_features(120, 16, 2)
    mean, deviation = kernel_distance_of_subsets(real, fake, seed=0, subsets=3)
    assert mean == pytest.approx(kernel_distance(real, fake), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_subsets_scatter_around_the_full_estimate_as_their_deviation_says():
    real, fake = random_features(2000, 16, 1), random_features(2000, 16, 2, scale=1.2)
    mean, deviation = kernel_distance_of_subsets(real, fake, seed=0, subsets=40, size=200)
    assert abs(mean - kernel_distance(real, fake)) < 4 * deviation / 40**0.5
    assert deviation > 0
    again = kernel_distance_of_subsets(real, fake, seed=0, subsets=40, size=200)
    assert again == (mean, deviation)
    assert kernel_distance_of_subsets(real, fake, seed=1, subsets=40, size=200)[0] != mean


# The last ones have fewer than the thousand samples of a subset: all of them are taken, and so
# many of the other set.
@pytest.mark.parametrize("counts", [(2500, 2500), (1000, 2500), (400, 2500), (2500, 300)])
def test_distance_of_subsets_is_the_formula_on_each_of_them(counts):
    real, fake = random_features(counts[0], 24, 1), random_features(counts[1], 24, 2, scale=1.1)
    size = min(SUBSET_SIZE, *counts)
    distances, seen = [], set()
    for number in range(4):
        rows = {
            name: permutation(7, f"kernel distance: {name}", (number, 0, 0), len(features))[:size]
            for name, features in (("real", real), ("fake", fake))
        }
        seen |= {frozenset(chosen.tolist()) for chosen in rows.values()}
        distances.append(distance_by_numpy(real[rows["real"]], fake[rows["fake"]]))
    # Sets of their own in each subset; of all samples there is one.
    assert {len(each) for each in seen} == {size}
    assert len(seen) == sum(4 if count > size else 1 for count in counts)
    mean, deviation = kernel_distance_of_subsets(real, fake, seed=7, subsets=4)
    assert mean == pytest.approx(np.mean(distances), rel=1e-9)
    assert deviation == pytest.approx(np.std(distances), rel=1e-9)
    assert np.std(distances) > 1e-6


def test_estimate_has_no_bias():
    """Small sets of one distribution are at 0 on average, within four standard errors."""
    distances = [
        kernel_distance(random_features(20, 8, 2 * n), random_features(20, 8, 2 * n + 1))
        for n in range(400)
    ]
    assert abs(np.mean(distances)) < 4 * np.std(distances) / len(distances) ** 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dim=st.integers(1, 20), count=st.integers(2, 40))
def test_distance_is_symmetric_and_turns_with_the_features(seed, dim, count):
    real, fake = (random_features(count + n, dim, seed + n).double() for n in (0, 1))
    turn, _ = torch.linalg.qr(random_features(dim, dim, seed).double() + torch.eye(dim))
    distance = kernel_distance(real, fake)
    assert kernel_distance(fake, real) == pytest.approx(distance, rel=1e-9, abs=1e-11)
    turned = kernel_distance(real @ turn, fake @ turn)
    assert turned == pytest.approx(distance, rel=1e-9, abs=1e-11)


def test_bad_features_are_a_users_error():
    good, single = random_features(9, 4, 1), random_features(1, 4, 1)
    bad = good.clone()
    bad[3, 2] = float("nan")
    for real, fake, sentence in [
        (single, good, "needs 2 samples or more, not 1"),
        (good, single, "needs 2 samples or more, not 1"),
        (bad, good, "NaN or infinite"),
        (good, bad / 0, "NaN or infinite"),
        (good, random_features(9, 5, 1), "4 dimensions, the samples of 5"),
    ]:
        with pytest.raises(UserError, match=sentence):
            kernel_distance(real, fake)
        with pytest.raises(UserError, match=sentence):
            kernel_distance_of_subsets(real, fake, seed=0)
