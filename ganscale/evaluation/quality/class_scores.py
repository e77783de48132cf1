"""Figures from a classifier's probabilities: the Inception Score, modes covered, and the divergence
of the classes from the reference's."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Num
from torch import Tensor

from ganscale.errors import UserError
from ganscale.evaluation.work_share import WorkShare

SPLITS = 10

_ROUNDING = 1e-3
"""Of a row's sum; probabilities in bfloat16 stay below it."""


@dataclass(frozen=True)
class ClassScores:
    """inception_score, deviation: mean and standard deviation (of the population, as published)
        over the splits
    histogram: how many samples are classified as each class, on the CPU
    """

    inception_score: float
    deviation: float
    histogram: Int64[Tensor, " classes"]

    @property
    def modes_covered(self) -> int:
        """The classes that one sample or more is classified as: Srivastava et al. 2017, "VEEGAN"
        (arXiv:1705.07761), section 4; for StackedMNIST, of 26,000 samples and 1,000 classes."""
        return int((self.histogram > 0).sum())


class ClassSums:
    """Running sums, in float64 on a device, from which `ClassScores` follow; 8 splits x classes
    bytes, however many samples there are.

    samples: how many there will be on all ranks; their positions decide on their split
    """

    def __init__(
        self,
        classes: int,
        samples: int,
        splits: int = SPLITS,
        device: torch.device | str = "cpu",
    ) -> None:
        if samples < splits:
            raise UserError(
                f"an Inception Score of {splits} splits needs {splits} samples or more, "
                f"not {samples}"
            )
        starts = [number * samples // splits for number in range(1, splits)]
        self._later_starts = torch.tensor(starts, dtype=torch.int64, device=device)
        zeros = torch.zeros(splits, dtype=torch.float64, device=device)
        self._counts, self._log_sums = zeros, zeros.clone()
        self._sums = zeros[:, None].repeat(1, classes)
        self._histogram = torch.zeros_like(self._sums[0])
        self._bad_rows = zeros.new_zeros(())

    def add(
        self, probabilities: Float[Tensor, "batch classes"], positions: Int64[Tensor, " batch"]
    ) -> None:
        """positions: of the samples in [0, samples), in the order in which they count"""
        rows = probabilities.detach().to(self._sums)
        split = torch.bucketize(positions.to(rows.device), self._later_starts, right=True)
        ones = rows.new_ones(len(rows))
        self._counts.index_add_(0, split, ones)
        self._log_sums.index_add_(0, split, torch.xlogy(rows, rows).sum(dim=1))
        self._sums.index_add_(0, split, rows)
        self._histogram.index_add_(0, rows.argmax(dim=1), ones)
        is_good = (rows.sum(dim=1) - 1).abs().le(_ROUNDING) & rows.ge(0).all(dim=1)
        self._bad_rows += (~is_good).sum()

    def scores(self, share: WorkShare = WorkShare()) -> ClassScores:
        """The scores of the samples of all ranks, equal on each. Every rank calls this.

        Salimans et al. 2016, "Improved techniques for training GANs" (arXiv:1606.03498), section 4:
        exp(E_x KL(p(y|x) || p(y))), for each of the splits by position; 10 as published. Since
        E_x KL = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y), sums are enough.

        Raises UserError for rows that are not probabilities, as NaN is not.
        """
        parts = [self._bad_rows[None], self._counts, self._log_sums, self._histogram]
        sizes = [len(part) for part in parts]
        bad_rows, counts, log_sums, histogram = share.sum(torch.cat(parts)).split(sizes)
        sums = share.sum(self._sums)
        if bad_rows.item():
            raise UserError(
                f"for {int(bad_rows):,} of {int(counts.sum()):,} images, the classifier's outputs "
                "are not probabilities, which are 0 or more and add up to 1"
            )
        if not counts.all():
            raise UserError("a split of the Inception Score has no samples")
        marginals = sums / counts[:, None]
        divergences = log_sums / counts - torch.xlogy(marginals, marginals).sum(dim=1)
        scores = divergences.exp()
        return ClassScores(
            scores.mean().item(), scores.std(correction=0).item(), histogram.long().cpu()
        )


def class_divergence(
    histogram: Num[Tensor, " classes"], reference: Num[Tensor, " reference_classes"]
) -> float:
    """KL(generated || reference) of two histograms of classes, in nats.

    The direction of the StackedMNIST tables: Metz et al. 2017, "Unrolled GANs" (arXiv:1611.02163),
    VEEGAN, and Lin et al. 2018, "PacGAN" (arXiv:1712.04086), which calls it the reverse KL.
    Infinite if a class is generated that the reference lacks.

    Raises UserError if one has no samples, or they are of different numbers of classes.
    """
    if len(histogram) != len(reference):
        raise UserError(
            f"the reference has {len(reference):,} classes, the samples {len(histogram):,}: they "
            "are of different classifiers"
        )
    generated, real = (_shares(counts) for counts in (histogram, reference))
    return (torch.xlogy(generated, generated) - torch.xlogy(generated, real)).sum().item()


def _shares(histogram: Tensor) -> Float64[Tensor, " classes"]:
    total = histogram.sum(dtype=torch.float64)
    if not total > 0:
        raise UserError("a divergence of classes needs one sample or more, not 0")
    return histogram.double() / total
