"""Features of many images, summed and, where a metric needs them, kept, over all ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork
from ganscale.evaluation.images import Images
from ganscale.evaluation.quality.class_scores import ClassScores, ClassSums
from ganscale.evaluation.quality.frechet import GaussianStatistics, Moments
from ganscale.evaluation.rounds import Rounds


@dataclass
class Collected:
    """features: of the kept images in order, None if none are
    classes: None if the network does not classify, or was not asked to
    unusable: images that could not be read
    """

    statistics: GaussianStatistics
    features: Float[Tensor, "kept dim"] | None
    classes: ClassScores | None
    unusable: int


def collect(
    images: Images,
    network: FeatureNetwork,
    device: torch.device,
    rounds: Rounds,
    batch_size: int,
    *,
    stage: str,
    keep: Bool[np.ndarray, " images"] | None = None,
    class_splits: int = 0,
) -> Collected:
    """Runs every image through the network once, each on one rank. Collective.

    stage: what progress is reported as
    keep: of which images the features are kept, None for none
    class_splits: of the scores of the classes; with 0, there are none

    Raises what `images` or the network raise, on every rank, and Interrupted.
    """
    share = rounds.share()
    moments = Moments(network.dim, device)
    unusable = torch.zeros((), dtype=torch.float64, device=device)
    kept = None if keep is None else _Kept(keep, network.dim, device)
    classes = None
    if class_splits:
        classes = ClassSums(network.num_classes, len(images), class_splits, device)
    rounds.enter(stage, len(images), batch_size)
    for rows in share.rounds(len(images), batch_size):
        with rounds.attempt(), torch.no_grad():
            if not rows or rounds.has_failed:
                continue
            chunk = images.chunk(rows)
            found = network(chunk.images.to(device))
            usable = chunk.is_usable.to(device)
            unusable += (~usable).sum()
            moments.add(found.features[usable])
            if kept is not None:
                kept.put(rows, found.features, usable)
            if classes is not None and found.probabilities is not None:
                positions = torch.arange(rows.start, rows.stop, device=device)[usable]
                classes.add(found.probabilities[usable], positions)
    rounds.check()
    return Collected(
        moments.statistics(share),
        None if kept is None else kept.gather(share.sum),
        None if classes is None else classes.scores(share),
        int(share.sum(unusable)),
    )


class _Kept:
    """Rows of some images, each known to one rank until they are gathered; in float32."""

    def __init__(self, keep: Bool[np.ndarray, " images"], width: int, device: torch.device) -> None:
        self._keep = torch.from_numpy(keep)
        self._position = self._keep.cumsum(0) - 1
        count = int(self._keep.sum())
        self._values = torch.zeros(count, width, device=device)
        self._is_known = torch.zeros(count, device=device)

    def put(self, rows: range, values: Tensor, usable: Tensor) -> None:
        within = slice(rows.start, rows.stop)
        chosen = self._keep[within].to(values.device) & usable
        positions = self._position[within].to(values.device)[chosen]
        self._values[positions] = values[chosen].float()
        self._is_known[positions] = 1

    def gather(self, add_up: Callable[[Tensor], Tensor]) -> Tensor:
        return add_up(self._values)[add_up(self._is_known) > 0]
