"""What samples are compared with: the features of a data set, computed once and cached, or a file
of their mean and covariance.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ganscale.checkpoints.checkpoint import save_tensors
from ganscale.data.manifest import Manifest
from ganscale.errors import UnavailableError, UserError, is_out_of_memory
from ganscale.evaluation.collection import Collected, collect
from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork
from ganscale.evaluation.images import DataSetImages, are_gray, chosen_samples
from ganscale.evaluation.quality.frechet import GaussianStatistics
from ganscale.evaluation.quality.statistics_files import load_statistics
from ganscale.evaluation.rounds import Rounds
from ganscale.files import FileLock, sha256, with_home
from ganscale.runtime import Runtime
from ganscale.schema import DataConfig

logger = logging.getLogger(__name__)

MOST_FEATURES = 50_000
"""Metrics of neighbours and kernels use at most so many images of the reference, as published."""

_LOCK_SECONDS, _POLL_SECONDS = 1800.0, 0.5
_VERSION = 1  # of the cached content


@dataclass(frozen=True)
class Reference:
    """features, class_histogram: None where they were not asked for or do not exist
    images: how many there were; 0 if a file of statistics does not say
    """

    statistics: GaussianStatistics
    images: int
    features: Float[Tensor, "images dim"] | None = None
    class_histogram: Int64[Tensor, " classes"] | None = None


class StatisticsFile:
    """A reference of which only mean and covariance are known."""

    def __init__(self, path: Path, network: FeatureNetwork) -> None:
        """Raises UserError for a file that cannot be used with this network."""
        self._statistics = load_statistics(path, network.dim)
        self.description = f"{path.name} (sha256 {sha256(path)[:16]})"
        self.images = self._statistics.count or 0

    def load(self, *_: object, **__: object) -> Reference:
        return Reference(self._statistics, self.images)


class DataSetReference:
    """The images of a data set, or a random choice of `limit` of them."""

    def __init__(self, manifest: Manifest, config: DataConfig, limit: int = 0) -> None:
        self._manifest, self._config, self._limit = manifest, config, limit
        self._chosen = chosen_samples(manifest, limit)
        self.images = len(self._chosen)
        height, width = config.size
        size = f"{height} x {width} x {config.channels}"
        self.description = f"data {manifest.fingerprint[:16]} at {size}"

    def check_colors(self, own_config: DataConfig, own: Manifest | None) -> None:
        """Raises UserError for a reference without colors if the images that are evaluated have
        them, or the other way round: neither should be converted unnoticed.

        own: the run's own data, which may be stored with colors that it does not use; None if they
            are not known
        """
        gray = are_gray(self._manifest, self._config)
        own_gray = own_config.channels == 1
        if own is not None:
            with contextlib.suppress(UserError, UnavailableError):  # they may be gone by now
                own_gray = are_gray(own, own_config)
        if gray != own_gray:
            kinds = {True: "gray", False: "in color"}
            raise UserError(
                f"the images of the reference {self._config.path} are {kinds[gray]}, those that "
                f"are evaluated {kinds[own_gray]}"
            )

    def load(
        self,
        network: FeatureNetwork,
        runtime: Runtime,
        rounds: Rounds,
        batch_size: int,
        *,
        needs_features: bool,
    ) -> Reference:
        """From the cache of this machine, or computed by all ranks, in rounds. Collective."""
        key = [_VERSION, self.description, self._manifest.fingerprint, network.name]
        key += [network.checksum, network.resize, len(self._chosen), needs_features]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        folder = with_home(self._config.cache) / "references"
        cached = folder / f"{digest}.safetensors"
        with _locked(cached, runtime, rounds):
            if (reference := _read_on_all(cached, network, runtime, rounds)) is not None:
                return reference
            if runtime.is_main:
                count = f"{len(self._chosen):,}"
                logger.info("evaluation: features of the reference's %s images", count)
            reference = self._compute(network, runtime, rounds, batch_size, needs_features)
            rounds.run_on_main(lambda: _write(cached, reference))
        return reference

    def _compute(
        self,
        network: FeatureNetwork,
        runtime: Runtime,
        rounds: Rounds,
        batch_size: int,
        needs_features: bool,
    ) -> Reference:
        keep = None
        if needs_features:
            kept = np.asarray(chosen_samples(self._manifest, MOST_FEATURES))
            keep = np.isin(np.asarray(self._chosen), kept)
        images = DataSetImages(self._manifest, self._config, self._chosen)
        try:
            device = runtime.device
            splits = 1 if network.num_classes else 0
            found = collect(
                images,
                network,
                device,
                rounds,
                batch_size,
                stage="reference",
                keep=keep,
                class_splits=splits,
            )
        finally:
            images.close()
        if found.unusable and runtime.is_main:
            logger.warning("%s images of the reference cannot be read", f"{found.unusable:,}")
        return _reference(found)


def _reference(found: Collected) -> Reference:
    count = found.statistics.count or 0
    histogram = None if found.classes is None else found.classes.histogram
    return Reference(found.statistics, count, found.features, histogram)


@contextmanager
def _locked(path: Path, runtime: Runtime, rounds: Rounds) -> Iterator[None]:
    """Waits, in rounds, while another run on rank 0's machine computes the same; not for ever,
    since a process that was stopped keeps its lock. Collective."""
    lock: FileLock | None = None
    with contextlib.suppress(OSError):  # no such folder, or a file system without locks
        if runtime.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
    try:
        for _ in range(round(_LOCK_SECONDS / _POLL_SECONDS)):
            if runtime.run_on_main(lambda: lock is None or _acquire(lock)):
                break
            rounds.check()
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        if lock is not None:
            lock.close()


def _acquire(lock: FileLock) -> bool:
    try:
        return lock.acquire()
    except OSError:
        return True


def _read_on_all(
    path: Path, network: FeatureNetwork, runtime: Runtime, rounds: Rounds
) -> Reference | None:
    """From the cache on rank 0's machine, on every rank. Collective."""
    mine: dict[str, Tensor] = {}

    def read() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        mine.update(_read(path, network) or {})
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()}

    known = rounds.run_on_main(read)
    if not known:
        return None
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in known.items()}
    added = {k: rounds.sum(t.to(runtime.device)) for k, t in (mine or zeros).items()}
    found = {name: tensor.cpu() for name, tensor in added.items() if name != "features"}
    count = int(found["count"])
    statistics = GaussianStatistics(found["mean"], found["covariance"], count)
    return Reference(statistics, count, added.get("features"), found.get("class_histogram"))


def _read(path: Path, network: FeatureNetwork) -> dict[str, Tensor] | None:
    """The cached tensors, None if there are none or they are damaged."""
    try:
        tensors = load_file(path)
        is_whole = tensors["mean"].shape == (network.dim,)
        is_whole &= tensors["covariance"].shape == (network.dim, network.dim)
        if is_whole and int(tensors["count"]) > 0:
            return tensors
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        logger.warning("%s is damaged (%s): computed again", path, error)
    return None


def _write(path: Path, reference: Reference) -> None:
    """A full disk only costs the time to compute it again."""
    statistics = reference.statistics
    tensors = {
        "mean": statistics.mean,
        "covariance": statistics.covariance,
        "count": torch.tensor(reference.images),
    }
    if reference.features is not None:
        tensors["features"] = reference.features.cpu()
    if reference.class_histogram is not None:
        tensors["class_histogram"] = reference.class_histogram
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(unfinished, tensors)
        unfinished.replace(path)
    except OSError as error:
        logger.warning("the reference's features cannot be cached in %s: %s", path.parent, error)
        with contextlib.suppress(OSError):
            unfinished.unlink()
