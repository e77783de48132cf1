"""The data of a run: shards with a manifest, or tars that are streamed without one."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ganscale.data.loader import Loader
from ganscale.data.manifest import Manifest, check_shards
from ganscale.data.order import working_set_bytes
from ganscale.data.streaming.loader import StreamLoader
from ganscale.data.streaming.tar_stream import check_urls, is_streamed, stream_identity, stream_urls
from ganscale.errors import UserError
from ganscale.schema import DataConfig
from ganscale.secrets import MASK, is_masked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """What a run needs to know of its data.

    fingerprint: a run is resumed only with the same one
    class_count: 0 without labels
    urls: of tars that are streamed, without a `manifest`
    """

    config: DataConfig
    fingerprint: str
    class_count: int
    manifest: Manifest | None = None
    urls: tuple[str, ...] = ()

    def check(self, node_share: float) -> None:
        """Raises UserError for shards that are missing or have changed since they were indexed, and
        warns of a cache that is too small. On one rank only.

        node_share: the share of all ranks that one machine has
        """
        config, manifest = self.config, self.manifest
        if manifest is None:
            check_urls(self.urls)
            return
        check_shards(manifest, config.retry_seconds)
        if not manifest.is_remote:
            return
        need = working_set_bytes(
            np.array([shard.bytes for shard in manifest.shards]),
            np.diff(manifest.first_sample),
            node_lanes=math.ceil(config.lanes * node_share),
            lanes=config.lanes,
            block_samples=config.block_samples,
            window_blocks=config.window_blocks,
        )
        if need > config.cache_gib * 2**30:
            logger.warning(
                f"data.cache_gib={config.cache_gib:g} is less than the {need / 2**30:.3g} GiB of "
                "shards that a machine reads at one time: they will be fetched again and again "
                "(see `ganscale plan`)"
            )

    def make_loader(self, **arguments: Any) -> Loader | StreamLoader:
        """This rank's batches; `arguments` are the loader's but for data and config."""
        if self.manifest is None:
            return StreamLoader(self.urls, self.config, **arguments)
        return Loader(self.manifest, self.config, **arguments)


def open_data(config: DataConfig) -> DataSet:
    """The data set of `config.path`. Raises UserError when there is none, and UnavailableError for
    a remote one that cannot be reached."""
    for key in ("path", "shards"):
        if is_masked(getattr(config, key)):
            raise UserError(
                f"data.{key} is as `ganscale config` shows it, with {MASK} for a secret: give it "
                "as it was, or train with the config that it was made from"
            )
    if is_streamed(config.path):
        urls = tuple(stream_urls(config.path, config.retry_seconds))
        return DataSet(config, stream_identity(urls), config.class_count, urls=urls)
    manifest = Manifest.load(
        config.path, shards=config.shards, cache=config.cache, retry_seconds=config.retry_seconds
    )
    return DataSet(config, manifest.fingerprint, manifest.class_count, manifest)
