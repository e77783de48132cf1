"""Classes of shards are read as they are meant, counted and named; what is ambiguous is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.shards.class_labels import USUAL_MEMBERS, MemberChoice
from ganscale.shards.exclusions import read_exclusions
from ganscale.shards.indexing import build_manifest, index_shards
from tests.helpers.images import png
from tests.helpers.tars import write_tar
from tests.shards.test_shards_cli import run


def shard(path: Path, texts: list[bytes], extension: str = "json", first: int = 0) -> Path:
    """A tar of images with a label member each."""
    members = []
    for i, text in enumerate(texts, first):
        members += [(f"{i}.png", png(i)), (f"{i}.{extension}", text)]
    return write_tar(path, members)


def index(folder: Path, choice: MemberChoice = USUAL_MEMBERS, **options) -> Manifest:
    manifest = index_shards([str(folder)], choice=choice, **options).manifest
    assert manifest is not None
    return manifest


def labels(manifest: Manifest) -> list[int]:
    return manifest.samples["label"].tolist()


@pytest.mark.parametrize("value", ["3", "3.0", '"3"', '" 3 "', "[3]", '["3"]', "[3.0]", '"3.0"'])
def test_a_number_is_a_class_however_json_writes_it(tmp_path, value):
    text = f'{{"label": {value}}}'.encode()
    assert labels(index(shard(tmp_path / "a.tar", [text, b'{"label": 1}']).parent)) == [3, 1]


@pytest.mark.parametrize("text", [b"3", b" 3\n", b"3.0", b"3.000"])
def test_a_number_is_a_class_however_text_writes_it(tmp_path, text):
    assert labels(index(shard(tmp_path / "a.tar", [text], "cls").parent)) == [3]


@pytest.mark.parametrize("value", ["[1, 2]", "2.5", "[]", '{"id": 3}', "NaN", "[[3]]"])
def test_what_is_not_one_class_is_refused_with_the_option_that_ignores_labels(tmp_path, value):
    folder = shard(tmp_path / "a.tar", [f'{{"label": {value}}}'.encode()]).parent
    with pytest.raises(
        UserError, match=r"'0\.json' is .*, not one class; `--classes none` ignores"
    ):
        index(folder)
    assert labels(index(folder, MemberChoice(classes="none"))) == [-1]


def test_names_are_numbered_over_all_shards_and_the_numbers_are_stored(tmp_path):
    shard(tmp_path / "a.tar", [b'{"label": "dog"}', b'{"label": "cat"}'])
    shard(tmp_path / "b.tar", [b'{"label": "bee"}', b'{"label": "dog"}'])
    manifest = index(tmp_path)
    assert manifest.class_names == ("bee", "cat", "dog")
    assert labels(manifest) == [2, 1, 0, 2]
    assert json.loads((tmp_path / "classes.json").read_text()) == ["bee", "cat", "dog"]
    assert manifest.class_count == 3


def test_named_classes_keep_their_numbers_when_shards_are_added(tmp_path):
    """From the cache, after an interruption, and in parts, the numbers are the same."""
    shard(tmp_path / "b.tar", [b"dog", b"cat"], "cls")
    index(tmp_path)
    shard(tmp_path / "a.tar", [b"dog", b"dog"], "cls")
    manifest = index(tmp_path)
    assert labels(manifest) == [1, 1, 1, 0]
    assert index(tmp_path).fingerprint == manifest.fingerprint
    for part in ((0, 2), (1, 2)):
        index_shards([str(tmp_path)], tmp_path / "parts", part=part)
    assert index(tmp_path, output=tmp_path / "parts").fingerprint == manifest.fingerprint
    shard(tmp_path / "c.tar", [b"ant"], "cls")
    with pytest.raises(
        UserError, match=r"classes\.json lacks the class 'ant' of c\.tar: add it at"
    ):
        index(tmp_path)
    (tmp_path / "classes.json").write_text('["cat", "dog", "ant"]')
    assert labels(index(tmp_path)) == [1, 1, 1, 0, 2]
    (tmp_path / "classes.json").unlink()
    assert index(tmp_path).class_names == ("ant", "cat", "dog")


def test_a_name_whose_samples_are_all_left_out_is_not_a_class(tmp_path):
    shard(tmp_path / "a.tar", [b"dog", b"cat"], "cls")
    (tmp_path / "list").write_text('{"shard": "a.tar", "key": "1"}\n')
    manifest = index(tmp_path, exclusions=read_exclusions(tmp_path / "list"))
    assert manifest.class_names == ("dog",)


def test_names_in_one_shard_and_numbers_in_another_are_refused(tmp_path):
    shard(tmp_path / "a.tar", [b"dog", b"cat"], "cls")
    shard(tmp_path / "b.tar", [b"1"], "cls")
    with pytest.raises(UserError, match=r"labels of b\.tar are numbers, but .* names: cat, dog"):
        index(tmp_path)


def test_a_class_under_another_key_is_found_when_asked_for_and_else_its_key_is_printed(
    tmp_path, capsys
):
    folder = shard(
        tmp_path / "a.tar", [b'{"caption": "x", "target": 1}', b'{"target": "0"}']
    ).parent
    assert run("index", str(folder), "--workers", "1") == 0
    printed = capsys.readouterr().out
    assert "classes      none" in printed
    assert "no classes, but JSON with caption, target: --class-key KEY" in printed
    assert run("index", str(folder), "--workers", "1", "--class-key", "target") == 0
    printed = capsys.readouterr().out
    assert "  class     0             1\n  class     1             1\n" in printed
    assert "--class-key" not in printed


def test_an_empty_text_among_numbers_is_a_bad_sample_not_the_end_of_all_labels(tmp_path):
    folder = shard(tmp_path / "a.tar", [b"5", b"", b"6"], "txt").parent
    with pytest.raises(UserError, match=r"sample '1' has no label, but others have \(txt\)"):
        index(folder)
    manifest = index(folder, exclusions=read_exclusions(folder / "bad.jsonl"))
    assert labels(manifest) == [5, 6]


def test_one_damaged_json_without_classes_in_others_is_not_a_missing_class(tmp_path):
    folder = shard(tmp_path / "a.tar", [b"{", b'{"caption": "x"}', b"[1]"]).parent
    assert labels(index(folder)) == [-1] * 3
    shard(tmp_path / "a.tar", [b"{", b'{"label": 1}'])
    with pytest.raises(UserError, match=r"'0\.json' is not JSON: b'\{'"):
        index(folder)


def test_captions_are_not_classes_even_if_some_are_numbers(tmp_path):
    folder = shard(tmp_path / "a.tar", [b"a cat", b"7", b"1984", b"a dog"], "txt").parent
    assert labels(index(folder)) == [-1] * 4
    with pytest.raises(UserError, match=r"'0\.txt' is 'a cat', but others are numbers"):
        index(folder, MemberChoice(classes="txt"))


def test_the_chosen_label_wins_over_the_usual_order(tmp_path):
    members = [("0.png", png(0)), ("0.cls", b"1"), ("0.json", b'{"label": 2}'), ("0.txt", b"3")]
    write_tar(tmp_path / "a.tar", members)
    found = [labels(index(tmp_path, MemberChoice(classes=c))) for c in ("", "cls", "json", "txt")]
    assert found == [[1], [1], [2], [3]]


def test_a_key_of_json_wins_over_other_labels(tmp_path):
    members = [("0.png", png(0)), ("0.cls", b"1"), ("0.json", b'{"id": 5}')]
    write_tar(tmp_path / "a.tar", members)
    assert labels(index(tmp_path, MemberChoice(class_key="id"))) == [5]
    with pytest.raises(UserError, match=r"sample '0' has no label \(json\)"):
        index(tmp_path, MemberChoice(class_key="other"))


def test_classes_are_printed_with_their_counts_also_the_empty_ones(tmp_path, capsys):
    folder = shard(tmp_path / "a.tar", [b"24", b"0", b"0"], "cls").parent
    run("index", str(folder), "--workers", "1")
    printed = capsys.readouterr().out
    assert "  class     0             2\n  class     1             0\n" in printed
    assert "  and 5 more: ganscale shards show" in printed
    assert "classes without a sample: 23" in printed


def test_of_numbers_with_large_gaps_only_those_that_occur_are_printed(tmp_path, capsys):
    """A time as the label, say: a line or a counter for each number would fill memory."""
    folder = shard(tmp_path / "a.tar", [b"0", b"1764450000", b"0"], "cls").parent
    run("index", str(folder), "--workers", "1")
    printed = capsys.readouterr().out
    assert "  class     0             2\n  class 1764450000             1\n" in printed
    assert "classes without a sample: 1,764,449,999" in printed


def array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


@pytest.mark.parametrize("order", [("jpg", "npy"), ("npy", "jpg")])
def test_an_embedding_beside_an_image_is_not_an_image(tmp_path, order):
    data = {"jpg": png(0), "npy": array(np.zeros(512, np.float32))}
    write_tar(tmp_path / "a.tar", [(f"0.{extension}", data[extension]) for extension in order])
    manifest = build_manifest(tmp_path)
    assert manifest.extensions == ("jpg",)
    assert manifest.samples["size"].tolist() == [len(png(0))]
    write_tar(tmp_path / "a.tar", [("0.npy", data["npy"])])
    with pytest.raises(UserError, match=r"member '0\.npy' is an array of float32 \(512,\); images"):
        build_manifest(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.npy", array(np.zeros((4, 4, 3), np.uint8)))])
    assert build_manifest(tmp_path).resolution == (4, 4)


def test_dots_within_the_names_of_samples_are_explained(tmp_path):
    write_tar(tmp_path / "a.tar", [("a/1 Track 2.0 (Clean).png", png(0))])
    with pytest.raises(UserError, match=r"the name of a sample ends at its first dot: rename"):
        build_manifest(tmp_path)


def test_of_several_images_the_chosen_one_is_taken(tmp_path):
    members = [(f"{i}.{side}.png", png(2 * i + k)) for i in range(2) for k, side in enumerate("lr")]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"no image, only l\.png, r\.png .*`--image l\.png` takes"):
        build_manifest(tmp_path)
    whole = (tmp_path / "a.tar").read_bytes()
    for k, side in enumerate("lr"):
        assert run("index", str(tmp_path), "--workers", "1", "--image", f"{side}.png") == 0
        rows = Manifest.load(tmp_path).samples
        found = [whole[row["offset"] :][: row["size"]] for row in rows]
        assert found == [png(k), png(2 + k)]
    with pytest.raises(UserError, match=r"sample '0' has no \.x\.png, only l\.png, r\.png"):
        index(tmp_path, MemberChoice(image="x.png"))
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.jpg", png(1))])
    with pytest.raises(UserError, match=r"two images, \.png and \.jpg: choose with `--image png`"):
        build_manifest(tmp_path)
    assert index(tmp_path, MemberChoice(image="jpg")).extensions == ("jpg",)
