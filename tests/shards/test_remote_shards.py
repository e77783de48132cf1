"""Shards on a real server or behind a command are indexed and verified as streams."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.indexing import build_manifest, index_shards
from ganscale.shards.interop import read_wids, write_wids
from ganscale.shards.listing import list_shards
from ganscale.shards.verifying import verify_shards
from tests.helpers.tars import labelled, write_tar
from tests.shards.test_shards_cli import run


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "served" / "set"
    for number in range(3):
        write_tar(folder / "train" / f"{number:03d}.tar", labelled(4, first=10 * number))
    write_tar(folder / "val" / "000.tar", labelled(2, first=100))
    return folder


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        self.reads: Counter[str] = Counter()
        reads = self.reads

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                reads[self.path] += 1
                super().do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(shards) -> Iterator[Server]:
    server = Server(shards.parent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)
    server.server_close()


def test_shards_on_a_server_are_indexed_like_local_ones(server, shards, tmp_path):
    """Rows, checksums and fingerprint; the manifest has the location of the shards."""
    local = index_shards([str(shards / "train" / "*.tar"), str(shards / "val")], tmp_path / "local")
    urls = [f"{server.url}/set/train/{{000..002}}.tar", f"{server.url}/set/val/000.tar"]
    with pytest.raises(UserError, match=r"are not on this machine: .* --output FOLDER"):
        index_shards(urls)
    result = index_shards(urls, tmp_path / "remote", workers=2)
    assert result.manifest is not None
    assert local.manifest is not None
    assert result.manifest.location == f"{server.url}/set"
    assert local.manifest.location == str(shards)
    names = ["train/000.tar", "train/001.tar", "train/002.tar", "val/000.tar"]
    assert [shard.name for shard in result.manifest.shards] == names
    assert result.manifest.shards == local.manifest.shards
    assert result.manifest.fingerprint == local.manifest.fingerprint
    assert result.manifest.samples.tobytes() == local.manifest.samples.tobytes()
    assert {path.name for path in (tmp_path / "remote").iterdir()} == {
        "manifest.json",
        "manifest.npy",
        "indexing.json",
    }


def test_unchanged_shards_on_a_server_are_not_read_again(server, shards, tmp_path):
    pattern = f"{server.url}/set/train/{{000..002}}.tar"
    index_shards([pattern], tmp_path / "out")
    server.reads.clear()
    assert index_shards([pattern], tmp_path / "out")[2:4] == (0, 3)
    assert not server.reads
    write_tar(shards / "train" / "001.tar", labelled(9, first=50))
    write_tar(shards / "train" / "003.tar", labelled(1, first=60))
    result = index_shards([pattern.replace("002", "003")], tmp_path / "out")
    assert (result.read, result.kept) == (2, 2)
    assert dict(server.reads) == {"/set/train/001.tar": 1, "/set/train/003.tar": 1}


def test_a_missing_remote_shard_is_named_with_its_url(server, tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/set/train/003\.tar"):
        index_shards([f"{server.url}/set/train/{{000..003}}.tar"], tmp_path / "out")
    assert len(list((tmp_path / "out" / "indexing").iterdir())) == 3


def test_a_shard_that_is_cut_on_the_server_is_named(server, shards, tmp_path):
    path = shards / "train" / "001.tar"
    path.write_bytes(path.read_bytes()[:2500])
    with pytest.raises(UserError, match=r"/set/train/001\.tar: the tar is cut"):
        index_shards([f"{server.url}/set/train/{{000..002}}.tar"], tmp_path / "out")


def test_remote_shards_are_verified_on_the_server(server, shards, tmp_path):
    pattern = f"{server.url}/set/train/{{000..002}}.tar"
    manifest = index_shards([pattern], tmp_path / "out").manifest
    assert manifest is not None
    assert not any(found.problem or found.bad for found in verify_shards(manifest))
    write_tar(shards / "train" / "001.tar", labelled(4, first=50))
    (shards / "train" / "002.tar").unlink()
    problems = {found.shard: found.problem for found in verify_shards(manifest)}
    assert problems["000.tar"] == ""
    assert "has changed since it was indexed" in problems["001.tar"]
    assert "002.tar" in problems["002.tar"]


def test_shards_behind_a_command_are_indexed_but_no_manifest_names_it(shards, tmp_path, capsys):
    command = f"pipe:cat {shards}/train/{{}}"
    output = tmp_path / "out"
    arguments = ["index", command, "--names", "{000..002}.tar", "--output", str(output)]
    assert run(*arguments, "--workers", "1") == 0
    said = capsys.readouterr().out
    assert said.endswith(f"train with data.shards='{command}'\n")
    assert "location     .\n" in said
    assert "pipe" not in (output / "manifest.json").read_text()
    assert Manifest.load(output).fingerprint == build_manifest(shards / "train").fingerprint
    assert run("verify", str(output), "--shards", command, "--workers", "1") == 0
    capsys.readouterr()
    assert run(*arguments, "--workers", "1") == 0
    assert "not read, since unchanged: 3 of 3 shards" in capsys.readouterr().out


def test_another_command_is_read_again(tmp_path, capsys):
    for version, count in (("v1", 3), ("v2", 5)):
        write_tar(tmp_path / version / "a.tar", labelled(count))
        command = f"pipe:cat {tmp_path}/{version}/{{}}"
        output = str(tmp_path / "out")
        arguments = ["index", command, "--names", "a.tar", "--output", output, "--workers", "1"]
        assert run(*arguments) == 0
        assert len(Manifest.load(output).samples) == count


def test_a_wids_index_on_a_server_is_read_and_written(server, shards, tmp_path):
    urls = [{"url": f"train/{i:03d}.tar", "nsamples": 4} for i in range(3)]
    (shards / "wids.json").write_text(json.dumps({"wids_version": 1, "shardlist": urls}))
    manifest = index_shards([f"{server.url}/set/wids.json"], tmp_path / "out").manifest
    assert manifest is not None
    assert manifest.location == f"{server.url}/set/train"
    write_wids(manifest, tmp_path / "out" / "wids.json", [4, 4, 4])
    assert read_wids(
        str(tmp_path / "out" / "wids.json"), (tmp_path / "out" / "wids.json").read_bytes()
    ) == [(f"{server.url}/set/train/{i:03d}.tar", 4) for i in range(3)]


@pytest.mark.parametrize(
    ("sources", "names", "sentence"),
    [
        (["pipe:cat {}"], [], "a pipe needs {} in place of the shard's name, and the names"),
        (["pipe:cat"], ["a.tar"], "a pipe needs {} in place"),
        (["pipe:cat {}", "pipe:ls {}"], ["a.tar"], "must be the only source"),
        (["pipe:cat {}"], ["a.tar", "a.tar"], "given twice"),
        (["pipe:cat {}"], ["../a.tar"], "use relative names without"),
        (["pipe:cat {}"], ["/a.tar"], "use relative names without"),
        (["pipe:cat {}"], ["./a.tar"], "use relative names without"),
        (["pipe:cat {}"], ["a//b.tar"], "use relative names without"),
        (["http://a/x.tar", "http://b/x.tar"], [], "have no folder in common"),
        (["http://a/s/x.tar", "s3://a/s/y.tar"], [], "have no folder in common"),
        (["http://a/x.tar", "http://a/x.tar"], [], "twice"),
        (["http://a/x.tar"], ["a.tar"], "--names is only for a pipe"),
        (["nowhere"], [], "nowhere is neither a folder, nor a shard"),
        (["nowhere-*.tar"], [], "nowhere"),
    ],
)
def test_sources_without_a_common_base_are_refused(sources, names, sentence):
    with pytest.raises(UserError, match=sentence):
        list_shards(sources, names)


def test_names_are_unquoted_and_signatures_stay_out_of_the_manifest(server, shards, tmp_path):
    write_tar(shards / "50% off.tar", labelled(2, first=7))
    url = f"{server.url}/set/50%25%20off.tar?sig=secret"
    result = index_shards([url], tmp_path / "out")
    assert result.manifest is not None
    assert [shard.name for shard in result.manifest.shards] == ["50% off.tar"]
    assert result.listing.base == f"{server.url}/set?sig=secret"
    assert list(server.reads) == ["/set/50%25%20off.tar?sig=secret"]
    assert "secret" not in (tmp_path / "out" / "manifest.json").read_text()
    with pytest.raises(UserError, match="different queries"):
        list_shards([url, url.replace("secret", "other")])


def test_local_and_remote_shards_do_not_mix(shards):
    with pytest.raises(UserError, match="some of these shards are local, others remote"):
        list_shards([str(shards / "val"), "http://a/x.tar"])


def test_the_base_is_the_longest_common_folder(shards):
    listing = list_shards([str(shards / "train" / "00{0..2}.tar"), str(shards / "val")])
    assert listing.base == str(shards)
    assert listing.names == ("train/000.tar", "train/001.tar", "train/002.tar", "val/000.tar")
    assert list_shards([str(shards / "train")]).names == ("000.tar", "001.tar", "002.tar")
    assert list_shards(["s3://bucket/a/0.tar", "s3://bucket/ab/0.tar"]).base == "s3://bucket"
    assert list_shards(["s3://bucket/0.tar"]).base == "s3://bucket"
    names = list_shards(["pipe:cat {}"], ["b.tar", "{08..10}/{0..1}.tar"]).names
    assert names == (
        "08/0.tar",
        "08/1.tar",
        "09/0.tar",
        "09/1.tar",
        "10/0.tar",
        "10/1.tar",
        "b.tar",
    )
