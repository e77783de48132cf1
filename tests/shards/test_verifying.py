"""Verifying finds every bad image and every changed shard, and goes on to the end."""

import os
from pathlib import Path

import pytest

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.exclusions import read_list
from ganscale.shards.indexing import build_manifest
from ganscale.shards.verifying import Findings, verify_shards
from tests.helpers.images import jpeg
from tests.helpers.tars import write_tar
from tests.shards.test_shards_cli import run


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four shards, the second with two images that begin well and end in the middle."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        images = {f"d/{number}-{i}.jpg": jpeg(10 * number + i) for i in range(6)}
        if number == 1:
            for name in ("d/1-2.jpg", "d/1-5.jpg"):
                images[name] = images[name][:400]
        write_tar(folder / f"{number}.tar", images.items())
    build_manifest(folder)
    return folder


def findings(folder: Path, **options) -> dict[str, Findings]:
    return {found.shard: found for found in verify_shards(Manifest.load(folder), **options)}


def test_every_image_is_decoded_and_bad_ones_are_named(photos):
    for workers in (1, 2):
        found = findings(photos, workers=workers)
        assert sorted(found) == ["0.tar", "1.tar", "2.tar", "3.tar"]
        assert [key for key, _ in found["1.tar"].bad] == ["d/1-2", "d/1-5"]
        assert all("cannot be decoded" in reason for _, reason in found["1.tar"].bad)
        assert all(not shard.problem for shard in found.values())
        assert all(not shard.bad for name, shard in found.items() if name != "1.tar")


def test_changed_and_missing_shards_are_named_and_do_not_stop_the_rest(photos):
    """A single bit, one more block, a cut, another tar of the same size, and none at all."""
    whole = (photos / "0.tar").read_bytes()
    row = Manifest.load(photos).samples[2]
    flipped = bytearray(whole)
    flipped[int(row["offset"]) + 300] ^= 1
    other = {f"d/0-{i}.jpg": jpeg(i) for i in (1, 0, 2, 3, 4, 5)}
    for content, sentence in (
        (bytes(flipped), "has changed since it was indexed: its SHA-256 is"),
        (whole + bytes(512), "has changed since it was indexed: it has"),
        (whole[:3000], "has changed since it was indexed: the tar: the tar is cut"),
        (b"", "has changed since it was indexed: the tar: not a readable tar"),
        (other, "has changed since it was indexed: "),
        (None, "is missing"),
    ):
        if content is None:
            (photos / "0.tar").unlink()
        elif isinstance(content, dict):
            write_tar(photos / "0.tar", content.items())
        else:
            (photos / "0.tar").write_bytes(content)
        found = findings(photos)
        assert sentence in found["0.tar"].problem
        assert not found["0.tar"].bad
        assert len(found["1.tar"].bad) == 2
        assert not found["3.tar"].problem


def test_the_command_tells_all_and_its_list_leaves_the_bad_ones_out(photos, tmp_path, capsys):
    todo = tmp_path / "todo.jsonl"
    with pytest.raises(UserError, match=r"cannot be decoded: 2; shards .* changed: 0$"):
        run("verify", str(photos), "--workers", "1", "--leave-out", str(todo))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1
    assert table[0].startswith("1.tar          2  'd/1-2' and others cannot be decoded")
    assert [sample.key for sample in read_list(todo).samples] == ["d/1-2", "d/1-5"]
    with pytest.raises(UserError):
        run("verify", str(photos), "--workers", "1", "--leave-out", str(todo))
    assert len(read_list(todo).samples) == 2  # nothing twice
    capsys.readouterr()
    before = Manifest.load(photos).fingerprint
    assert run("index", str(photos), "--workers", "1", "--leave-out", str(todo)) == 0
    said = capsys.readouterr().out
    assert "unchanged, not read again: 3 of 4 shards\n" in said
    assert "left out: 2 samples, 0 whole shards\n" in said
    assert Manifest.load(photos).fingerprint != before
    assert run("verify", str(photos), "--workers", "1") == 0
    assert capsys.readouterr().out == "all 22 images in 4 shards are good\n"


def test_the_command_says_what_to_do_about_a_changed_shard(photos, capsys):
    os.truncate(photos / "2.tar", 2000)
    with pytest.raises(UserError, match=r"changed: 1 \(to index .*ganscale shards index"):
        run("verify", str(photos), "--workers", "1")
    assert "2.tar          6  has changed since" in capsys.readouterr().out


def test_shards_in_another_place_are_verified_there(photos, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in photos.glob("*.tar"):
        shard.rename(moved / shard.name)
    assert all(found.problem == "is missing" for found in findings(photos).values())
    assert not any(found.problem for found in findings(photos, base=str(moved)).values())


def test_a_manifest_that_is_made_anew_meanwhile_stops_verifying(photos):
    old = Manifest.load(photos)
    (photos / "3.tar").unlink()
    build_manifest(photos)
    with pytest.raises(UserError, match="was made anew meanwhile"):
        list(verify_shards(old))
