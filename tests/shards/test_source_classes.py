"""The classes of a folder or archive are those that its maker meant, or a sentence asks for one."""

import json
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.writing import WriteResult, write_shards
from tests.helpers.images import png
from tests.shards.test_shards_cli import run

Files = dict[str, bytes]


def as_folder(path: Path, files: Files) -> str:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def as_zip(path: Path, files: Files, separator: str = "/") -> str:
    with zipfile.ZipFile(f"{path}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("/", separator), data)
    return f"{path}.zip"


def as_tar(path: Path, files: Files) -> str:
    as_folder(path, files)
    with tarfile.open(f"{path}.tar", "w") as archive:
        archive.add(path, ".")
    return f"{path}.tar"


packers = pytest.mark.parametrize(
    "pack", [as_folder, as_zip, as_tar, partial(as_zip, separator="\\")],
    ids=["folder", "zip", "tar", "zip with backslashes"],
)  # fmt: skip
Pack = Callable[[Path, Files], str]


def stylegan(labels: Any, count: int = 6) -> Files:
    """As dataset_tool.py writes it."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(0, 500 * count, 500)]
    files = {name: png(i) for i, name in enumerate(names)}
    pairs = None if labels is None else [[n, label] for n, label in zip(names, labels, strict=True)]
    return files | {"dataset.json": json.dumps({"labels": pairs}).encode()}


def labelled(result: WriteResult) -> dict[bytes, int]:
    """The class of each image, by the bytes of its file."""
    manifest = result.manifest
    shards = [(manifest.root / shard.name).read_bytes() for shard in manifest.shards]
    assert len(shards) == 1
    return {
        shards[0][row["offset"] :][: row["size"]]: int(row["label"]) for row in manifest.samples
    }


@packers
def test_the_labels_of_a_stylegan_data_set_are_kept(tmp_path, pack: Pack):
    source = pack(tmp_path / "source", stylegan([2, 0, 1, 2, 0, 5]))
    result = write_shards(source, tmp_path / "shards")
    assert labelled(result) == {png(i): label for i, label in enumerate([2, 0, 1, 2, 0, 5])}
    assert (result.manifest.class_count, result.manifest.class_names) == (6, ())
    without = write_shards(source, tmp_path / "without", classes="none")
    assert set(labelled(without).values()) == {-1}
    with pytest.raises(
        UserError, match=r"only number the images, .*`--classes json` takes classes"
    ):
        write_shards(source, tmp_path / "other", classes="folder")


def test_folders_are_the_classes_if_they_are_chosen_beside_a_dataset_json(tmp_path):
    files = image_folder("a") | {"a/dataset.json": b'{"labels": 3}'}
    result = write_shards(as_zip(tmp_path / "source", files), tmp_path / "1", classes="folder")
    assert result.manifest.class_names == ("cat", "dog")
    assert result.notes == ["dataset.json is not used; --classes json takes the classes from it"]


def test_stylegan_labels_may_be_names_and_paths_of_windows(tmp_path):
    files = stylegan(["cat", "dog", "cat", "dog", "dog", "ant"])
    files["dataset.json"] = files["dataset.json"].replace(b"/", rb"\\")
    result = write_shards(as_zip(tmp_path / "source", files), tmp_path / "shards")
    assert list(labelled(result).values()).count(2) == 3
    assert result.manifest.class_names == ("ant", "cat", "dog")
    assert json.loads((tmp_path / "shards" / "classes.json").read_text()) == ["ant", "cat", "dog"]


def test_numbered_folders_are_not_classes(tmp_path):
    for name, files in {
        "stylegan": stylegan(None),
        "img2dataset": {f"{i // 2:05d}/{i // 2:05d}{i:04d}.jpg": png(i) for i in range(4)},
    }.items():
        source = as_folder(tmp_path / name, files)
        assert set(labelled(write_shards(source, tmp_path / f"{name}-shards")).values()) == {-1}
        with pytest.raises(UserError, match=r"only number the images, so they are not classes"):
            write_shards(source, tmp_path / "other", classes="folder")
    digits = as_folder(tmp_path / "digits", {f"{i}/{i}{i}0.png": png(i) for i in range(3)})
    result = write_shards(digits, tmp_path / "digit-shards", classes="folder")
    assert result.manifest.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1, None, 1, 1, 1], r"img00001000\.png' has no label, .* have \(dataset\.json\)"),
        ([0, 1, "cat", 1, 1, 1], r"'00001/img00001000\.png' in dataset\.json is 'cat', but others"),
        ([[0.1, 0.9]] * 6, r"in dataset\.json is \[0\.1, 0\.9\], not one class; `--classes none`"),
        ([-1] * 6, r"in dataset\.json is -1, not a class; .* \(and 5 more\)"),
    ],
)  # fmt: skip
def test_stylegan_labels_that_are_not_classes_are_refused(tmp_path, labels, sentence):
    source = as_zip(tmp_path / "source", stylegan(labels))
    with pytest.raises(UserError, match=sentence):
        write_shards(source, tmp_path / "shards")
    assert write_shards(source, tmp_path / "shards", classes="none").manifest.class_count == 0


@packers
@pytest.mark.parametrize("labels", [None, [None] * 6], ids=["null", "of nulls"])
def test_a_stylegan_data_set_without_labels_is_unlabelled(tmp_path, pack: Pack, labels):
    source = pack(tmp_path / "source", stylegan(labels))
    result = write_shards(source, tmp_path / "shards")
    assert set(labelled(result).values()) == {-1}
    (note,) = result.notes
    assert note.endswith("dataset.json has no labels, so the images are stored without classes")
    with pytest.raises(UserError, match=r"has no label \(json\); `--classes none`"):
        write_shards(source, tmp_path / "other", classes="json")


def test_labels_of_some_images_only_are_refused_with_the_first_that_lacks_one(tmp_path):
    source = as_zip(tmp_path / "source", stylegan([2, None, 1, None, 0, 5]))
    sentence = r"00000/img00000500\.png' has no label, but others have .*\(and 1 more\)"
    with pytest.raises(UserError, match=sentence):
        write_shards(source, tmp_path / "shards")


def zip_of_names(path: Path, names: list[bytes]) -> str:
    """A zip whose names do not say their encoding, as Windows and macOS write them."""
    placeholders = [f"{i:03d}".ljust(len(name), "x") for i, name in enumerate(names)]
    source = as_zip(path, {name: png(i) for i, name in enumerate(placeholders)})
    data = Path(source).read_bytes()
    for placeholder, name in zip(placeholders, names, strict=True):
        data = data.replace(placeholder.encode(), name)
    Path(source).write_bytes(data)
    return source


# The second byte of 俓 in GBK is a backslash, as zips of old Windows have between folders.
_NAMES = ["俓/1.png", "猫/2.png", "猫\\3.png"]


@pytest.mark.parametrize(
    ("written", "option"), [("utf-8", ""), ("gbk", "gbk"), ("gb18030", "GB18030")]
)
def test_class_names_of_a_zip_without_an_encoding_are_readable(tmp_path, written, option):
    source = zip_of_names(tmp_path / "source", [name.encode(written) for name in _NAMES])
    result = write_shards(source, tmp_path / "shards", classes="folder", zip_encoding=option)
    names = result.manifest.class_names
    class_of = {image: names[label] for image, label in labelled(result).items()}
    assert class_of == {png(0): "俓", png(1): "猫", png(2): "猫"}
    assert result.notes == []


def test_names_of_unknown_encoding_are_kept_apart_and_a_note_names_the_option(tmp_path):
    names = [name.encode("gbk") for name in ("猫/1.png", "猫/2.png", "狗/1.png")]
    source = zip_of_names(tmp_path / "source", names)
    result = write_shards(source, tmp_path / "shards", classes="folder")
    assert result.manifest.class_names == ("├¿", "╣╖")
    (note,) = result.notes
    assert note == (
        "names whose encoding the zip does not say: 3, read as code page 437, as ├¿/1.png; "
        "--zip-encoding NAME takes another, such as gbk"
    )
    again = write_shards(source, tmp_path / "again", classes="folder")
    assert again.manifest.fingerprint == result.manifest.fingerprint


def test_an_encoding_that_is_not_that_of_a_zip_is_refused(tmp_path):
    source = zip_of_names(tmp_path / "source", ["狗/1.png".encode("gbk")])
    for option, sentence in [
        ("utf-8", "--zip-encoding utf-8 is not that of '╣╖/1.png'"),
        ("klingon", "--zip-encoding klingon: Python knows no such encoding"),
    ]:
        with pytest.raises(UserError, match=sentence):
            run("write", source, str(tmp_path / "shards"), "--zip-encoding", option)


def test_other_json_of_this_name_is_not_taken_for_stylegans(tmp_path):
    files = {"a/0.png": png(0), "a/1.png": png(1)}
    coco = as_folder(tmp_path / "coco", files | {"dataset.json": b'{"images": [], "info": 1}'})
    assert write_shards(coco, tmp_path / "1").manifest.class_count == 0
    for number, text in enumerate([b'{"labels": ["cat", "dog"]}', b'{"labels": 3}']):
        source = as_folder(tmp_path / f"other{number}", files | {"dataset.json": text})
        with pytest.raises(UserError, match=r"not pairs of a name and a class.*`--classes none`"):
            write_shards(source, tmp_path / "2")
    broken = as_folder(tmp_path / "broken", files | {"dataset.json": b"{"})
    with pytest.raises(UserError, match=r"dataset\.json is not JSON"):
        write_shards(broken, tmp_path / "3")


def image_folder(*splits: str) -> Files:
    """As torchvision's ImageFolder expects each split."""
    return {
        f"{split}/{name}/{i}.png": png(100 * s + 10 * c + i)
        for s, split in enumerate(splits)
        for c, name in enumerate(("cat", "dog"))
        for i in range(3)
    }


@packers
def test_the_splits_of_a_data_set_are_not_its_classes(tmp_path, pack: Pack):
    files = image_folder("train", "val")
    source = pack(tmp_path / "source", files)
    with pytest.raises(UserError, match=r"train, val are splits, not classes: .*--split train`"):
        write_shards(source, tmp_path / "shards", classes="folder")
    train = write_shards(source, tmp_path / "train", classes="folder", splits=["train"])
    expected = {data: int("dog" in name) for name, data in files.items() if "train/" in name}
    assert labelled(train) == expected
    assert train.manifest.class_names == ("cat", "dog")
    both = write_shards(source, tmp_path / "both", classes="folder", splits=["train/", "val"])
    assert labelled(both) == {data: int("dog" in name) for name, data in files.items()}
    with pytest.raises(UserError, match=r"no images in .* below test"):
        write_shards(source, tmp_path / "none", splits=["test"])


def test_splits_below_other_folders_and_of_other_names_are_recognized(tmp_path):
    nested = {f"images/{name}": data for name, data in image_folder("Train", "TEST").items()}
    with pytest.raises(UserError, match=r"`--split images/TEST`, or take all with `--split images"):
        write_shards(as_folder(tmp_path / "nested", nested), tmp_path / "1", classes="folder")
    coco = as_folder(tmp_path / "coco", {f"{name}2017/0.png": png(0) for name in ("train", "val")})
    with pytest.raises(UserError, match=r"train2017, val2017 are splits"):
        write_shards(coco, tmp_path / "0", classes="folder")
    flat = image_folder("train") | {"test/0.png": png(999)}
    with pytest.raises(UserError, match=r"test, train are splits"):
        write_shards(as_folder(tmp_path / "flat", flat), tmp_path / "2", classes="folder")
    # A train is also a vehicle.
    vehicles = {f"{name}/0.png": png(i) for i, name in enumerate(("car", "train"))}
    result = write_shards(
        as_folder(tmp_path / "vehicles", vehicles), tmp_path / "3", classes="folder"
    )
    assert result.manifest.class_names == ("car", "train")


def test_what_is_stored_without_classes_is_printed(tmp_path):
    result = write_shards(as_folder(tmp_path / "a", image_folder("train", "val")), tmp_path / "1")
    assert result.notes == ["images of train, val are stored together; choose one with --split"]
    result = write_shards(as_folder(tmp_path / "b", image_folder("train")), tmp_path / "2")
    assert result.notes == [
        "images are stored without classes; with --classes folder, these would be cat, dog"
    ]


def test_a_class_folder_without_images_is_printed(tmp_path):
    files = image_folder("train") | {"train/owl/readme.md": b"", "train/emu/": b""}
    del files["train/emu/"]
    (tmp_path / "a" / "train" / "emu").mkdir(parents=True)
    result = write_shards(as_folder(tmp_path / "a", files), tmp_path / "1", classes="folder")
    assert result.notes == ["folders without images, which are not classes: emu, owl"]


@packers
@pytest.mark.parametrize("extension", ["json", "cls", "txt"])
def test_labels_beside_images_are_read(tmp_path, pack: Pack, extension: str):
    """As in img2dataset's folders, and as in a WebDataset tar."""
    files = {}
    for i, label in enumerate((b"4", b"0", b"4")):
        text = b'{"label": "%s"}' % label if extension == "json" else label
        files |= {f"a/{i}.v2.png": png(i), f"a/{i}.v2.{extension}": text}
    result = write_shards(pack(tmp_path / "source", files), tmp_path / "1", classes=extension)
    assert labelled(result) == {png(0): 4, png(1): 0, png(2): 4}
    assert result.ignored == {}


def test_a_cls_beside_each_image_needs_no_option_and_json_is_mentioned(tmp_path):
    """A WebDataset tar is labelled by its .cls; what JSON holds is less clear."""
    files = {"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.cls": b"0"}
    result = write_shards(as_tar(tmp_path / "a", files), tmp_path / "1")
    assert labelled(result) == {png(0): 1, png(1): 0}
    del files["1.cls"]
    with pytest.raises(UserError, match=r"sample '1' has no label, but others have \(cls\)"):
        write_shards(as_tar(tmp_path / "b", files), tmp_path / "2")
    files = {"0.png": png(0), "0.json": b'{"target": "owl"}'}
    source = as_tar(tmp_path / "c", files)
    result = write_shards(source, tmp_path / "3")
    assert (result.notes, result.manifest.class_count) == (
        ["if .json files hold classes, --classes json takes them"],
        0,
    )
    result = write_shards(source, tmp_path / "4", classes="json", class_key="target")
    assert result.manifest.class_names == ("owl",)
    with pytest.raises(UserError, match=r"sample '0' has no label \(json\)"):
        write_shards(source, tmp_path / "5", classes="json")


def test_several_stylegan_data_sets_in_one_folder_need_a_choice(tmp_path):
    files = {f"train/{name}": data for name, data in stylegan([0] * 6).items()}
    files |= {f"val/{name}": data for name, data in stylegan([1] * 6).items()}
    source = as_folder(tmp_path / "a", files)
    with pytest.raises(UserError, match=r"several dataset\.json: choose with `--split val`"):
        write_shards(source, tmp_path / "1")
    result = write_shards(source, tmp_path / "2", splits=["train"])
    assert set(labelled(result).values()) == {0}


def test_the_command_prints_classes_with_their_counts(tmp_path, capsys):
    source = as_folder(tmp_path / "a", image_folder("train", "val"))
    options = ("--workers", "1", "--classes", "folder", "--split", "train")
    assert run("write", source, str(tmp_path / "1"), *options) == 0
    printed = capsys.readouterr().out
    assert "files that are not stored: 6 (in other folders)" in printed
    assert "  class     0             3  cat\n  class     1             3  dog\n" in printed
    assert Manifest.load(tmp_path / "1").class_names == ("cat", "dog")
