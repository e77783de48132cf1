"""The kernel distance between two sets of features: their squared maximum mean discrepancy.

With the features of the 2015 Inception network it is KID: Binkowski et al. 2018, "Demystifying MMD
GANs" (arXiv:1801.01401). The estimate is unbiased, so it does not depend on the number of samples,
and may be slightly below 0.

All ranks hold all features and share the work. Products and sums are in float64: the distance of
good samples is a thousandth of the terms that it is the difference of.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ganscale.evaluation.quality.feature_sets import check_feature_sets, check_features
from ganscale.evaluation.work_share import WorkShare
from ganscale.randomness import permutation

SUBSETS = 100
SUBSET_SIZE = 1000

_ROWS = 256
_COLUMNS = 2048
_PURPOSE = "a kernel distance"


def kernel_distance(
    real: Float[Tensor, "real_count real_dim"],
    fake: Float[Tensor, "fake_count fake_dim"],
    share: WorkShare = WorkShare(),
    real_term: float | None = None,
) -> float:
    """The unbiased estimate from all samples: Gretton et al. 2012, "A kernel two-sample test" (JMLR
    13), equation 3, with KID's kernel k(x, y) = (x.y / dim + 1)^3.

    mean over i != j of k(x_i, x_j) + the same of y - 2 mean k(x_i, y_j)

    real_term: `mean_kernel(real)`, where it is known already

    Takes dim (real_count^2 + fake_count^2 + 2 real_count fake_count) floating-point operations,
    the first of them only without `real_term`, and 30,000 dim + 15 million bytes of memory.

    Raises UserError for fewer than 2 samples, other dimensions, and features that are NaN.
    """
    check_feature_sets(real, fake, 2, _PURPOSE)
    if real_term is None:
        real_term = mean_kernel(real, share)
    total = real.new_zeros((), dtype=torch.float64)
    for rows in share.rounds(len(real), _ROWS):
        total += _kernel_sum(_part(real, rows), fake)
    cross_term = share.sum(total).item() / (len(real) * len(fake))
    return real_term + mean_kernel(fake, share) - 2 * cross_term


def mean_kernel(features: Float[Tensor, "count dim"], share: WorkShare = WorkShare()) -> float:
    """The mean of k(x_i, x_j) over all i != j, which a reference needs only once."""
    check_features(features, 2, _PURPOSE)
    total = features.new_zeros((), dtype=torch.float64)
    for rows in share.rounds(len(features), _ROWS):
        if rows:
            own = _part(features, rows)
            diagonal = (own.square().sum(dim=1) / own.shape[1] + 1).pow(3).sum()
            # Each pair of different chunks once, which counts twice.
            total += _kernel_sum(own, own) - diagonal
            total += 2 * _kernel_sum(own, features[rows.stop :])
    return share.sum(total).item() / (len(features) * (len(features) - 1))


def kernel_distance_of_subsets(
    real: Float[Tensor, "real_count real_dim"],
    fake: Float[Tensor, "fake_count fake_dim"],
    seed: int,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    share: WorkShare = WorkShare(),
) -> tuple[float, float]:
    """Mean and standard deviation of the estimate over random subsets of both, as papers give it.

    Each draws `size` samples of each set without repetition (all of a set, if it has fewer), by
    `seed`. The deviation is that of the population, as torchmetrics and torch-fidelity have it.

    Raises UserError as `kernel_distance`.
    """
    check_feature_sets(real, fake, 2, _PURPOSE)
    size = min(size, len(real), len(fake))
    distances = torch.zeros(subsets, dtype=torch.float64, device=real.device)
    for numbers in share.rounds(subsets, 1):
        for number in numbers:
            real_subset = _random_rows(real, seed, "kernel distance: real", number, size)
            fake_subset = _random_rows(fake, seed, "kernel distance: fake", number, size)
            distances[number] = kernel_distance(real_subset, fake_subset)
    distances = share.sum(distances)
    return distances.mean().item(), distances.std(correction=0).item()


def _random_rows(features: Tensor, seed: int, purpose: str, number: int, size: int) -> Tensor:
    rows = permutation(seed, purpose, (number, 0, 0), len(features))[:size]
    return features[torch.from_numpy(rows).to(features.device)]


def _part(features: Tensor, rows: range) -> Tensor:
    return features[rows.start : rows.stop].double()


def _kernel_sum(rows: Tensor, columns: Tensor) -> Tensor:
    """The sum of the kernel over all pairs; `rows` are of float64."""
    total = rows.new_zeros(())
    one = rows.new_ones(())
    for block in columns.split(_COLUMNS):
        kernel = torch.addmm(one, rows, block.double().T, alpha=1 / rows.shape[1]).flatten()
        total += torch.dot(kernel.square(), kernel)
    return total
