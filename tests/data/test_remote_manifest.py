"""Remote manifests: fetched once, verified, and not trusted with anything on this machine."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.dataset import open_data
from ganscale.data.manifest import SAMPLE_ROW, Manifest, check_shards, update_fingerprint
from ganscale.errors import UnavailableError, UserError
from ganscale.files import FileLock
from ganscale.schema import DataConfig
from ganscale.shards.indexing import build_manifest
from tests.helpers.fault_server import Fault, FaultServer


@pytest.fixture
def server(data_set) -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        serve(server, data_set)
        yield server


def serve(server: FaultServer, folder: Path) -> None:
    for path in folder.iterdir():
        server.objects[f"/set/{path.name}"] = path.read_bytes()


def edited(server: FaultServer, **changes) -> None:
    content = json.loads(server.objects["/set/manifest.json"])
    server.objects["/set/manifest.json"] = json.dumps(content | changes).encode()


def edited_shard(server: FaultServer, **changes) -> None:
    shards = json.loads(server.objects["/set/manifest.json"])["shards"]
    edited(server, shards=[shards[0] | changes, *shards[1:]])


ROWS, DESCRIPTION = "/set/manifest.npy", "/set/manifest.json"


def test_a_manifest_is_fetched_once_for_all_processes_and_again_when_it_changed(
    server,
    data_set,
    tmp_path,
):
    local = Manifest.load(data_set)
    first = Manifest.load(f"{server.url}/set", cache=tmp_path / "cache")
    again = Manifest.load(f"{server.url}/set/manifest.json", cache=tmp_path / "cache")
    assert first.fingerprint == again.fingerprint == local.fingerprint
    assert first.location == first.source == f"{server.url}/set"
    assert first.is_remote
    assert first.address(1) == f"{server.url}/set/1.tar"
    assert isinstance(first.samples, np.memmap)
    assert np.array_equal(first.samples, local.samples)
    assert server.gets[ROWS] == 1
    for name in ("1.tar", "2.tar"):
        (data_set / name).unlink()
    changed = build_manifest(data_set)
    serve(server, data_set)
    third = Manifest.load(f"{server.url}/set", cache=tmp_path / "cache")
    assert third.fingerprint == changed.fingerprint
    assert len(third.samples) == 4
    assert len(first.samples) == 12  # who has the first is not disturbed
    assert pickle.loads(pickle.dumps(first)).fingerprint == local.fingerprint


def test_without_an_identity_the_description_is_compared_and_the_rows_stay(server, tmp_path):
    server.has_identity = False
    for _ in range(2):
        Manifest.load(f"{server.url}/set", cache=tmp_path)
    assert (server.gets[DESCRIPTION], server.gets[ROWS]) == (2, 1)


def test_another_process_needs_no_network(server, tmp_path):
    manifest = Manifest.load(f"{server.url}/set", cache=tmp_path)
    pickled = pickle.dumps(manifest)
    gets = server.gets.total()
    copy = pickle.loads(pickled)
    assert len(pickled) < 500
    assert (copy.location, copy.source) == (manifest.location, manifest.source)
    assert server.gets.total() == gets


def test_rows_of_another_manifest_are_refused_and_nothing_of_them_stays(server, tmp_path):
    rows = server.objects[ROWS]
    server.objects[ROWS] = rows[:-1] + bytes([rows[-1] ^ 1])
    for _ in range(2):
        with pytest.raises(UserError, match="do not belong together"):
            Manifest.load(f"{server.url}/set", cache=tmp_path)
    server.objects[ROWS] = rows
    assert len(Manifest.load(f"{server.url}/set", cache=tmp_path).samples) == 12


def test_a_process_that_was_stopped_does_not_keep_others_for_ever(server, tmp_path, monkeypatch):
    Manifest.load(f"{server.url}/set", cache=tmp_path)
    (lock_file,) = (tmp_path / "manifests").glob("*.lock")
    monkeypatch.setattr("ganscale.data.remote.objects.STALL_SECONDS", 0.1)
    with FileLock(lock_file) as lock:
        assert lock.acquire()
        with pytest.raises(UnavailableError, match="has been fetching the manifest"):
            Manifest.load(f"{server.url}/set", cache=tmp_path, retry_seconds=0)


def test_missing_and_unreachable_manifests_are_named(server, tmp_path):
    with pytest.raises(UserError, match=r"/nothing/manifest\.json: there is no such object"):
        Manifest.load(f"{server.url}/nothing", cache=tmp_path)
    server.faults[DESCRIPTION].extend([Fault(status=503)] * 10)
    with pytest.raises(UnavailableError, match="503"):
        Manifest.load(f"{server.url}/set", cache=tmp_path, retry_seconds=0)
    for path in ("pipe:cat {}", "simplecache::http://h/x", "sftp://h/x"):
        with pytest.raises(UserError, match="neither a folder nor a URL"):
            Manifest.load(path, cache=tmp_path)
    server.faults.clear()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache=.* cannot be written"):
        Manifest.load(f"{server.url}/set", cache=tmp_path / "file")


@pytest.mark.parametrize(
    "location",
    ["pipe:touch {mark}; cat {{}}", "{mark}", "~", "file://{mark}", "../other", "a/../../b",
     "sftp://h/x", "s3://b/x::file://{mark}", "local://{mark}"],
)  # fmt: skip
def test_a_downloaded_manifest_may_not_point_to_this_machine_or_to_commands(
    server, tmp_path, location
):
    edited(server, location=location.format(mark=tmp_path / "mark"))
    with pytest.raises(UserError, match=r"a manifest may not name; .* data\.shards="):
        Manifest.load(f"{server.url}/set", cache=tmp_path)
    trusted = Manifest.load(f"{server.url}/set", cache=tmp_path, shards="pipe:cat /x/{}")
    assert trusted.address(0) == "pipe:cat /x/0.tar"
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("location", "address"),
    [
        ("s3://bucket/x", "s3://bucket/x/0.tar"),
        (".", "{url}/set/0.tar"),
        ("./train/", "{url}/set/train/0.tar"),
    ],
)
def test_a_downloaded_manifest_may_point_to_stores_and_below_itself(
    server, tmp_path, location, address
):
    edited(server, location=location)
    manifest = Manifest.load(f"{server.url}/set", cache=tmp_path)
    assert manifest.address(0) == address.format(url=server.url)


def test_a_local_manifest_points_anywhere_but_to_commands(data_set, tmp_path):
    description = data_set / "manifest.json"
    content = json.loads(description.read_text())
    for location, address in (
        ("..", data_set / ".." / "0.tar"),
        (str(tmp_path), tmp_path / "0.tar"),
        ("https://host/set", "https://host/set/0.tar"),
    ):
        description.write_text(json.dumps(content | {"location": location}))
        assert Manifest.load(data_set).address(0) == str(address)
    description.write_text(json.dumps(content | {"location": "pipe:cat {}"}))
    with pytest.raises(UserError, match="a manifest may not name"):
        Manifest.load(data_set)
    del content["location"]  # as version 1 was
    description.write_text(json.dumps(content | {"version": 1}))
    assert Manifest.load(data_set).address(0) == str(data_set / "0.tar")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x.tar"}, {"name": "/etc/x.tar"}, {"name": ""}, {"name": "a//b"}, {"name": 3},
        {"name": "a\0b"}, {"sha256": "../../x"}, {"sha256": None}, {"sha256": "A" * 64},
        {"bytes": -1}, {"bytes": 1e3}, {"bytes": 2**64}, {"samples": True}, {"samples": -4},
    ],
)  # fmt: skip
def test_shards_with_forbidden_names_are_refused(server, tmp_path, changes):
    edited_shard(server, **changes)
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(f"{server.url}/set", cache=tmp_path)
    assert ROWS not in server.gets or server.gets[ROWS] == 1


def test_only_one_of_the_remote_shards_is_checked(server, tmp_path):
    manifest = Manifest.load(f"{server.url}/set", cache=tmp_path)
    asked = server.gets.total()
    check_shards(manifest)
    assert server.gets.total() == asked + 1
    server.objects["/set/0.tar"] += b"x"
    with pytest.raises(UserError, match=r"set/0\.tar has .* bytes, but .* when it was indexed"):
        check_shards(manifest)
    del server.objects["/set/0.tar"]
    with pytest.raises(UserError, match="there is no such object"):
        check_shards(manifest)
    command = f"pipe:touch {tmp_path}/mark; cat {{}}"
    check_shards(Manifest.load(f"{server.url}/set", cache=tmp_path, shards=command))
    assert not (tmp_path / "mark").exists()


def test_the_first_missing_one_of_many_shards_is_named(tmp_path):
    content = {
        "version": 2,
        "location": ".",
        "fingerprint": "",
        "fields": {"extensions": [], "resolution": None, "class_count": 0, "class_names": []},
        "shards": [
            {"name": f"{i:04}.tar", "bytes": 0, "sha256": "", "samples": 0} for i in range(1000)
        ],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    np.save(tmp_path / "manifest.npy", np.zeros(0, SAMPLE_ROW))
    for shard in content["shards"]:
        (tmp_path / shard["name"]).touch()
    check_shards(Manifest.load(tmp_path))
    for number in (700, 300, 999):
        (tmp_path / f"{number:04}.tar").unlink()
    with pytest.raises(UserError, match=r"0300\.tar of the manifest is missing"):
        check_shards(Manifest.load(tmp_path))


def test_the_fingerprint_is_that_of_the_builder(data_set):
    import hashlib

    manifest, digest = Manifest.load(data_set), hashlib.sha256()
    for shard, first in zip(manifest.shards, manifest.first_sample, strict=False):
        update_fingerprint(digest, shard, manifest.samples[first : first + shard.samples])
    assert digest.hexdigest() == manifest.fingerprint


def test_a_cache_too_small_for_what_is_read_at_one_time_is_warned_of_at_the_start(
    server, data_set, tmp_path, caplog
):
    shard_bytes = (data_set / "0.tar").stat().st_size
    for shards, is_warned in ((2.9, True), (3.1, False)):
        config = DataConfig(
            path=f"{server.url}/set",
            resolution=4,
            cache=str(tmp_path / "cache"),
            cache_gib=shards * shard_bytes / 2**30,
            lanes=1,
            block_samples=4,
            window_blocks=1,
        )
        caplog.clear()
        open_data(config).check(1.0)
        assert ("will be fetched again and again" in caplog.text) == is_warned
