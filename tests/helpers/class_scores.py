"""The scores of probabilities that are all there at once."""

import torch
from torch import Tensor

from ganscale.evaluation.quality.class_scores import SPLITS, ClassScores, ClassSums


def class_scores(probabilities: Tensor, splits: int = SPLITS) -> ClassScores:
    """Of samples in the order of their positions."""
    samples, classes = probabilities.shape
    sums = ClassSums(classes, samples, splits)
    sums.add(probabilities, torch.arange(samples))
    return sums.scores()
