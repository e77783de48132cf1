"""A small data set, and a server of the S3 protocol, for tests that ask for them."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.processes import end_tree
from tests.helpers.fault_server import FaultServer
from tests.data.shard_caches import SHARDS, Caches, content_of
from tests.helpers.images import png
from tests.helpers.tars import write_tar


@pytest.fixture
def data_set(tmp_path) -> Path:
    """Three shards of four samples."""
    from ganscale.shards.indexing import build_manifest

    folder = tmp_path / "set"
    for number in range(3):
        images = [(f"{i}.png", png(i)) for i in range(4 * number, 4 * number + 4)]
        write_tar(folder / f"{number}.tar", images)
    build_manifest(folder)
    return folder


@dataclass
class S3:
    """proxy: what clients talk to; put: puts (key, content) into the bucket `bucket`."""

    proxy: FaultServer
    put: Callable[[str, bytes], None]


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    program = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdin, process.stdout:
        try:
            yield int(process.stdout.readline())
        finally:
            end_tree(process)


@pytest.fixture
def s3(s3_port, monkeypatch) -> Iterator[S3]:
    """A store that s3:// addresses lead to, by way of a proxy that can fail."""
    import boto3
    from botocore.config import Config

    from ganscale.data.remote import connections

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    direct = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}", config=Config())
    direct.create_bucket(Bucket="bucket")

    def put(key: str, content: bytes) -> None:
        direct.put_object(Bucket="bucket", Key=key, Body=content)

    with FaultServer(upstream=f"127.0.0.1:{s3_port}").running() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        connections._made.cache_clear()
        yield S3(proxy, put)
        direct.close()
        connections._made.cache_clear()


@pytest.fixture
def shard_server() -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        for number, shard in enumerate(SHARDS):
            server.objects[f"/{shard.name}"] = content_of(number)
        yield server


@pytest.fixture
def caches(tmp_path, shard_server) -> Iterator[Caches]:
    caches = Caches(tmp_path / "cache", shard_server.url)
    yield caches
    for cache in caches.made:
        cache.close()
