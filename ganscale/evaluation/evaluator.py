"""Evaluations of generated images: every figure asked for, with what it depends on."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.evaluation.collection import Collected, collect
from ganscale.evaluation.feature_networks.build import (
    build_feature_network,
    check_feature_network,
    network_name,
)
from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork
from ganscale.evaluation.figures import (
    METRICS,
    STATISTICS_SUFFIX,
    Figures,
    Identity,
    check_metrics,
    figure_name,
)
from ganscale.evaluation.images import Images
from ganscale.evaluation.quality.class_scores import SPLITS, class_divergence
from ganscale.evaluation.quality.frechet import (
    frechet_distance,
    frechet_distance_of_components,
    too_few_samples,
)
from ganscale.evaluation.quality.kernel_distance import (
    kernel_distance,
    kernel_distance_of_subsets,
    mean_kernel,
)
from ganscale.evaluation.quality.neighbours import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    density_and_coverage,
    neighbour_distances,
    precision_and_recall,
)
from ganscale.evaluation.quality.statistics_files import save_statistics
from ganscale.evaluation.reference import DataSetReference, Reference, StatisticsFile
from ganscale.evaluation.rounds import OnRound, Rounds
from ganscale.evaluation.work_share import WorkShare
from ganscale.files import with_home
from ganscale.runtime import Runtime
from ganscale.schema import DataConfig, EvaluationConfig

logger = logging.getLogger(__name__)

_SUBSET_SEED = 0  # the same subsets in all runs
_OF_NEIGHBOURS = DENSITY_NEIGHBOURS + 1  # distances to so many are computed of the reference
_LEAST_IMAGES = {
    "is": (SPLITS, 0),
    "precision": (PRECISION_NEIGHBOURS + 1, _OF_NEIGHBOURS),
    "recall": (PRECISION_NEIGHBOURS + 1, _OF_NEIGHBOURS),
    "density": (2, _OF_NEIGHBOURS),
    "coverage": (2, _OF_NEIGHBOURS),
}
"""(samples, images of the reference) that a metric needs."""


class _Place(TypedDict):
    sample_shape: tuple[int, int, int]
    cache: Path
    retry_seconds: float


class Evaluator:
    """Evaluates with one feature network against one reference, which is computed when it is first
    needed. The network is loaded for each evaluation: between two, it takes no memory."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        manifest: Manifest | None,
        runtime: Runtime,
        truncation: float = 1.0,
        classes: str = "",
    ) -> None:
        """data, manifest: of the run's own images; without a manifest, another reference is needed.
        It is read as these settings say, too.
        truncation, classes: of the images, as in `Identity`

        Loads the network once. Raises UserError for a network that cannot be loaded, a reference
        that cannot be read, and metrics that these cannot give.
        """
        self._config, self._data, self._runtime = config, data, runtime
        self._truncation, self._classes = truncation, classes
        name = network_name(config.network, config.options)
        self._metrics = check_metrics(config.metrics, name, config.reference)
        network = self._load_network()
        self._network = network.name, network.checksum, network.resize
        self._source = _open_reference(config, data, manifest, network)
        if isinstance(self._source, DataSetReference) and config.reference:
            source = self._source
            runtime.run_on_main(lambda: source.check_colors(data, manifest))
        self._reference: Reference | None = None
        self._of_reference: dict[str, Any] = {}
        for metric in self._metrics:
            if METRICS[metric].needs == "classes" and not network.num_classes:
                raise UserError(
                    f"`{metric}` needs class probabilities, but {network.name} does not classify"
                )
        _check_counts(self._metrics, config.samples, self._source.images)
        warning = too_few_samples(config.samples, network.dim)
        if runtime.is_main and "fd" in self._metrics and warning:
            logger.warning("evaluation: %s", warning)

    @property
    def names(self) -> list[str]:
        """The figures' names in a row."""
        return [figure_name(metric, self._network[0]) for metric in self._metrics]

    def identity(self) -> Identity:
        """What the next evaluation's figures will depend on."""
        reference = self._source.description, self._source.images
        of_images = self._config.samples, self._truncation, self._classes
        return Identity(*self._network, *reference, *of_images)

    def evaluate(
        self, images: Images, is_stopped: Callable[[], bool], on_round: OnRound
    ) -> Figures:
        """Collective, and the same on every rank.

        on_round: called repeatedly, as a sign of life
        Raises Interrupted once any rank is stopped; otherwise, on every rank, UserError,
        UnavailableError or OutOfMemoryError.
        """
        started = time.monotonic()
        rounds = Rounds(self._runtime, is_stopped, on_round)
        with rounds.failing_together():
            values, identity = self._evaluate(images, rounds)
            rounds.check()
        return Figures(values, identity, time.monotonic() - started)

    def _evaluate(self, images: Images, rounds: Rounds) -> tuple[dict[str, float], Identity]:
        config, runtime = self._config, self._runtime
        network = None
        with rounds.attempt():
            network = self._load_network()
        rounds.check()
        assert network is not None
        needs_features = self._needs("features")
        if self._reference is None:
            self._reference = self._source.load(
                network, runtime, rounds, config.batch_size, needs_features=needs_features
            )
        found = collect(
            images,
            network,
            runtime.device,
            rounds,
            config.batch_size,
            stage="samples",
            keep=np.ones(len(images), dtype=bool) if needs_features else None,
            class_splits=SPLITS if self._needs("classes") else 0,
        )
        if found.unusable and runtime.is_main:
            logger.warning("%s of the images cannot be read", f"{found.unusable:,}")
        values = self._values(found, self._reference, rounds)
        identity = replace(
            self.identity(),
            reference_images=self._reference.images,
            samples=found.statistics.count or 0,
        )
        return values, identity

    def save_reference(self, path: Path) -> None:
        """Writes the mean and covariance of the reference of the evaluations so far. Raises
        UserError if that cannot be written."""
        assert self._reference is not None
        try:
            save_statistics(path, self._reference.statistics)
        except OSError as error:
            raise UserError(f"the statistics {path} cannot be written: {error}") from error

    def _values(self, found: Collected, reference: Reference, rounds: Rounds) -> dict[str, float]:
        """The figures by their names in a row, equal on every rank."""
        share = rounds.share()
        values: dict[str, float] = {}

        def frechet_distances() -> dict[str, float]:
            distances = {
                "fd": frechet_distance,
                "fd64": frechet_distance_of_components,
            }
            pair = reference.statistics, found.statistics
            return {m: distances[m](*pair) for m in self._metrics if m in distances}

        rounds.enter("Fréchet distance")
        rounds.check()
        values |= rounds.run_on_main(frechet_distances)
        if reference.features is not None and found.features is not None:
            rounds.enter("neighbours and kernels")
            values |= self._pairwise(reference.features, found.features, share)
        if found.classes is not None:
            scores = found.classes
            values |= _named("is", (scores.inception_score, scores.deviation))
            values["modes"] = float(scores.modes_covered)
            if reference.class_histogram is not None:
                histograms = scores.histogram, reference.class_histogram
                values["class_kl"] = class_divergence(*histograms)
        asked = {m: v for m, v in values.items() if m.removesuffix("_std") in self._metrics}
        return {figure_name(m, self._network[0]): value for m, value in asked.items()}

    def _pairwise(self, real: Tensor, fake: Tensor, share: WorkShare) -> dict[str, float]:
        """The figures that compare every image with every other; what they need of the reference
        alone is computed once."""
        asked, of_reference, values = {*self._metrics}, self._of_reference, {}
        if "kid" in asked:
            if "kernel" not in of_reference:
                of_reference["kernel"] = mean_kernel(real, share)
            values["kid"] = kernel_distance(real, fake, share, of_reference["kernel"])
        if "kid_subsets" in asked:
            found = kernel_distance_of_subsets(real, fake, _SUBSET_SEED, share=share)
            values |= _named("kid_subsets", found)
        if asked & {"precision", "recall", "density", "coverage"}:
            if "distances" not in of_reference:
                of_reference["distances"] = neighbour_distances(real, share)
            distances = of_reference["distances"]
            if asked & {"precision", "recall"}:
                pair = precision_and_recall(real, fake, share, distances)
                values |= zip(("precision", "recall"), pair, strict=True)
            if asked & {"density", "coverage"}:
                pair = density_and_coverage(real, fake, share, distances)
                values |= zip(("density", "coverage"), pair, strict=True)
        return values

    def _needs(self, what: str) -> bool:
        return any(METRICS[metric].needs == what for metric in self._metrics)

    def _load_network(self) -> FeatureNetwork:
        return build_feature_network(
            self._config.network,
            self._config.options,
            device=self._runtime.device,
            **_place(self._data),
        )


def check_evaluation(
    config: EvaluationConfig, data: DataConfig, manifest: Manifest | None
) -> list[str]:
    """The names of the figures in a row. Raises UserError for what an Evaluator would refuse, as
    far as that can be seen without loading the network."""
    name = network_name(config.network, config.options)
    metrics = check_metrics(config.metrics, name, config.reference)
    check_feature_network(config.network, config.options, **_place(data))
    if not config.reference.endswith(STATISTICS_SUFFIX):
        reference = _open_data_set(config, data, manifest)
        _check_counts(metrics, config.samples, reference.images)
        if config.reference:
            reference.check_colors(data, manifest)
    elif not with_home(config.reference).is_file():
        raise UserError(f"evaluation.reference: there is no file {config.reference}")
    return [figure_name(metric, name) for metric in metrics]


def _check_counts(metrics: Sequence[str], samples: int, reference_images: int) -> None:
    """Raises UserError for metrics that need more samples, or more images of the reference."""
    for metric in metrics:
        least, least_real = _LEAST_IMAGES.get(metric, (2, 0))
        if samples < least:
            raise UserError(f"`{metric}` needs {least} samples or more, not {samples}")
        if reference_images < least_real:
            raise UserError(
                f"`{metric}` needs {least_real} images of the reference or more, not "
                f"{reference_images}"
            )


def _place(data: DataConfig) -> _Place:
    """What a feature network is built for and with, besides its options."""
    return {
        "sample_shape": data.sample_shape,
        "cache": with_home(data.cache),
        "retry_seconds": data.retry_seconds,
    }


def _open_reference(
    config: EvaluationConfig,
    data: DataConfig,
    manifest: Manifest | None,
    network: FeatureNetwork,
) -> DataSetReference | StatisticsFile:
    if config.reference.endswith(STATISTICS_SUFFIX):
        return StatisticsFile(with_home(config.reference), network)
    return _open_data_set(config, data, manifest)


def _open_data_set(
    config: EvaluationConfig, data: DataConfig, manifest: Manifest | None
) -> DataSetReference:
    if path := config.reference:
        data = replace(data, path=path, shards="")
        cache, retry_seconds = data.cache, data.retry_seconds
        reference = Manifest.load(path, shards="", cache=cache, retry_seconds=retry_seconds)
        _check_resolution(reference, data, manifest)
        manifest = reference
    if manifest is None:
        raise UserError(
            "the data are streamed without a manifest, so they cannot be the reference of an "
            "evaluation: index them with `ganscale shards index`, or set evaluation.reference"
        )
    return DataSetReference(manifest, data, config.reference_images)


def _check_resolution(reference: Manifest, config: DataConfig, own: Manifest | None) -> None:
    """Refuses a reference of another resolution than the images have, unless the run's own data
    have it, too: then both are resized in the same way."""
    stored = reference.resolution
    if stored is None or stored == config.size or (own is not None and own.resolution == stored):
        return
    (height, width), (own_height, own_width) = stored, config.size
    size = own_height if own_height == own_width else f"{own_height}x{own_width}"
    raise UserError(
        f"the images of the reference {config.path} have {height} x {width} pixels, those that are "
        f"evaluated {own_height} x {own_width}: write the reference in that size, with `ganscale "
        f"shards write ... --resolution {size}`"
    )


def _named(metric: str, mean_and_std: tuple[float, float]) -> dict[str, float]:
    return {metric: mean_and_std[0], f"{metric}_std": mean_and_std[1]}
