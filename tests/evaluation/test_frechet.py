import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from ganscale.errors import UserError
from ganscale.evaluation.quality.frechet import (
    GaussianStatistics,
    Moments,
    frechet_distance,
    frechet_distance_of_components,
    too_few_samples,
)


def random_features(count, dim, seed, decay=2.0):
    """Correlated, with deviations from 1 down to 10^-decay."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    deviations = torch.logspace(0, -decay, dim, dtype=torch.float64)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return rows * deviations @ turn + 0.1 * seed


def statistics_of(features):
    """By NumPy."""
    covariance = np.atleast_2d(np.cov(features.numpy(), rowvar=False))
    return GaussianStatistics(features.mean(dim=0), torch.from_numpy(covariance), len(features))


def distance_by_features(real, fake):
    """The trace of the root as the nuclear norm of the product of the centred features: exact to
    rounding for any rank, as no root of an eigenvalue is taken."""
    real, fake = real.numpy(), fake.numpy()
    centred = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (real, fake)]
    trace_of_root = np.linalg.norm(centred[0] @ centred[1].T, "nuc")
    squares = sum((rows**2).sum() for rows in centred)
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + squares - 2 * trace_of_root


def distance_by_product(a, b):
    """Of the eigenvalues of the non-symmetric product, which take complex arithmetic."""
    eigenvalues = np.linalg.eigvals(a.covariance.numpy() @ b.covariance.numpy())
    traces = a.covariance.trace() + b.covariance.trace()
    root = np.sqrt(eigenvalues.astype(complex)).sum().real
    return float((a.mean - b.mean).square().sum() + traces - 2 * root)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.1], [0.5, 3.0, 4.0]], dtype=torch.float64)
    a = GaussianStatistics(torch.zeros(3, dtype=torch.float64), deviations[0].square().diag())
    b = GaussianStatistics(mean, deviations[1].square().diag())
    expected = mean.square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_distance_equals_torchmetrics_and_the_eigenvalues_of_the_product():
    a, b = (statistics_of(random_features(500, 96, seed)) for seed in (1, 2))
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(distance_by_product(a, b), rel=1e-8)
    theirs = _compute_fid(a.mean, a.covariance, b.mean, b.covariance)
    assert distance == pytest.approx(theirs.item(), rel=1e-8)


def test_streamed_features_have_the_fid_of_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 32

        def forward(self, features):
            return features

    real, fake = random_features(300, 32, 1), random_features(250, 32, 2)
    fid = FrechetInceptionDistance(feature=Identity(), input_img_size=(1, 1, 32))
    fid.set_dtype(torch.float64)
    moments = Moments(32), Moments(32)
    for features, ours, is_real in ((real, moments[0], True), (fake, moments[1], False)):
        for batch in features.split(64):
            fid.update(batch, real=is_real)
            ours.add(batch)
    distance = frechet_distance(*(ours.statistics() for ours in moments))
    assert distance == pytest.approx(fid.compute().item(), rel=1e-8)


@pytest.mark.parametrize(("real_count", "fake_count"), [(400, 40), (40, 400), (40, 30), (2, 2)])
def test_singular_covariances_have_the_distance_of_their_features(real_count, fake_count):
    real, fake = random_features(real_count, 128, 1), random_features(fake_count, 128, 2)
    distance = frechet_distance(statistics_of(real), statistics_of(fake))
    assert distance == pytest.approx(distance_by_features(real, fake), rel=1e-10)


def test_features_that_are_always_zero_change_nothing():
    real, fake = random_features(200, 24, 1), random_features(200, 24, 2)
    distance = frechet_distance(statistics_of(real), statistics_of(fake))
    zeros = torch.zeros(200, 24, dtype=torch.float64)
    wider = [statistics_of(torch.cat([zeros, rows], dim=1)) for rows in (real, fake)]
    assert frechet_distance(*wider) == pytest.approx(distance, rel=1e-9)


def test_identical_samples_have_the_distance_of_a_point():
    real = statistics_of(random_features(200, 16, 1))
    collapsed = Moments(16)
    collapsed.add(torch.full((50, 16), 0.3))
    expected = (real.mean - torch.tensor(0.3).double()).square().sum() + real.covariance.trace()
    for pair in ((real, collapsed.statistics()), (collapsed.statistics(), real)):
        assert frechet_distance(*pair) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(collapsed.statistics(), collapsed.statistics()) == 0
    with pytest.raises(UserError, match="all equal"):
        frechet_distance_of_components(collapsed.statistics(), real)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dim=st.integers(1, 24),
    counts=st.tuples(st.integers(2, 60), st.integers(2, 60)),
)
def test_distance_is_a_distance_and_turns_with_the_features(seed, dim, counts):
    real, fake = random_features(counts[0], dim, seed), random_features(counts[1], dim, seed + 1)
    a, b = statistics_of(real), statistics_of(fake)
    scale = float(a.covariance.trace() + b.covariance.trace()) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9 * scale)
    turn, _ = torch.linalg.qr(random_features(dim, dim, seed))
    turned = frechet_distance(statistics_of(real @ turn), statistics_of(fake @ turn))
    assert turned == pytest.approx(frechet_distance(a, b), abs=1e-9 * scale)


def test_distance_of_components_is_that_of_the_projected_features():
    real, fake = random_features(300, 40, 1), random_features(300, 40, 2)
    _, _, rows = np.linalg.svd((real - real.mean(0)).numpy(), full_matrices=False)
    projection = torch.from_numpy(rows[:8].T.copy())
    expected = distance_by_features(real @ projection, fake @ projection)
    a, b = statistics_of(real), statistics_of(fake)
    assert frechet_distance_of_components(a, b, 8) == pytest.approx(expected, rel=1e-9)
    everything = frechet_distance_of_components(a, b, 1000)
    assert everything == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_distance_of_components_hardly_depends_on_the_number_of_samples():
    features = random_features(7000, 256, 1, decay=1.0)
    reference, few, many = (
        statistics_of(rows) for rows in (features[:3000], features[3000:3400], features[3000:])
    )
    growth = [
        distance(reference, few) - distance(reference, many)
        for distance in (frechet_distance, frechet_distance_of_components)
    ]
    assert growth[1] < growth[0] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_exact_where_the_mean_is_a_million_times_the_deviation(dtype):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    features = (1e4 + 1e-2 * noise).to(dtype)
    moments = Moments(6)
    for batch in features.split(7):
        moments.add(batch)
    statistics = moments.statistics()
    expected = np.cov((features.double() - 1e4).numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-10, atol=1e-16)
    np.testing.assert_allclose(statistics.mean, features.double().mean(0), rtol=1e-14)
    assert statistics.count == 2000


def test_moments_do_not_depend_on_the_batch_and_keep_no_view_of_it():
    features = random_features(1100, 12, 3)
    whole = Moments(12)
    whole.add(features)
    batches, buffer = Moments(12), torch.empty(16, 12, dtype=torch.float64)
    for batch in features.split(16):
        reused = buffer[: len(batch)].copy_(batch)
        batches.add(reused)
    ours, theirs = batches.statistics(), whole.statistics()
    torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_a_users_error(value):
    moments = Moments(3)
    moments.add(torch.ones(5, 3))
    moments.add(torch.full((1, 3), value))
    with pytest.raises(UserError, match="NaN or infinite"):
        moments.statistics()


def test_too_few_samples_and_other_dimensions_are_a_users_error():
    moments = Moments(3)
    with pytest.raises(UserError, match="2 samples or more, not 0"):
        moments.statistics()
    moments.add(torch.ones(1, 3))
    with pytest.raises(UserError, match="2 samples or more, not 1"):
        moments.statistics()
    a, b = (statistics_of(random_features(9, dim, 1)) for dim in (3, 4))
    for distance in (frechet_distance, frechet_distance_of_components):
        with pytest.raises(UserError, match="3 dimensions, the samples of 4"):
            distance(a, b)


def test_a_singular_covariance_is_warned_of_with_a_count_that_would_do():
    warning = too_few_samples(1280, 1280)
    assert warning is not None
    assert "1,280 samples are too few" in warning
    assert "6,400" in warning
    assert too_few_samples(1281, 1280) is None
