"""The Frechet distance between two sets of features, each taken for a Gaussian.

With the features of the 2015 Inception network it is FID: Heusel et al. 2017, "GANs trained by a
two time-scale update rule converge to a local Nash equilibrium" (arXiv:1706.08500).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ganscale.errors import UserError
from ganscale.evaluation.work_share import WorkShare

MAIN_COMPONENTS = 64

_PANEL_COLUMNS = 160
_BLOCK_ROWS = 512
"""Small batches are gathered to this many rows: each sum of products reads and writes a matrix of
dim x dim, which takes longer than the products of a batch of 16."""

_SAMPLES_PER_FEATURE = 5
"""The authors of FID advise 10,000 samples or more for its 2,048 features."""


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of a set of features, in float64 on the CPU.

    covariance: normalized by count - 1
    count: the number of samples; None where a file of statistics does not say
    """

    mean: Float64[Tensor, " dim"]
    covariance: Float64[Tensor, "dim dim"]
    count: int | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def components(self) -> tuple[Float64[Tensor, " rank"], Float64[Tensor, "dim rank"]]:
        """The variances along the principal components, ascending, and these as unit columns;
        without those whose variance is rounding. Computed once per object."""
        variances, directions = torch.linalg.eigh(self.covariance)
        rounding = self.dim * torch.finfo(torch.float64).eps * variances[-1]
        rank = int((variances > rounding).sum())
        return variances[self.dim - rank :], directions[:, self.dim - rank :]

    def projected(self, directions: Float64[Tensor, "dim components"]) -> "GaussianStatistics":
        """The statistics of the features' coordinates along `directions`."""
        return GaussianStatistics(
            directions.T @ self.mean, directions.T @ self.covariance @ directions, self.count
        )


class Moments:
    """Running count, mean and covariance of features, summed in float64 on a device.

    Memory does not grow with the number of samples. The features are shifted by the mean of the
    first ones, so a mean much larger than the deviations costs no digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self._count = 0
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0
        self._shift = torch.zeros(dim, dtype=torch.float64, device=device)
        self._sum = torch.zeros_like(self._shift)
        self._products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "batch dim"]) -> None:
        """The features are copied, so their memory may be reused."""
        self._waiting.append(features.detach().to(self._shift.device, torch.float64, copy=True))
        self._waiting_rows += len(features)
        if self._waiting_rows >= _BLOCK_ROWS:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting_rows:
            return
        rows = torch.cat(self._waiting)
        if not self._count:
            self._shift = rows.mean(dim=0)
        rows -= self._shift
        self._sum += rows.sum(dim=0)
        # The matrix is symmetric: its panels on and right of the diagonal take half the work.
        for first in range(0, rows.shape[1], _PANEL_COLUMNS):
            panel = slice(first, first + _PANEL_COLUMNS)
            self._products[panel, first:].addmm_(rows[:, panel].T, rows[:, first:])
        self._count += len(rows)
        self._waiting, self._waiting_rows = [], 0

    def statistics(self, share: WorkShare = WorkShare()) -> GaussianStatistics:
        """The statistics of the features of all ranks, equal on each. Every rank calls this.

        Raises UserError for fewer than two samples, and for features that are NaN or infinite.
        """
        self._add_waiting()
        own_count = self._sum.new_tensor(float(self._count))
        total = share.sum(torch.cat([own_count[None], own_count * self._shift + self._sum]))
        count = int(total[0])
        if count < 2:
            raise UserError(f"a covariance needs 2 samples or more, not {count}")
        mean = total[1:] / count
        # The ranks' shifts differ: each moves its sums to the common mean before they are added.
        step = mean - self._shift
        cross = torch.outer(self._sum, step)
        symmetric = self._products.triu() + self._products.triu(1).T
        own_products = symmetric - cross - cross.T + own_count * torch.outer(step, step)
        products = share.sum(own_products)
        if not (mean.isfinite().all() and products.isfinite().all()):
            raise UserError(f"features of the {count:,} samples are NaN or infinite")
        covariance = (products + products.T) / (2 * (count - 1))
        return GaussianStatistics(mean.cpu(), covariance.cpu(), count)


def frechet_distance(reference: GaussianStatistics, other: GaussianStatistics) -> float:
    """The squared Frechet distance, 0 or more: Heusel et al. 2017, equation 6.

    d^2 = |m_r - m_o|^2 + tr(S_r + S_o - 2 (S_r S_o)^(1/2)). With S_r = F F^T, the trace of the
    root is the sum of the roots of the eigenvalues of F^T S_o F, which is symmetric: so there is
    no complex number, and a singular covariance does no harm. F comes from the reference's
    `components`; a reference that is used again costs two products and eigenvalues of dim x dim.

    Raises UserError if the dimensions differ.
    """
    _check_dimensions(reference, other)
    variances, directions = reference.components
    factor = directions * variances.sqrt()
    eigenvalues = torch.linalg.eigvalsh(factor.T @ other.covariance @ factor)
    # Beyond the rank there are zeros. Rounded to 1e-16 each, their roots would add up.
    rank = len(variances) if other.count is None else min(len(variances), other.count - 1)
    trace_of_root = eigenvalues[len(variances) - rank :].clamp_min(0).sqrt().sum()
    traces = reference.covariance.trace() + other.covariance.trace()
    distance = (reference.mean - other.mean).square().sum() + traces - 2 * trace_of_root
    return max(0.0, float(distance))


def frechet_distance_of_components(
    reference: GaussianStatistics, other: GaussianStatistics, components: int = MAIN_COMPONENTS
) -> float:
    """The Frechet distance along the reference's `components` main components, or its rank if
    that is lower. A covariance of few dimensions needs few samples, so unlike FID it hardly
    depends on their number.

    Raises UserError if the dimensions differ, and if all samples of the reference are equal.
    """
    _check_dimensions(reference, other)
    directions = reference.components[1][:, -components:]
    if not directions.numel():
        raise UserError("the reference's samples are all equal, so it has no components")
    return frechet_distance(reference.projected(directions), other.projected(directions))


def _check_dimensions(reference: GaussianStatistics, other: GaussianStatistics) -> None:
    if reference.dim != other.dim:
        raise UserError(
            f"the reference has features of {reference.dim:,} dimensions, the samples of "
            f"{other.dim:,}: they are of different feature networks"
        )


def too_few_samples(count: int, dim: int) -> str | None:
    """A warning if the covariance of `count` samples is singular, so that the Frechet distance
    measures mostly their number."""
    if count > dim:
        return None
    return (
        f"{count:,} samples are too few for a Fréchet distance of {dim:,} features, whose "
        f"covariance is then singular: take {_SAMPLES_PER_FEATURE * dim:,}, or a kernel distance"
    )
