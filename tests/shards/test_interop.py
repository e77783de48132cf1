"""Indices of other tools are read and written as those tools do it, and checked where possible."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.exclusions import Exclusion
from ganscale.shards.indexing import build_manifest, index_shards
from ganscale.shards.interop import read_wids, write_wids
from tests.helpers.tars import labelled, overwrite, write_tar


def write_idx(shard: Path) -> Path:
    """Like DALI's tools/wds2idx.py, v1.2: from the output of `tar --list`, where data ends at the
    block of the next entry. Reimplemented here, since the tool is not packaged.
    """

    def run(*options: str) -> list[str]:
        command = ["tar", *options, "--file", str(shard)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, check=True
        ).stdout.splitlines()

    blocks = [line.split(": ", 1) for line in run("--list", "--block-num")]
    details = [line.split() for line in run("--verbose", "--list")]
    components: dict[str, list[str]] = {}
    for (_, name), (following, _), words in zip(blocks, blocks[1:], details, strict=False):
        size = int(words[2])
        end = int(following.removeprefix("block ")) * 512
        offset = (end - size) // 512 * 512
        extension = name.rpartition("/")[2].partition(".")[2]
        key = name[: len(name) - len(extension) - 1]
        components.setdefault(key, []).append(f"{extension} {offset} {size} {name}")
    lines = [f"v1.2 {len(components)}", *(" ".join(parts) for parts in components.values())]
    idx = shard.with_suffix(".idx")
    idx.write_text("\n".join(lines) + "\n")
    return idx


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_a_trusted_idx_gives_the_same_rows_as_reading_the_shard(tmp_path, tar_format):
    """Also with names that need an extra header, and beside a shard without .idx."""
    folder = "a/" * 60 if tar_format == tarfile.GNU_FORMAT else ""
    members = [(folder + name, content) for name, content in labelled(5)]
    shard = write_tar(tmp_path / "0.tar", members, tar_format)
    write_tar(tmp_path / "1.tar", labelled(3))
    whole = build_manifest(tmp_path)
    write_idx(shard)
    result = index_shards([str(tmp_path)], trust_idx=True)
    assert result.read == 1
    trusted = result.manifest
    assert trusted is not None
    assert trusted.samples.tobytes() == whole.samples.tobytes()
    assert [bool(shard.sha256) for shard in trusted.shards] == [False, True]
    assert [shard.bytes for shard in trusted.shards] == [shard.bytes for shard in whole.shards]
    assert trusted.resolution is None
    assert trusted.fingerprint != whole.fingerprint
    again = index_shards([str(tmp_path)], trust_idx=True)
    assert again.read == 0
    assert index_shards([str(tmp_path)]).manifest.fingerprint == whole.fingerprint  # type: ignore[union-attr]


def test_with_a_trusted_idx_images_are_not_read(tmp_path):
    """An image whose first bytes are good and whose rest is garbage is not noticed."""
    shard = write_tar(tmp_path / "0.tar", labelled(5))
    row = build_manifest(tmp_path).samples[2]
    write_idx(shard)
    overwrite(shard, int(row["offset"]) + 20, b"garbage")
    os.utime(tmp_path / "0.idx")
    manifest = index_shards([str(tmp_path)], trust_idx=True).manifest
    assert manifest is not None
    assert len(manifest.samples) == 5


def test_an_idx_that_does_not_match_is_named(tmp_path):
    shard = write_tar(tmp_path / "0.tar", labelled(5))
    idx = write_idx(shard)
    text = idx.read_text()
    lines = text.splitlines()
    first_offset = lines[1].split()[1]
    for damaged, sentence in (
        (text.replace("v1.2 5", "v1.1 5"), "not a complete index of DALI's wds2idx, version v1.2"),
        ("\n".join(lines[:-1]) + "\n", "not a complete"),
        ("", "not a complete index of DALI's"),
        (text.replace(" 00000.png", " 00000 a.png"), "line 2: not `extension offset size name`"),
        (text.replace(f" {first_offset} ", " 5120000 ", 1), "reaches into the next|it puts member"),
        (text.replace(f" {first_offset} ", " 0 ", 1), "it puts member '.*' at bytes 0 to"),
        (
            text.replace(f" {first_offset} ", " 513 ", 1),
            "it puts member '.*' at bytes 513 to",
        ),
        (text.replace(lines[3].split()[1], str(int(lines[3].split()[1]) - 512)), "reaches into"),
        (text.replace("00004.cls", "00004.json").replace(" 1 ", " 2 "), "no member|reaches"),
    ):
        idx.write_text(damaged)
        with pytest.raises(UserError, match=sentence) as raised:
            index_shards([str(tmp_path)], trust_idx=True)
        assert "0.idx" in str(raised.value)
    idx.write_text(text)
    os.utime(idx, ns=(1, 1))
    with pytest.raises(UserError, match="older than the shard"):
        index_shards([str(tmp_path)], trust_idx=True)
    os.utime(idx)
    os.truncate(shard, shard.stat().st_size - 20 * 512 + 100)
    os.utime(idx)
    with pytest.raises(UserError, match=r"it puts member|the tar is cut"):
        index_shards([str(tmp_path)], trust_idx=True)


def test_a_wids_index_lists_shards_and_their_counts_are_compared(tmp_path):
    write_tar(tmp_path / "shards" / "b.tar", labelled(2))
    write_tar(tmp_path / "shards" / "a.tar", labelled(3))
    write_tar(tmp_path / "shards" / "not-listed.tar", labelled(3))
    shards = [{"url": "shards/a.tar", "nsamples": 3}, {"url": "shards/b.tar", "nsamples": 2}]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    manifest = index_shards([str(path)]).manifest
    assert manifest is not None
    assert manifest.root == tmp_path / "shards"
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    content["shardlist"] = [{"url": "a.tar", "nsamples": 3}, {"url": "b.tar", "nsamples": 4}]
    path.write_text(json.dumps({**content, "base": "shards"}))
    with pytest.raises(UserError, match=r"b\.tar has 2 samples, .* index lists it with 4"):
        index_shards([str(path)], again=True)


def test_a_sample_without_a_label_is_named_also_if_a_wids_index_counts_it(tmp_path):
    members = labelled(3)
    write_tar(tmp_path / "a.tar", [m for m in members if m[0] != members[-1][0]])
    shards = [{"url": "a.tar", "nsamples": 3}]
    (tmp_path / "set.json").write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    with pytest.raises(UserError, match=r"has no label, but others have"):
        index_shards([str(tmp_path / "set.json")])


def test_the_shards_of_several_wids_indices_are_indexed_together(tmp_path):
    paths = []
    for name, count in (("a", 3), ("b", 2)):
        write_tar(tmp_path / f"{name}.tar", labelled(count))
        shards = [{"url": f"{name}.tar", "nsamples": count}]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    manifest = index_shards([str(path) for path in paths]).manifest
    assert manifest is not None
    assert {shard.name: shard.samples for shard in manifest.shards} == {"a.tar": 3, "b.tar": 2}


def test_a_wids_index_cannot_run_commands(tmp_path):
    path = tmp_path / "set.json"
    content = {"wids_version": 1, "shardlist": [{"url": "pipe:touch x", "nsamples": 3}]}
    for bad, sentence in (
        (content, "lists 'pipe:touch x', which is not a URL"),
        (content | {"base": "pipe:x/{}"}, "lists 'pipe:x"),
        (content | {"wids_version": 2}, "only WebDataset indices of version 1"),
        (content | {"shardlist": [{"url": 3, "nsamples": 3}]}, "is not a shard"),
        (content | {"shardlist": [{"url": "a.tar", "nsamples": "3"}]}, "is not a shard"),
        ({"wids_version": 1}, "is not a WebDataset index"),
        ([], "is not a WebDataset index"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=sentence):
            _read(path)


def test_a_written_wids_index_can_be_read(tmp_path):
    """It has the fields that wids needs, url and nsamples, with relative URLs where possible."""
    folder = tmp_path / "set"
    write_tar(folder / "a.tar", labelled(3))
    write_tar(folder / "b.tar", labelled(2))
    manifest = build_manifest(folder)
    write_wids(manifest, folder / "wids.json", [3, 2])
    content = json.loads((folder / "wids.json").read_text())
    assert content["__kind__"] == "wids-shard-index-v1"
    assert content["wids_version"] == 1
    assert content["shardlist"][1] == {
        "url": "b.tar",
        "nsamples": 2,
        "filesize": (folder / "b.tar").stat().st_size,
    }
    moved = folder.rename(tmp_path / "moved")
    assert _read(moved / "wids.json") == [
        (str(moved / "a.tar"), 3),
        (str(moved / "b.tar"), 2),
    ]
    write_wids(Manifest.load(moved), tmp_path / "elsewhere.json", [3, 2])
    assert _read(tmp_path / "elsewhere.json")[0] == (str(moved / "a.tar"), 3)


def test_a_shard_with_fewer_samples_than_img2dataset_wrote_is_named(tmp_path):
    write_tar(tmp_path / "00000.tar", labelled(5))
    stats = tmp_path / "00000_stats.json"
    for successes, is_fine in ((5, True), (4, True), (6, False)):
        stats.write_text(json.dumps({"count": 9, "successes": successes, "status_dict": {}}))
        if is_fine:
            index_shards([str(tmp_path)], again=True)
        else:
            with pytest.raises(UserError, match=r"00000\.tar has 5 .* img2dataset wrote 6"):
                index_shards([str(tmp_path)], again=True)
    stats.write_text(json.dumps({"successes": 5}))
    exclusions = [Exclusion("00000.tar", "00001", "")]
    assert index_shards([str(tmp_path)], exclusions=exclusions).excluded_samples == 1
    stats.write_text("not JSON")
    index_shards([str(tmp_path)], again=True)


def _read(path: Path) -> list[tuple[str, int]]:
    return read_wids(str(path), path.read_bytes())
