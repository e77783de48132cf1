"""A run's data, of either kind that `data.path` may name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ganscale.data.loader import Loader
from ganscale.data.manifest import Manifest, check_shards
from ganscale.data.streaming import StreamLoader
from ganscale.data.tar_reader import check_urls, is_streamed, stream_identity, stream_urls
from ganscale.schema import DataConfig


@dataclass(frozen=True)
class DataSet:
    """What a run has to know of its data.

    location: for messages
    fingerprint: a run continues on the same one only
    class_count: 0 without labels
    check: raises UserError for shards that are missing or not as they were indexed; for one rank
    loader: a loader's arguments but for data and config -> this rank's batches
    manifest: None for shards that are streamed without one
    """

    location: str
    fingerprint: str
    class_count: int
    check: Callable[[], None]
    loader: Callable[..., Loader | StreamLoader]
    manifest: Manifest | None = None


def open_data(config: DataConfig) -> DataSet:
    """The data set of `config.path`. Raises UserError when there is none, and UnavailableError for
    one elsewhere that cannot be reached."""
    if is_streamed(config.path):
        urls = stream_urls(config.path)
        return DataSet(
            config.path,
            stream_identity(urls),
            config.class_count,
            check=partial(check_urls, urls),
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
        check=partial(check_shards, manifest, config.retry_seconds),
        loader=partial(Loader, manifest, config),
        manifest=manifest,
    )
