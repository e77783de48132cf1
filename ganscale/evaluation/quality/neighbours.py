"""Precision, recall, density and coverage: which samples lie among the neighbours of others.

All ranks hold all features, (count, dim) of any float type, and share the work. Distances are as
exact as differences in float64: products give them to a rounding error, and those that differ by
less from the radius they are compared with are computed again. So results do not depend on the
number of ranks, and a copy of a sample is exactly as far from others as the sample.

Beside the features, memory holds blocks of 512 x 2,048 distances and their features: about
60,000 dim + 80 million bytes, and 100 bytes per sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ganscale.evaluation.quality.feature_sets import check_feature_sets, check_features
from ganscale.evaluation.work_share import WorkShare

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5

_ROWS = 512
_COLUMNS = 2048
_EXACT_PAIRS = 256

_SPARE_CANDIDATES = 8
"""Neighbours beyond those needed whose distances are computed again, as rounding may swap them."""


def neighbour_distances(
    features: Float[Tensor, "count dim"],
    share: WorkShare = WorkShare(),
    neighbours: int = DENSITY_NEIGHBOURS,
) -> Float64[Tensor, "count neighbours"]:
    """The squared distances of each sample to its nearest others, ascending; equal on all ranks.

    Takes 2 dim count^2 floating-point operations. A reference needs it only once, with as many
    neighbours as any figure uses.

    Raises UserError for fewer than neighbours + 1 samples, and for NaN or infinite features.
    """
    check_features(features, neighbours + 1, f"a radius of {neighbours} neighbours")
    candidates = min(neighbours + _SPARE_CANDIDATES, len(features) - 1)
    nearest = torch.zeros(len(features), neighbours, dtype=torch.float64, device=features.device)
    for rows in share.rounds(len(features), _ROWS):
        if not rows:
            continue
        found = torch.full((len(rows), candidates), torch.inf, device=nearest.device).double()
        indices = torch.zeros_like(found, dtype=torch.int64)
        for block in _blocks(features, rows, features):
            block.squared.diagonal(rows.start - block.columns.start).fill_(torch.inf)
            found = torch.cat([found, block.squared], dim=1)
            columns = torch.arange(block.columns.start, block.columns.stop, device=found.device)
            indices = torch.cat([indices, columns.expand(len(rows), -1)], dim=1)
            found, positions = found.topk(candidates, largest=False)
            indices = indices.gather(1, positions)
        own = torch.arange(rows.start, rows.stop, device=found.device).repeat_interleave(candidates)
        exact = _exact(features, own, features, indices.flatten()).view_as(found)
        nearest[rows.start : rows.stop] = exact.sort(dim=1).values[:, :neighbours]
    return share.sum(nearest)


def precision_and_recall(
    real: Float[Tensor, "real_count real_dim"],
    fake: Float[Tensor, "fake_count fake_dim"],
    share: WorkShare = WorkShare(),
    real_distances: Float64[Tensor, "real_count neighbours"] | None = None,
    neighbours: int = PRECISION_NEIGHBOURS,
) -> tuple[float, float]:
    """The share of fakes within a real sample's radius, and of real samples within a fake's.

    Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative models"
    (arXiv:1904.06991), equations 1 and 2: a radius is the distance to the k-th nearest neighbour of
    the same set, 3 as published, and the ball includes its surface.

    real_distances: `neighbour_distances(real)`, where they are known already, of at least
        `neighbours` neighbours

    Takes 2 dim (real_count^2 + fake_count^2 + real_count fake_count) floating-point operations, the
    first of them only without `real_distances`.

    Raises UserError for fewer than neighbours + 1 samples, other dimensions, and NaN features.
    """
    real_radii = _radii(real, fake, share, real_distances, neighbours)
    fake_radii = neighbour_distances(fake, share, neighbours)[:, -1]
    is_fake_inside = torch.zeros_like(fake_radii)
    is_real_inside = torch.zeros_like(real_radii)
    for rows in share.rounds(len(fake), _ROWS):
        for block in _blocks(fake, rows, real):
            of_real = block.compare(real_radii[None, block.columns_slice], closed=True)
            of_fake = block.compare(fake_radii[block.rows_slice, None], closed=True)
            is_fake_inside[block.rows_slice] += of_real.any(dim=1)
            is_real_inside[block.columns_slice] += of_fake.any(dim=0)
    inside = [share.sum(counts) > 0 for counts in (is_fake_inside, is_real_inside)]
    return inside[0].double().mean().item(), inside[1].double().mean().item()


def density_and_coverage(
    real: Float[Tensor, "real_count real_dim"],
    fake: Float[Tensor, "fake_count fake_dim"],
    share: WorkShare = WorkShare(),
    real_distances: Float64[Tensor, "real_count neighbours"] | None = None,
    neighbours: int = DENSITY_NEIGHBOURS,
) -> tuple[float, float]:
    """How many real samples' radii a fake lies within on average, divided by k; and the share of
    real samples with a fake within their radius.

    Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models"
    (arXiv:2002.09797), section 3: the radius is the distance to the k-th nearest real
    neighbour, 5 as published; the ball does not include its surface, as in the authors' `prdc`.

    real_distances: as for `precision_and_recall`

    Takes 2 dim (real_count^2 + real_count fake_count) floating-point operations, the first of them
    only without `real_distances`.

    Raises UserError for fewer than neighbours + 1 samples, other dimensions, and NaN features.
    """
    radii = _radii(real, fake, share, real_distances, neighbours)
    fakes_inside = torch.zeros_like(radii)
    for rows in share.rounds(len(fake), _ROWS):
        for block in _blocks(fake, rows, real):
            is_inside = block.compare(radii[None, block.columns_slice], closed=False)
            fakes_inside[block.columns_slice] += is_inside.sum(dim=0)
    fakes_inside = share.sum(fakes_inside)
    density = fakes_inside.sum().item() / (neighbours * len(fake))
    return density, (fakes_inside > 0).double().mean().item()


def _radii(
    real: Tensor, fake: Tensor, share: WorkShare, real_distances: Tensor | None, neighbours: int
) -> Float64[Tensor, " real_count"]:
    """Squared, of the real samples."""
    check_feature_sets(real, fake, neighbours + 1, f"a radius of {neighbours} neighbours")
    if real_distances is None:
        real_distances = neighbour_distances(real, share, neighbours)
    return real_distances[:, neighbours - 1]


@dataclass(frozen=True)
class _Block:
    """Squared distances of points[rows] to others[columns], to within `rounding`."""

    points: Tensor
    others: Tensor
    rows: range
    columns: range
    squared: Float64[Tensor, "rows columns"]
    rounding: Float64[Tensor, ""]

    @property
    def rows_slice(self) -> slice:
        return slice(self.rows.start, self.rows.stop)

    @property
    def columns_slice(self) -> slice:
        return slice(self.columns.start, self.columns.stop)

    def compare(self, radii: Float64[Tensor, "..."], closed: bool) -> Bool[Tensor, "rows columns"]:
        """Whether the exact squared distance is below the squared radius, or, if closed, equal."""
        gap = self.squared - radii
        is_inside = gap < 0
        row, column = (gap.abs_() <= self.rounding).nonzero(as_tuple=True)
        if len(row):
            exact = _exact(
                self.points, row + self.rows.start, self.others, column + self.columns.start
            )
            radius = radii.expand_as(gap)[row, column]
            is_inside[row, column] = exact <= radius if closed else exact < radius
        return is_inside


def _blocks(points: Tensor, rows: range, others: Tensor) -> Iterator[_Block]:
    """The distances of points[rows] to all others."""
    if not rows:
        return
    # Products of small norms round less, so all are relative to a sample.
    origin = others[0].double()
    own = points[rows.start : rows.stop] - origin
    own_norms = own.square().sum(dim=1, keepdim=True)
    for start in range(0, len(others), _COLUMNS):
        columns = range(start, min(start + _COLUMNS, len(others)))
        block = others[columns.start : columns.stop] - origin
        norms = block.square().sum(dim=1)
        squared = torch.addmm(norms, own, block.T, alpha=-2).add_(own_norms)
        # A sum of n products errs by n times the rounding of one at most.
        relative = (points.shape[1] + 16) * torch.finfo(torch.float64).eps
        rounding = relative * 2 * (own_norms.max() + norms.max())
        yield _Block(points, others, rows, columns, squared, rounding)


def _exact(
    points: Tensor, rows: Tensor, others: Tensor, columns: Tensor
) -> Float64[Tensor, " pairs"]:
    """Squared distances of points[rows] to others[columns], pair by pair, from differences."""
    parts = zip(rows.split(_EXACT_PAIRS), columns.split(_EXACT_PAIRS), strict=True)
    return torch.cat(
        [(points[r].double() - others[c].double()).square().sum(dim=1) for r, c in parts]
    )
