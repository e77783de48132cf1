"""Indexing continues where it stopped, reads only new or changed shards, and names bad ones."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.manifest import Manifest
from ganscale.errors import UnavailableError, UserError
from ganscale.shards import indexing, listing, parallel
from ganscale.shards.exclusions import Exclusion, read_exclusions
from ganscale.shards.indexing import IndexResult, build_manifest, index_shards
from ganscale.shards.verifying import verify_shards
from tests.helpers.files import names
from tests.helpers.images import png
from tests.helpers.processes import end_tree, run_python, wait_until
from tests.helpers.tars import labelled, write_tar


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "set"
    for number in range(6):
        write_tar(folder / f"{number}.tar", labelled(number + 2, first=10 * number))
    return folder


def index(source: Path, output: Path | None = None, **options) -> IndexResult:
    return index_shards([str(source)], output, **options)


def same(first: Manifest | None, second: Manifest | None) -> bool:
    assert first is not None
    assert second is not None
    return (
        first.fingerprint == second.fingerprint
        and first.shards == second.shards
        and first.samples.tobytes() == second.samples.tobytes()
        and (first.extensions, first.resolution) == (second.extensions, second.resolution)
        and (first.class_count, first.class_names) == (second.class_count, second.class_names)
    )


def test_a_second_index_reads_only_what_is_new_or_has_changed(shards, tmp_path):
    """A changed shard, an added one and a removed one, in any order of time."""
    assert index(shards)[2:4] == (6, 0)
    assert index(shards)[2:4] == (0, 6)
    write_tar(shards / "2.tar", labelled(9, first=500))
    write_tar(shards / "10.tar", [("x.png", png(3, 7)), ("x.cls", b"8")])
    (shards / "4.tar").unlink()
    result = index(shards)
    assert (result.read, result.kept) == (2, 4)
    fresh = index(shards, tmp_path / "fresh").manifest
    assert same(result.manifest, fresh)
    assert fresh is not None
    assert [shard.name for shard in fresh.shards] == [f"{i}.tar" for i in (0, 1, 10, 2, 3, 5)]
    assert fresh.resolution is None
    assert fresh.class_count == 9
    assert "indexing" not in names(shards)
    assert index(shards, again=True)[2:4] == (6, 0)


def test_a_shard_of_the_same_size_and_another_time_is_read_again(shards):
    fingerprint = build_manifest(shards).fingerprint
    write_tar(shards / "0.tar", [*labelled(1), ("00001.png", png(1)), ("00001.cls", b"2")])
    os.utime(shards / "0.tar", ns=(1, 1))
    result = index(shards)
    assert result.read == 1
    assert result.manifest is not None
    assert result.manifest.fingerprint != fingerprint


def test_the_cache_is_ignored_beside_another_manifest(shards, tmp_path):
    """Only the manifest has the rows: with another one, or none, all shards are read again."""
    whole = build_manifest(shards)
    content = json.loads((shards / "manifest.json").read_text())
    for damage in ("delete", "other", "garbage"):
        if damage == "delete":
            (shards / "manifest.npy").unlink()
        elif damage == "other":
            (shards / "manifest.json").write_text(json.dumps(content | {"fingerprint": "0"}))
        else:
            (shards / "indexing.json").write_text('{"fingerprint"')
        result = index(shards)
        assert result.read == 6
        assert same(result.manifest, whole)


def test_a_killed_index_continues_and_gives_the_same_manifest(tmp_path):
    folder = tmp_path / "set"
    for number in range(60):
        write_tar(folder / f"{number:02d}.tar", labelled(60, first=100 * number))
    program = (
        "from ganscale.shards.indexing import build_manifest\n"
        f"build_manifest({str(folder)!r}, workers=1)\n"
    )
    cache = folder / "indexing"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: len(list(cache.glob("*"))) >= 3, 60, process=process, interval=0)
    finally:
        end_tree(process)
    assert not (folder / "manifest.json").exists()
    # The machine can also stop while a file is written: a short file is ignored.
    torn = sorted(path for path in cache.iterdir() if not path.name.startswith("."))[0]
    torn.write_bytes(torn.read_bytes()[:-7])
    result = index(folder, workers=2)
    assert 1 <= result.kept < 60
    assert same(result.manifest, index(folder, tmp_path / "fresh").manifest)
    assert "indexing" not in names(folder)


def test_parts_on_several_machines_make_one_manifest(shards, tmp_path):
    output = tmp_path / "parts"
    command = [sys.executable, "-m", "ganscale", "shards", "index", str(shards)]
    processes = [
        subprocess.Popen(
            [*command, "--output", str(output), "--part", f"{part}/3", "--workers", "1"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in (1, 2, 3)
    ]
    for process in processes:
        try:
            output_text, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0
        assert output_text == "indexed 2 shards; run without --part to make the manifest\n"
    assert {*names(output)} == {"indexing"}
    result = index(shards, output)
    assert (result.read, result.kept) == (0, 6)
    assert same(result.manifest, build_manifest(shards))


def test_all_bad_shards_are_named_and_can_be_left_out(shards, capsys):
    """A cut shard, samples without an image, and one without a label: the rest is indexed."""
    cut = shards / "1.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    write_tar(
        shards / "3.tar",
        [
            *labelled(2, first=30),
            ("page.png", b"<html>"),
            ("page.cls", b"1"),
            ("alone.cls", b"1"),
            ("unlabelled.png", png(0)),
        ],
    )
    with pytest.raises(UserError) as raised:
        index(shards, workers=2)
    message = str(raised.value)
    assert message.startswith(f"2 of 6 shards are bad: {cut}: the tar is cut")
    assert f"{shards / '3.tar'}: member 'page.png' is not a JPEG" in message
    assert "(and 2 more bad samples)" in message
    assert message.endswith(f"(to index the rest: --leave-out {shards / 'bad.jsonl'})")
    assert not (shards / "manifest.json").exists()
    exclusions = read_exclusions(shards / "bad.jsonl")
    assert [(sample.shard, sample.key) for sample in exclusions] == [
        ("1.tar", None),
        ("3.tar", "alone"),
        ("3.tar", "page"),
        ("3.tar", "unlabelled"),
    ]
    result = index(shards, exclusions=exclusions)
    assert (result.read, result.kept) == (1, 4)
    assert (result.excluded_samples, result.excluded_shards) == (3, 1)
    assert result.manifest is not None
    assert [shard.samples for shard in result.manifest.shards] == [2, 4, 2, 6, 7]
    # A list keeps its entries when bad samples are added.
    write_tar(shards / "9.tar", [("0.png", b"?")])
    with pytest.raises(UserError, match=r"9\.tar: member '0\.png' is not a JPEG"):
        index(shards, exclusions=exclusions)
    assert len(read_exclusions(shards / "bad.jsonl")) == 5


def test_a_shard_whose_name_is_not_utf_8_is_indexed_kept_and_verified(shards):
    (shards / "5.tar").rename(shards / "caf\udce9.tar")
    assert index(shards).read == 6
    result = index(shards)
    assert (result.read, result.kept) == (0, 6)
    assert result.manifest is not None
    assert result.manifest.shards[-1].name == "caf\udce9.tar"
    assert not any(found.bad or found.problem for found in verify_shards(result.manifest))
    (shards / "caf\udce9.tar").write_bytes(b"?" * 600)
    with pytest.raises(UserError, match=r"caf\\xe9\.tar: not a readable tar"):
        index(shards)


def test_many_bad_shards_are_counted(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.tar").write_bytes(b"?" * 600)
    with pytest.raises(UserError, match=r"^8 of 8 shards are bad: .*4\.tar: .*; and 3 more \("):
        build_manifest(tmp_path)


def test_left_out_samples_are_in_no_row_and_change_the_fingerprint(shards):
    whole = build_manifest(shards)
    exclusions = [
        Exclusion("0.tar", "00001", "ugly"),
        Exclusion("2.tar", None, "ugly"),
        Exclusion("0.tar", "no such key", ""),
        *(Exclusion("1.tar", f"{key:05d}", "all of it") for key in (10, 11, 12)),
    ]
    result = index(shards, exclusions=exclusions)
    manifest = result.manifest
    assert manifest is not None
    assert (result.excluded_samples, result.excluded_shards) == (4, 1)
    assert [shard.name for shard in manifest.shards] == ["0.tar", "3.tar", "4.tar", "5.tar"]
    assert manifest.fingerprint != whole.fingerprint
    expected = np.concatenate([whole.samples[:1], whole.samples[2 + 3 + 4 :]])
    assert manifest.samples.tobytes() == expected.tobytes()
    restored = index(shards)
    assert same(restored.manifest, whole)
    assert restored.restored_samples >= 1  # of shards that kept a sample, at least
    assert index(shards).restored_samples == 0
    with pytest.raises(UserError, match="no sample is left"):
        index(shards, exclusions=[Exclusion(f"{i}.tar", None, "") for i in range(6)])


def test_a_bad_list_is_named_with_its_line(tmp_path):
    path = tmp_path / "list"
    with pytest.raises(UserError, match="no list of samples"):
        read_exclusions(path)
    good = '{"shard": "a.tar", "key": "0"}\n\n'
    for bad in ("nonsense", '"text"', '{"shard": "a.tar"}', '{"shard": 3, "key": "0"}'):
        path.write_text(good + bad + "\n")
        with pytest.raises(UserError, match="list, line 3: not "):
            read_exclusions(path)
    path.write_text(good)
    assert read_exclusions(path) == [Exclusion("a.tar", "0", "")]


def test_two_shards_can_have_the_same_keys(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(2))
    write_tar(tmp_path / "b.tar", labelled(2))
    assert len(build_manifest(tmp_path).samples) == 4


def test_a_killed_process_gives_a_clear_error(shards):
    with pytest.raises(UserError, match="a process was killed, perhaps for lack of memory"):
        list(parallel.run_all(_kill_oneself, [1, 2], 2))


def _kill_oneself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_shard_that_grows_while_it_is_read_is_refused(shards, monkeypatch):
    """Another program is still writing it."""
    read = indexing.read_index

    def growing(reader, name, *options):
        index = read(reader, name, *options)
        if name == "5.tar":
            with (shards / name).open("ab") as shard:
                shard.write(bytes(512))
        return index

    monkeypatch.setattr(indexing, "read_index", growing)
    with pytest.raises(UserError, match=r"5\.tar changed while it was read"):
        build_manifest(shards)


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    """The peak of a fresh process grows by less than the rows of twenty times as many shards."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from ganscale.shards.indexing import build_manifest\n"
        "build_manifest(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)\n"
    )
    pixel = png(0, 1)
    members = [(f"{i}.png", pixel) for i in range(3000)]
    random.Random(0).shuffle(members)
    whole = write_tar(tmp_path / "0.tar", members).read_bytes()
    peaks = []
    for count in (2, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.tar").write_bytes(whole)
        peaks.append(int(run_python("-c", program, str(folder)).stdout))
    assert peaks[1] - peaks[0] < 38 * 3000 * 16


def test_an_unreadable_shard_does_not_hide_other_bad_shards(shards):
    (shards / "folder.tar").mkdir()
    os.mkfifo(shards / "pipe.tar")
    (shards / "text.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"3 of \d+ shards are bad") as caught:
        index(shards)
    for sentence in ("folder.tar is not a file", "pipe.tar is not a file", "text.tar"):
        assert sentence in str(caught.value)


def test_an_unavailable_shard_is_retried_later_and_not_left_out(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "RETRY_SECONDS", 0.0)
    command = f"pipe:test {{}} != away.tar && cat {shards}/{{}}"
    names = [path.name for path in sorted(shards.glob("*.tar"))]
    output = tmp_path / "output"
    with pytest.raises(UnavailableError, match=r"pipe:test"):
        index_shards([command], output, names=[*names, "away.tar"])
    assert not (output / "bad.jsonl").exists()
    again = index_shards([command], output, names=names)
    assert (again.kept, again.read) == (len(names), 0)
    assert same(again.manifest, build_manifest(shards))
