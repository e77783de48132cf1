"""Tars of any origin are indexed correctly, or refused with a reason; samples are read in place."""

import hashlib
import json
import os
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.bad_samples import BadSampleError
from ganscale.data.manifest import SAMPLE_ROW, Manifest, Shard, check_shards
from ganscale.data.shard_reader import ShardReader
from ganscale.errors import UserError
from ganscale.schema import DataConfig
from ganscale.shards import shard_index
from ganscale.shards.indexing import build_manifest, index_shards
from tests.helpers.images import png
from tests.helpers.tars import labelled, write_tar

STUB = b"\xff\xd8\xff a JPEG no further than its first bytes is indexed too"


def index_shard(path: Path) -> tuple[Shard, np.ndarray]:
    """The shard at `path` and its rows."""
    manifest = index_shards([str(path)]).manifest
    assert manifest is not None
    return manifest.shards[0], manifest.samples


@pytest.fixture
def data_set(tmp_path) -> Path:
    write_tar(tmp_path / "a.tar", labelled(5))
    write_tar(tmp_path / "b.tar", labelled(7, first=5))
    return tmp_path


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_a_plain_tar_of_any_format_indexes_to_its_members_bytes(tmp_path, tar_format):
    long_name = "folder/" * 12 + "image-without-end" * 5  # GNU and PAX need extra headers for it
    members = [*labelled(3), (f"{'x/' * 20}k.png", png(8)), (f"{'x/' * 20}k.cls", b" 7\n")]
    if tar_format != tarfile.USTAR_FORMAT:
        members += [(long_name + ".PNG", png(9)), (long_name + ".cls", b"1")]
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    shard, rows = index_shard(path)
    content = path.read_bytes()
    images = [data for name, data in members if name.lower().endswith("png")]
    found = [content[row["offset"] :][: row["size"]] for row in rows]
    assert found == images
    assert rows["label"].tolist()[:4] == [0, 1, 2, 7]
    assert rows.dtype == SAMPLE_ROW
    assert shard.sha256 == hashlib.sha256(content).hexdigest()
    assert (shard.name, shard.bytes, shard.samples) == ("a.tar", len(content), len(images))


@pytest.mark.parametrize(
    ("extension", "texts", "labels"),
    [
        ("cls", [b"0", b"12\n"], [0, 12]),
        ("json", [b'{"label": 3, "id": 9}', b'{"class": 4}'], [3, 4]),
        ("json", [b'{"caption": "a cat"}', b"[1]"], [-1, -1]),
        ("txt", [b"5", b"6"], [5, 6]),
        ("txt", [b"a photo of a cat", b"7"], [-1, -1]),
        ("seg.png", [b"1", b"2"], [-1, -1]),
    ],
)
def test_labels_are_read_from_the_usual_members(tmp_path, extension, texts, labels):
    members = []
    for i, text in enumerate(texts):
        members += [(f"{i}.jpg", STUB), (f"{i}.{extension}", text)]
    _, rows = index_shard(write_tar(tmp_path / "a.tar", members))
    assert rows["label"].tolist() == labels


def test_members_that_webdataset_skips_are_skipped(tmp_path):
    members = [("__index__/x", b""), ("._0.png", b""), ("d/.DS_Store", b""), ("0.png", png(0))]
    shard, _ = index_shard(write_tar(tmp_path / "a.tar", members))
    assert shard.samples == 1


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([], r"a\.tar: the tar is empty"),
        ([("0.cls", b"1"), ("0.txt", b"x")], r"sample '0' has no image, only cls, txt"),
        (
            [("0.png", STUB), ("0.jpg", STUB)],
            r"sample '0' has two images, \.png and \.jpg",
        ),
        ([("0.png", STUB), ("0.PNG", STUB)], r"member '0\.PNG' occurs twice"),
        (
            [("0.png", STUB), ("1.png", STUB), ("0.cls", b"1")],
            r"sample '0' occurs twice",
        ),
        ([("0.png", STUB), ("README", b"")], r"member 'README' has no extension"),
        (
            [("0.png", STUB), ("0.cls", b"1"), ("1.png", STUB), ("1.cls", b"cat")],
            r"the label of sample '1' in '1\.cls' is 'cat', but others are numbers",
        ),
        (
            [("0.png", STUB), ("0.cls", b"\xff")],
            r"the label of sample '0' in '0\.cls' is not text: b'\\xff'",
        ),
        ([("0.png", STUB), ("0.cls", b"-2")], r"'0\.cls' is -2"),
        (
            [("0.png", STUB), ("0.cls", b"1"), ("1.png", STUB)],
            r"sample '1' has no label",
        ),
        (
            [("0.png", b"<html>404</html>")],
            r"'0\.png' is not a JPEG, .* with b'<html>404</h'",
        ),
        ([("0.png", b"")], r"'0\.png' is not a JPEG"),
        (
            [("0.bmp", b"BM")],
            r"has no image, only bmp .*`ganscale shards write` makes shards of \.bmp",
        ),
        ([("0.cls", b"1"), ("1.cls", b"1")], r"'0' has no image, .* \(and 1 more bad samples\)"),
        ([("img.v1.0.png", b""), ("img.v1.1.png", b"")], r"sample 'img' has no image"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        index_shard(write_tar(tmp_path / "a.tar", members))
    assert "a.tar" in str(raised.value)


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    """Also cuts between members, which tarfile and WebDataset take for the end of the archive."""
    whole = write_tar(tmp_path / "whole.tar", labelled(4)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + 512
    path = tmp_path / "cut.tar"
    for kept in [*range(0, end + 512, 256), last.offset, last.offset_data, end]:
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"cut\.tar: (the tar is cut|not a readable tar)"):
            index_shard(path)


def test_a_damaged_header_and_data_after_the_end_are_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(4))
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(whole[:third] + b"?" + whole[third + 1 :])
    with pytest.raises(UserError, match=f"damaged at byte {third:,}"):
        index_shard(path)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="more data after the end of the archive"):
        index_shard(path)


def test_links_and_compressed_tars_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"'0\.png' is a link"):
        index_shard(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(UserError, match=r"a\.tar: not a readable tar: it is compressed \(gzip\)"):
        index_shard(path)


def test_an_image_of_absurd_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "LARGEST_IMAGE_BYTES", 1 << 20)
    members = [("0.png", png(0)), ("1.png", png(0) + bytes(1 << 20))]
    with pytest.raises(UserError, match=r"'1\.png' has 1,048,\d+ bytes, more than the limit"):
        index_shard(write_tar(tmp_path / "a.tar", members))


def test_the_manifest_counts_shards_samples_classes_and_pixels(data_set):
    (data_set / "classes.json").write_text('["zero", "one", "two"]')
    manifest = build_manifest(data_set)
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    assert manifest.first_sample.tolist() == [0, 5, 12]
    assert manifest.shards_of(np.array([0, 4, 5, 11])).tolist() == [0, 0, 1, 1]
    assert manifest.samples["label"].tolist() == [i % 3 for i in range(12)]
    assert isinstance(manifest.samples, np.memmap)
    assert manifest.class_count == 3
    assert manifest.class_names == ("zero", "one", "two")
    assert manifest.extensions == ("png",)
    assert manifest.resolution == (4, 4)
    assert not list(data_set.glob(".*"))


def test_the_resolution_of_mixed_images_is_none(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png(0, 4)), ("1.png", png(1, 5))])
    assert build_manifest(tmp_path).resolution is None


def test_the_fingerprint_depends_on_contents_only(data_set, tmp_path):
    fingerprint = build_manifest(data_set).fingerprint
    assert build_manifest(data_set, workers=2).fingerprint == fingerprint
    moved = data_set.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert Manifest.load(moved).fingerprint == build_manifest(moved).fingerprint == fingerprint
    members = labelled(5)
    members[1] = ("00000.cls", b"2")
    write_tar(moved / "a.tar", members)
    assert build_manifest(moved).fingerprint != fingerprint


def test_a_manifest_reaches_another_process_as_a_path(data_set):
    manifest = build_manifest(data_set)
    pickled = pickle.dumps(manifest)
    assert len(pickled) < 500
    copy = pickle.loads(pickled)
    assert isinstance(copy.samples, np.memmap)
    assert copy.fingerprint == manifest.fingerprint


def test_shards_that_do_not_go_together_are_named(data_set):
    write_tar(data_set / "c.tar", [("0.png", png(0))])
    with pytest.raises(UserError, match=r"c\.tar is not labelled, unlike a\.tar"):
        build_manifest(data_set)
    with pytest.raises(UserError, match="neither a folder, nor a shard"):
        build_manifest(data_set / "nowhere")
    (data_set / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*\.tar in"):
        build_manifest(data_set / "empty")


def test_too_few_class_names_are_an_error(data_set):
    (data_set / "classes.json").write_text('["zero", "one"]')
    with pytest.raises(UserError, match="names 2 classes, but labels go up to 2"):
        build_manifest(data_set)


def test_loading_explains_what_is_wrong_and_what_to_do(data_set):
    index_again = "ganscale shards index"
    with pytest.raises(UserError, match="no data set at"):
        Manifest.load(data_set / "nowhere")
    with pytest.raises(UserError, match=rf"no manifest\.json in .*{index_again}"):
        Manifest.load(data_set)
    manifest = build_manifest(data_set)
    description = data_set / "manifest.json"
    assert Manifest.load(description).fingerprint == manifest.fingerprint
    text = description.read_text()
    for damaged in (text[:100], "[]", text.replace('"sha256"', '"sha1"')):
        description.write_text(damaged)
        with pytest.raises(UserError, match=f"is damaged .*{index_again}"):
            Manifest.load(data_set)
    description.write_text(json.dumps(json.loads(text) | {"version": 3}))
    with pytest.raises(UserError, match=f"has version 3, not 2; .*{index_again}"):
        Manifest.load(data_set)
    description.write_text(text)
    np.save(data_set / "manifest.npy", manifest.samples[:11])
    with pytest.raises(UserError, match=r"holds \(11,\) rows .* counts 12 samples"):
        Manifest.load(data_set)
    (data_set / "manifest.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(data_set)
    (data_set / "manifest.npy").unlink()
    with pytest.raises(UserError, match=r"lacks its manifest\.npy"):
        Manifest.load(data_set)


def test_missing_and_changed_shards_are_named(data_set):
    manifest = build_manifest(data_set)
    check_shards(manifest)
    shard = data_set / "b.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"b\.tar has .* bytes, but"):
        check_shards(manifest)
    shard.unlink()
    with pytest.raises(UserError, match=r"b\.tar of the manifest is missing"):
        check_shards(manifest)


def test_the_store_reads_what_tarfile_reads_and_names_its_samples(data_set, monkeypatch):
    monkeypatch.setattr("ganscale.data.shard_reader._MAX_OPEN_SHARDS", 1)
    store = ShardReader(build_manifest(data_set), DataConfig(path=""))
    expected = []
    for path in sorted(data_set.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith("png"):
                    expected.append((path.name, member.name[:-4], file.read()))
    for sample in reversed(range(12)):
        assert (*store.shard_and_key(sample), store.read(sample)) == expected[sample]
    store.close()
    assert store.read(0) == expected[0][2]


def test_the_store_keeps_a_bounded_number_of_files_open_under_many_threads(tmp_path, monkeypatch):
    for shard in range(12):
        write_tar(tmp_path / f"{shard:02d}.tar", labelled(4, first=shard * 4))
    monkeypatch.setattr("ganscale.data.shard_reader._MAX_OPEN_SHARDS", 3)
    store = ShardReader(build_manifest(tmp_path), DataConfig(path=""))
    expected = [png(i) for i in range(48)]
    wrong = []

    def read_all(seed: int) -> None:
        for sample in np.random.default_rng(seed).permutation(np.arange(480) % 48):
            if store.read(int(sample)) != expected[sample]:
                wrong.append(sample)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    open_files = [p for p in Path("/proc/self/fd").iterdir() if p.exists()]
    assert len([p for p in open_files if p.resolve().is_relative_to(tmp_path)]) <= 3 + 1  # the rows


def test_a_cut_shard_is_a_bad_sample_and_a_missing_one_a_users_mistake(data_set):
    store = ShardReader(build_manifest(data_set), DataConfig(path=""))
    shard = data_set / "b.tar"
    row = store.manifest.samples[6]
    os.truncate(shard, int(row["offset"]) + 10)
    with pytest.raises(BadSampleError, match=r"is cut: 10 of"):
        store.read(6)
    assert store.shard_and_key(6)[0] == "b.tar"
    store.close()
    shard.unlink()
    with pytest.raises(UserError, match=r"b\.tar of the manifest is missing"):
        store.read(6)
