"""A run's data, of either kind that `data.path` may name."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ganscale.data.loader import Loader
from ganscale.data.manifest import Manifest, check_shards
from ganscale.data.remote.shard_cache import working_set
from ganscale.data.streaming.loader import StreamLoader
from ganscale.data.streaming.tar_stream import check_urls, is_streamed, stream_identity, stream_urls
from ganscale.schema import DataConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """What a run has to know of its data.

    location: for messages
    fingerprint: a run continues on the same one only
    class_count: 0 without labels
    check: raises UserError for shards that are missing or not as they were indexed, and warns of a
        cache that is too small, given the share of all ranks that one machine has; for one rank
    loader: a loader's arguments but for data and config -> this rank's batches
    manifest: None for shards that are streamed without one
    """

    location: str
    fingerprint: str
    class_count: int
    check: Callable[[float], None]
    loader: Callable[..., Loader | StreamLoader]
    manifest: Manifest | None = None


def open_data(config: DataConfig) -> DataSet:
    """The data set of `config.path`. Raises UserError when there is none, and UnavailableError for
    one elsewhere that cannot be reached."""
    if is_streamed(config.path):
        urls = stream_urls(config.path, config.retry_seconds)
        return DataSet(
            config.path,
            stream_identity(urls),
            config.class_count,
            check=lambda _: check_urls(urls),
            loader=partial(StreamLoader, urls, config),
        )
    manifest = Manifest.load(
        config.path,
        shards=config.shards,
        cache=config.cache,
        retry_seconds=config.retry_seconds,
    )
    return DataSet(
        config.path,
        manifest.fingerprint,
        manifest.class_count,
        check=partial(_check, manifest, config),
        loader=partial(Loader, manifest, config),
        manifest=manifest,
    )


def _check(manifest: Manifest, config: DataConfig, node_share: float) -> None:
    check_shards(manifest, config.retry_seconds)
    if not manifest.is_remote:
        return
    need = working_set(
        np.array([shard.bytes for shard in manifest.shards]),
        np.diff(manifest.first_sample),
        node_lanes=math.ceil(config.lanes * node_share),
        lanes=config.lanes,
        block_samples=config.block_samples,
        window_blocks=config.window_blocks,
    )
    if need > config.cache_gib * 2**30:
        logger.warning(
            "data.cache_gib=%g is less than the %.3g GiB of shards that a machine reads from at one "
            "time: they will be fetched again and again (`ganscale plan` says what would do)",
            config.cache_gib,
            need / 2**30,
        )
