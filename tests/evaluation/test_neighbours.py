import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.errors import UserError
from ganscale.evaluation.quality.neighbours import (
    density_and_coverage,
    neighbour_distances,
    precision_and_recall,
)


def random_features(count, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) + shift


def distances_by_numpy(a, b):
    """Squared, from differences in float64."""
    rows, columns = (np.asarray(features, np.float64) for features in (a, b))
    return np.stack([((row - columns) ** 2).sum(1) for row in rows])


def radii_by_numpy(features, neighbours):
    """The sample itself is the nearest, at 0."""
    return np.sort(distances_by_numpy(features, features), axis=1)[:, neighbours]


def precision_and_recall_by_numpy(real, fake, neighbours):
    distances = distances_by_numpy(fake, real)
    precision = (distances <= radii_by_numpy(real, neighbours)).any(1).mean()
    return precision, (distances <= radii_by_numpy(fake, neighbours)[:, None]).any(0).mean()


def density_and_coverage_by_numpy(real, fake, neighbours):
    is_inside = distances_by_numpy(fake, real) < radii_by_numpy(real, neighbours)
    return is_inside.sum(1).mean() / neighbours, is_inside.any(0).mean()


def assert_equals_numpy(real, fake, k=3):
    """Equal counts, so the figures are equal to the rounding of one division."""
    assert precision_and_recall(real, fake, neighbours=k) == pytest.approx(
        precision_and_recall_by_numpy(real, fake, k), rel=1e-14
    )
    assert density_and_coverage(real, fake, neighbours=k) == pytest.approx(
        density_and_coverage_by_numpy(real, fake, k), rel=1e-14
    )


# Beside and across the chunks of 512 rows and 2,048 columns.
@pytest.mark.parametrize("counts", [(6, 6), (513, 2049), (2100, 40)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_figures_equal_numpy(counts, k):
    real, fake = random_features(counts[0], 6, 1), random_features(counts[1], 6, 2, shift=0.7)
    assert_equals_numpy(real, fake, k)


def test_distances_of_a_reference_may_be_given():
    real, fake = random_features(300, 6, 1), random_features(200, 6, 2, shift=0.7)
    known = neighbour_distances(real)
    assert known.shape == (300, 5)
    for figure in (precision_and_recall, density_and_coverage):
        assert figure(real, fake, real_distances=known) == figure(real, fake)


def test_integer_lattices_where_most_distances_are_ties_equal_numpy():
    axis = torch.arange(5.0)
    lattice = torch.cartesian_prod(axis, axis, axis)
    assert_equals_numpy(lattice, lattice)
    assert_equals_numpy(lattice, lattice[::2] + torch.tensor([0.5, 0.0, 0.0]))
    # Far from the origin, products alone would lose the distances.
    assert_equals_numpy(lattice + 3e6, lattice[::2] + torch.tensor([3e6 + 0.5, 3e6, 3e6]))


def test_fakes_at_a_rounding_error_from_a_radius_equal_numpy():
    """Each fake is a real sample's third neighbour, or at 1 of 2^49 from it in squared distance.
    Integers, so that NumPy's sums are exact; those of products would err by several."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(-(2**21), 2**21, (400, 30), generator=generator).double()
    real[:, 0] = torch.randint(0, 2, (400,), generator=generator)
    fake = real[np.argsort(distances_by_numpy(real, real), axis=1)[:, 3]]
    fake[:, 0] += torch.randint(-1, 2, (400,), generator=generator)
    assert_equals_numpy(real, fake)


def test_copies_of_the_reference_are_precise_and_cover_it():
    real = random_features(700, 40, 1) + 100
    fake = real[torch.randperm(700, generator=torch.Generator().manual_seed(0))]
    assert precision_and_recall(real, fake) == (1, 1)
    # Each ball holds its centre and the k - 1 nearest; the k-th is on its surface.
    assert density_and_coverage(real, fake) == (1, 1)


def test_a_collapse_is_precise_but_covers_one_neighbourhood():
    real = random_features(500, 8, 1)
    fake = real[:1].repeat(300, 1)
    precision, recall = precision_and_recall(real, fake)
    assert (precision, recall) == (1, 1 / 500)
    assert density_and_coverage(real, fake)[1] < 0.1
    assert_equals_numpy(real, fake)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dim=st.integers(1, 5), count=st.integers(4, 30))
def test_figures_turn_with_small_integer_features(seed, dim, count):
    """Many equal samples and ties; swapped axes and signs keep every sum of squares exact."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randint(-2, 3, (2, count, dim), generator=generator).float()
    assert_equals_numpy(real, fake)
    for figure in (precision_and_recall, density_and_coverage):
        turned = figure(-real.flip(1), -fake.flip(1), neighbours=3)
        assert turned == figure(real, fake, neighbours=3)


def test_bad_features_are_a_users_error():
    good = random_features(9, 4, 1)
    bad = good.clone()
    bad[3, 2] = float("nan")
    for real, fake, sentence in [
        (good[:3], good, "radius of 3 neighbours needs 4 samples or more, not 3"),
        (good, good[:3], "radius of 3 neighbours needs 4 samples or more, not 3"),
        (bad, good, "NaN or infinite"),
        (good, bad, "NaN or infinite"),
        (good, random_features(9, 5, 1), "4 dimensions, the samples of 5"),
    ]:
        for figure in (precision_and_recall, density_and_coverage):
            with pytest.raises(UserError, match=sentence):
                figure(real, fake, neighbours=3)
