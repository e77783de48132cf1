"""What each rank of test_quality_ranks.py computes, each holding all features."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ganscale.evaluation.quality.class_scores import ClassSums, class_divergence
from ganscale.evaluation.quality.frechet import (
    Moments,
    frechet_distance,
    frechet_distance_of_components,
)
from ganscale.evaluation.quality.kernel_distance import kernel_distance, kernel_distance_of_subsets
from ganscale.evaluation.quality.neighbours import density_and_coverage, precision_and_recall
from ganscale.evaluation.work_share import WorkShare

DIM = 70  # more than the main components
COUNTS = {
    "full rank": (2700, 1100),
    "singular": (60, 50),
    "fewer samples than ranks' chunks": (9, 8),
}


def features_of(count: int, seed: int) -> Tensor:
    """float32, whose mean is a thousand deviations."""
    generator = torch.Generator().manual_seed(seed)
    return 100 + 0.1 * (1 + 0.05 * seed) * torch.randn(count, DIM, generator=generator)


def figures(share: WorkShare, counts: tuple[int, int], batch: int) -> dict[str, float]:
    real, fake = (features_of(count, seed) for seed, count in enumerate(counts))
    statistics = []
    for features in (real, fake):
        moments = Moments(DIM)
        for number, rows in enumerate(features.split(batch)):
            if number % share.world_size == share.rank:
                moments.add(rows)
        statistics.append(moments.statistics(share))
    logits = (fake - 100) * 30
    sums = ClassSums(DIM, len(fake), splits=4)
    for number, positions in enumerate(torch.arange(len(fake)).split(batch)):
        if number % share.world_size == share.rank:
            sums.add(logits[positions].softmax(dim=1), positions)
    scores = sums.scores(share)
    kid, kid_deviation = kernel_distance_of_subsets(real, fake, 0, subsets=7, size=200, share=share)
    precision, recall = precision_and_recall(real, fake, share)
    density, coverage = density_and_coverage(real, fake, share)
    return {
        "frechet": frechet_distance(*statistics),
        "frechet, components": frechet_distance_of_components(*statistics),
        "kernel": kernel_distance(real, fake, share),
        "kernel, subsets": kid,
        "kernel, deviation": kid_deviation,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "inception score": scores.inception_score,
        "inception score, deviation": scores.deviation,
        "modes": scores.modes_covered,
        "divergence": class_divergence(scores.histogram, torch.ones(DIM)),
    }


def all_figures(share: WorkShare, batch: int) -> dict[str, dict[str, float]]:
    return {name: figures(share, counts, batch) for name, counts in COUNTS.items()}


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def add_up(tensor: Tensor) -> Tensor:
        dist.all_reduce(total := tensor.clone())
        return total

    def meet() -> None:
        dist.barrier()

    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = WorkShare(rank, world_size, add_up, meet)
    (folder / f"rank{rank}.json").write_text(json.dumps(all_figures(share, batch=16)))
    dist.destroy_process_group()
