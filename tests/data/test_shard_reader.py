"""Samples are the same from local and remote shards, also when a disk fails for a moment."""

import errno
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from ganscale.data.bad_samples import BadSampleError
from ganscale.data.manifest import Manifest
from ganscale.data.shard_reader import ShardReader
from ganscale.errors import UnavailableError, UserError
from ganscale.schema import DataConfig
from tests.helpers.fault_server import Fault, FaultServer
from tests.helpers.images import png
from tests.helpers.processes import wait_until


@pytest.fixture
def server(data_set) -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        server.serve(data_set, "/set")
        yield server


@pytest.fixture
def stores(tmp_path) -> Iterator:
    made = []

    def store(path: str, **settings) -> ShardReader:
        config = DataConfig(path=path, resolution=4, cache=str(tmp_path / "cache"), **settings)
        manifest = Manifest.load(config.path, shards=config.shards, cache=config.cache)
        made.append(ShardReader(manifest, config))
        return made[-1]

    yield store
    for each in made:
        each.close()


def all_samples(store: ShardReader) -> list[tuple[str, str, bytes]]:
    return [(*store.shard_and_key(i), store.read(i)) for i in range(12)]


EXPECTED = [(f"{i // 4}.tar", str(i), png(i)) for i in range(12)]


def test_samples_are_the_same_from_disk_server_store_and_command(data_set, server, stores, s3):
    for path in data_set.iterdir():
        s3.put(f"set/{path.name}", path.read_bytes())
    kinds = (
        (str(data_set), {}),
        (f"{server.url}/set", {}),
        (f"{server.url}/set/manifest.json", {"shards": str(data_set)}),
        ("s3://bucket/set", {}),
        (str(data_set), {"shards": f"pipe:cat {data_set}/{{}}"}),
        (str(data_set), {"shards": "s3://bucket/set"}),
    )
    for path, settings in kinds:
        store = stores(path, **settings)
        assert all_samples(store) == EXPECTED
    # Each shard was fetched once for all of these: copies are named by their contents.
    assert {path: count for path, count in server.gets.items() if path.endswith(".tar")} == {
        f"/set/{number}.tar": 1 for number in range(3)
    }


def test_shards_are_fetched_ahead_when_they_are_named(server, stores, tmp_path):
    store = stores(f"{server.url}/set")
    assert store.manifest.is_remote
    store.prefetch([2, 0])
    wait_until(lambda: len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 2)
    server.faults["/set/2.tar"].append(Fault(status=404))
    assert store.read(11) == png(11)
    assert server.gets["/set/1.tar"] == 0


def test_on_disk_there_is_nothing_to_fetch(data_set, stores, tmp_path):
    store = stores(str(data_set))
    assert not store.manifest.is_remote
    store.prefetch([0, 1, 2])
    assert not (tmp_path / "cache").exists()


def test_a_sample_that_cannot_be_there_is_bad_and_nothing_is_read(data_set):
    rows = np.load(data_set / "manifest.npy")
    rows[1]["size"] = (256 << 20) + 1
    rows[2]["offset"] = 2**63
    rows[3]["offset"] = 10
    np.save(data_set / "manifest.npy", rows)
    store = ShardReader(Manifest.load(data_set), DataConfig(path=""))
    with pytest.raises(BadSampleError, match=r"has 268,435,457 bytes, more than 256 MiB"):
        store.read(1)
    with pytest.raises(BadSampleError, match=r"bytes at byte 9,223,372,036,854,775,808 of"):
        store.read(2)
    assert store.shard_and_key(2) == ("0.tar", f"byte {2**63}")
    assert store.shard_and_key(3) == ("0.tar", "byte 10")


class Stumbling:
    """Stands in for a disk that fails: `os.pread` of the first reads raises. Nothing short of a
    failing disk does that by itself."""

    def __init__(self, monkeypatch, code: int, times: int) -> None:
        self.left, self.code, self.pread = times, code, os.pread
        monkeypatch.setattr("ganscale.data.shard_reader.os.pread", self)

    def __call__(self, descriptor: int, size: int, offset: int) -> bytes:
        if self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code))
        return self.pread(descriptor, size, offset)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_stumbles_is_retried_and_one_that_stays_down_asks_for_a_requeue(
    data_set, monkeypatch, code
):
    manifest = Manifest.load(data_set)
    Stumbling(monkeypatch, code, times=2)
    assert ShardReader(manifest, DataConfig(path="", retry_seconds=30)).read(5) == png(5)
    Stumbling(monkeypatch, code, times=10**9)
    with pytest.raises(UnavailableError, match=r"set/1\.tar cannot be read: .*tried for 0\.1 s"):
        ShardReader(manifest, DataConfig(path="", retry_seconds=0.1)).read(5)


def test_permanent_failures_of_a_disk_are_reported_at_once(data_set, monkeypatch):
    (data_set / "1.tar").unlink()
    (data_set / "1.tar").mkdir()
    store = ShardReader(Manifest.load(data_set), DataConfig(path="", retry_seconds=600))
    with pytest.raises(UserError, match=r"set/1\.tar cannot be read: Is a directory"):
        store.read(5)
    (data_set / "2.tar").unlink()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"set/2\.tar of the manifest is missing"):
        store.read(8)
    assert time.monotonic() - start < 300  # it did not retry
