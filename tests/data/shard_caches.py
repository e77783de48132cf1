"""Shards of random bytes, and caches of them in this process and in others."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ganscale.data.manifest import Shard
from ganscale.data.remote.shard_cache import CachedShard, ShardCache
from tests.helpers.processes import REPOSITORY, end_tree

SHARD_BYTES = 200_000


def content_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SHARD_BYTES)


def shard_of(content: bytes) -> Shard:
    """Its name is its checksum, too, for processes that know no contents."""
    digest = hashlib.sha256(content).hexdigest()
    return Shard(f"{digest}.tar", len(content), digest, 1)


SHARDS = [shard_of(content_of(number)) for number in range(8)]


class Caches:
    """Makes caches on one folder, and closes them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.made: list[ShardCache] = []

    def __call__(self, shards: float = 100, retry_seconds: float = 20.0) -> ShardCache:
        capacity = round(shards * SHARD_BYTES)
        self.made.append(ShardCache(self.folder, capacity, retry_seconds, stall_seconds=0.5))
        return self.made[-1]

    def address(self, shard: Shard) -> str:
        return f"{self.url}/{shard.name}"

    def copies(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "shards").glob("*.tar"))

    def partials(self) -> list[Path]:
        return list((self.folder / "shards").glob("*.partial"))


def bytes_in(staged: CachedShard) -> bytes:
    return os.pread(staged.descriptor, 10 * SHARD_BYTES, 0)


@contextlib.contextmanager
def process(
    caches: Caches, shards: list[Shard], *, room: float = 100, hold: bool = False
) -> Iterator[subprocess.Popen[str]]:
    script = str(Path(__file__).with_name("shard_cache_process.py"))
    listed = json.dumps([asdict(shard) for shard in shards])
    where = [str(caches.folder), str(round(room * SHARD_BYTES)), caches.url, listed]
    started = subprocess.Popen(
        [sys.executable, script, *where, *(["hold"] if hold else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        yield started
    finally:
        end_tree(started)
        for stream in (started.stdin, started.stdout, started.stderr):
            if stream is not None:
                stream.close()


def age(caches: Caches, shard: Shard, seconds: float) -> None:
    copy = caches.folder / "shards" / f"{shard.sha256}.tar"
    used_at = time.time() - seconds
    os.utime(copy, (used_at, used_at))
