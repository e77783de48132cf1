"""Writing gives the same shards however it is run, and reports everything that it leaves out."""

import gc
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ganscale.data.images.decoding import decode
from ganscale.data.manifest import Manifest
from ganscale.data.shard_reader import ShardReader
from ganscale.errors import UserError
from ganscale.schema import DataConfig
from ganscale.shards import bundled, sources
from ganscale.shards.class_labels import MemberChoice
from ganscale.shards.writing import write_shards
from tests.helpers.disks import remount, small_disk
from tests.helpers.images import png
from tests.helpers.processes import end_tree, wait_until

photo = partial(png, height=12, width=16)


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def images(count: int) -> dict[str, bytes]:
    return {f"{'cat' if i % 3 else 'dog'}/{i:03d}.png": photo(i) for i in range(count)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("photos"), images(40))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """All files of the data set except the journals, which depend on the order of writing."""
    journals = ("writing.jsonl", "indexing.json")
    files = [p for p in folder.iterdir() if p.name not in journals]
    return {path.name: path.read_bytes() for path in files}


def contents(manifest: Manifest) -> dict[bytes, int]:
    store = ShardReader(manifest, DataConfig(path=""))
    labels = manifest.samples["label"].tolist()
    return {store.read(i): label for i, label in enumerate(labels)}


def test_any_number_of_workers_gives_the_same_bytes(photos, tmp_path):
    for workers in (1, 2):
        write_shards(
            str(photos),
            tmp_path / str(workers),
            resolution=8,
            classes="folder",
            shard_samples=9,
            workers=workers,
        )
    written = shard_bytes(tmp_path / "1")
    assert sorted(written) == [
        "classes.json",
        "manifest.json",
        "manifest.npy",
        *(f"shard-{i:06d}.tar" for i in range(5)),
    ]
    assert shard_bytes(tmp_path / "2") == written


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_sees_the_samples_that_the_manifest_lists(photos, tmp_path):
    """WebDataset leaves its files to the garbage collector, hence the ignored warnings."""
    from webdataset.compat import WebDataset

    manifest = write_shards(
        str(photos), tmp_path, resolution=8, classes="folder", shard_samples=15
    ).manifest
    store = ShardReader(manifest, DataConfig(path=""))
    urls = [str(tmp_path / shard.name) for shard in manifest.shards]
    samples = list(WebDataset(urls, shardshuffle=False))
    assert len(samples) == 40
    for i, sample in enumerate(samples):
        assert store.shard_and_key(i)[1] == sample["__key__"] == f"{i:09d}"
        assert store.read(i) == sample["png"]
        assert manifest.samples["label"][i] == int(sample["cls"])
    gc.collect()


def test_unchanged_files_are_stored_as_they_are(photos, tmp_path):
    result = write_shards(str(photos), tmp_path, classes="folder")
    assert contents(result.manifest) == {
        data: int(name.startswith("dog")) for name, data in images(40).items()
    }
    assert result.manifest.class_names == ("cat", "dog")
    assert result.manifest.resolution == (12, 16)
    unlabelled = write_shards(str(photos), tmp_path / "unlabelled").manifest
    assert set(contents(unlabelled).values()) == {-1}
    assert unlabelled.class_count == 0


def test_a_folder_a_zip_and_a_tar_of_it_give_the_same_data_set(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(photos.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(photos))
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, ".")
    fingerprints = {
        write_shards(str(source), tmp_path / name, classes="folder").manifest.fingerprint
        for name, source in (
            ("folder", photos),
            ("zip", tmp_path / "photos.zip"),
            ("tar", tmp_path / "photos.tar"),
        )
    }
    assert len(fingerprints) == 1


def test_samples_are_shuffled_by_the_seed_and_every_shard_has_every_class(photos, tmp_path):
    manifests = [
        write_shards(
            str(photos), tmp_path / str(seed), classes="folder", shard_samples=20, seed=seed
        ).manifest
        for seed in (0, 1)
    ]
    assert contents(manifests[0]) == contents(manifests[1])
    orders = [list(contents(manifest)) for manifest in manifests]
    assert orders[0] != orders[1]
    for manifest in manifests:
        for first in (0, 20):
            assert set(manifest.samples["label"][first : first + 20]) == {0, 1}


@pytest.mark.parametrize(
    ("options", "extension", "is_exact"),
    [
        ({"image_format": "png"}, "png", True),
        ({"image_format": "webp"}, "webp", True),
        ({"image_format": "npy"}, "npy", True),
        ({"image_format": "jpeg", "quality": 90}, "jpg", False),
        ({"image_format": "webp", "quality": 90}, "webp", False),
    ],
)
def test_each_format_stores_the_resized_pixels(photos, tmp_path, options, extension, is_exact):
    manifest = write_shards(str(photos), tmp_path, resolution=8, **options).manifest
    assert manifest.extensions == (extension,)
    assert manifest.resolution == (8, 8)
    stored = sorted(decode(data, 8, 3).tobytes() for data in contents(manifest))
    expected = sorted(decode(photo(i), 8, 3).tobytes() for i in range(40))
    assert (stored == expected) == is_exact


def test_bundled_sets_keep_pixels_labels_and_names(tmp_path):
    manifest = write_shards("bundled:mnist", tmp_path, shard_samples=2500).manifest
    digits = bundled.load("mnist")
    assert (len(manifest.samples), manifest.resolution) == (5000, (32, 32))
    assert manifest.class_names == tuple(digits.class_names)
    stored = [(decode(data, 32, 1).tobytes(), label) for data, label in contents(manifest).items()]
    assert set(stored) == {
        (image.tobytes(), int(label))
        for image, label in zip(digits.images, digits.labels, strict=True)
    }


def test_bundled_sets_are_stored_without_classes_when_asked(tmp_path):
    manifest = write_shards("bundled:mnist", tmp_path, classes="none").manifest
    assert (manifest.class_count, manifest.class_names) == (0, ())
    unusable: list[dict[str, Any]] = [{"splits": ["0"]}, {"image": "png"}, {"classes": "folder"}]
    for options in unusable:
        with pytest.raises(UserError, match="a bundled set has its own images and classes"):
            write_shards("bundled:mnist", tmp_path / "other", **options)


def test_shards_have_about_the_requested_size(photos, tmp_path):
    manifest = write_shards(
        str(photos),
        tmp_path,
        resolution=8,
        image_format="npy",
        classes="folder",
        shard_bytes=40_000,
    ).manifest
    sizes = [shard.bytes for shard in manifest.shards]
    assert len(sizes) > 2
    assert all(25_000 < size <= 50_000 for size in sizes[:-1])


def test_bad_images_are_left_out_counted_and_named_up_to_a_share(tmp_path):
    files = {f"{i:03d}.png": photo(i) for i in range(30)}
    files |= {
        "cut.png": photo(50)[:60],
        "page.jpg": b"<html>",
        "notes.txt": b"",
        ".hidden.png": b"",
    }
    source = str(write_files(tmp_path / "source", files))
    for _ in range(2):  # the second time, the shard is there
        with pytest.raises(UserError, match=r"2 of 32 images are bad.*--max-bad.*cut.*page"):
            write_shards(source, tmp_path / "shards")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Manifest.load(tmp_path / "shards")
    result = write_shards(source, tmp_path / "shards", max_bad=0.1)
    assert [name for name, _ in result.bad_images] == ["cut.png", "page.jpg"]
    assert len(result.manifest.samples) == 30
    assert result.ignored == {"(hidden)": 1, "txt": 1}
    again = write_shards(source, tmp_path / "shards", max_bad=0.1)
    assert (again.bad_images, again.kept_shards) == (result.bad_images, 1)


def test_shards_of_bad_images_only_are_left_out(tmp_path):
    files = {"a.png": photo(0), "b.png": b"?", "c.png": photo(1), "d.png": b"?"}
    source = str(write_files(tmp_path / "source", files))
    result = write_shards(source, tmp_path / "shards", shard_samples=1, max_bad=0.5)
    assert len(result.manifest.shards) == 2
    write_files(tmp_path / "bad", {"b.png": b"?"})
    with pytest.raises(UserError, match=r"the first 1 images cannot be decoded"):
        write_shards(str(tmp_path / "bad"), tmp_path / "none", max_bad=1.0)


def test_a_repeated_command_writes_only_what_is_missing(photos, tmp_path):
    def write():
        return write_shards(str(photos), tmp_path, classes="folder", shard_samples=10)

    write()
    complete = shard_bytes(tmp_path)
    assert write().kept_shards == 4
    (tmp_path / "shard-000002.tar").unlink()
    os.truncate(tmp_path / "shard-000001.tar", 1000)
    (tmp_path / "manifest.json").unlink()
    with (tmp_path / "writing.jsonl").open("a") as file:
        file.write('["shard-0000')  # the machine stopped here
    assert write().kept_shards == 2
    assert shard_bytes(tmp_path) == complete
    assert write().kept_shards == 4


def test_a_killed_command_continues_and_ends_with_the_same_bytes(tmp_path):
    options: dict[str, Any] = {"image_format": "png", "shard_samples": 100, "workers": 2}
    program = (
        "from ganscale.shards.writing import write_shards\n"
        "if __name__ == '__main__':\n"
        f"    write_shards('bundled:mnist', {str(tmp_path / 'killed')!r}, **{options!r})\n"
    )
    script = tmp_path / "write.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    killed = tmp_path / "killed"
    try:
        wait_until(lambda: len(list(killed.glob("*.tar"))) >= 3, 60, process=process)
    finally:
        end_tree(process)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    options["workers"] = 1
    result = write_shards("bundled:mnist", tmp_path / "killed", **options)
    assert 0 < result.kept_shards < 50
    write_shards("bundled:mnist", tmp_path / "whole", **options)
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk_gives_a_clear_error_and_the_same_command_continues(disk, tmp_path):
    """It continues at the shard that did not fit."""
    photos = write_files(tmp_path / "photos", {f"{i:02d}.png": png(i, 64) for i in range(30)})
    options: dict[str, Any] = {"shard_samples": 5}
    with pytest.raises(UserError, match=r"^cannot write to .*disk: the disk is full; .* continue"):
        write_shards(str(photos), disk, **options)
    finished = len(list(disk.glob("*.tar")))
    assert 1 <= finished < 6
    assert not list(disk.glob("*.partial"))
    remount(disk, "size=8m")
    result = write_shards(str(photos), disk, **options)
    assert result.kept_shards >= 1
    write_shards(str(photos), tmp_path / "whole", **options)
    assert shard_bytes(disk) == shard_bytes(tmp_path / "whole")


def test_another_command_into_the_same_folder_is_refused(photos, tmp_path):
    write_shards(str(photos), tmp_path, resolution=8)
    with pytest.raises(UserError, match=r"another `ganscale shards write`, with a different seed;"):
        write_shards(str(photos), tmp_path, resolution=8, seed=1)
    with pytest.raises(UserError, match="with a different source;"):
        write_shards("bundled:mnist", tmp_path, resolution=8)
    with pytest.raises(UserError, match="with a different resolution;"):  # not: shard_samples
        write_shards(str(photos), tmp_path, resolution=16)
    (tmp_path / "writing.jsonl").unlink()
    with pytest.raises(UserError, match="already contains shards"):
        write_shards(str(photos), tmp_path, resolution=8)


def test_sources_that_cannot_be_used_are_named(tmp_path):
    cut = b"PK\x03\x04" + b"?" * 600
    write_files(tmp_path, {"empty/readme.md": b"", "file.bin": b"?" * 600, "cut.zip": cut})
    for source, sentence in {
        tmp_path / "nowhere": "no folder, zip or tar at",
        tmp_path / "empty": "no images in",
        tmp_path / "file.bin": "is not a folder, zip or uncompressed tar",
        tmp_path / "cut.zip": "is a damaged zip, perhaps cut short",
        "bundled:cats": "unknown bundled set 'cats'",
    }.items():
        with pytest.raises(UserError, match=sentence):
            write_shards(str(source), tmp_path / "shards")


def test_options_that_contradict_each_other_are_refused(photos, tmp_path):
    contradictions: list[tuple[dict[str, Any], str]] = [
        ({"image_format": "keep", "resolution": 8}, "keep stores files as they are"),
        ({"image_format": "png", "quality": 90}, "only jpeg and webp have a quality"),
        ({"image_format": "jpeg", "quality": 101}, "from 1 to 100"),
        ({"image_format": "gif"}, "unknown format 'gif'"),
    ]
    for options, sentence in contradictions:
        with pytest.raises(UserError, match=sentence):
            write_shards(str(photos), tmp_path / "shards", **options)


def test_classes_are_the_first_folders_that_differ(tmp_path):
    names = ("set/train/dog/a/1.png", "set/train/cat/2.png", "set/train/cat/b/3.png")
    root = write_files(tmp_path / "deep", dict.fromkeys(names, b""))
    source = sources.list_images(str(root), MemberChoice(classes="folder"))
    assert source.class_names == ["cat", "dog"]
    assert {image.name.split("/")[2]: image.label for image in source.images} == {
        "cat": 0,
        "dog": 1,
    }
    write_files(root, {"set/train/stray.png": b""})
    with pytest.raises(UserError, match=r"set/train/stray\.png is not in a class folder"):
        sources.list_images(str(root), MemberChoice(classes="folder"))


def test_a_damaged_zip_member_is_a_bad_image(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", photo(i))
    data = bytearray(path.read_bytes())
    data[data.index(photo(1)) + 100] ^= 255
    path.write_bytes(data)
    result = write_shards(str(path), tmp_path / "shards", max_bad=0.5)
    assert [name for name, _ in result.bad_images] == ["1.png"]
    assert "cannot be unpacked" in result.bad_images[0][1]


def test_the_journal_contains_no_path_of_this_machine(photos, tmp_path):
    write_shards(str(photos), tmp_path)
    for name in ("writing.jsonl", "manifest.json"):
        text = (tmp_path / name).read_text()
        assert str(photos) not in text
        assert json.loads(text.splitlines()[0] if name.endswith("l") else text)
