import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ganscale.tracking.record as record_module
from ganscale.tracking.record import Record, RecordTail
from tests.helpers.processes import run_python
from tests.helpers.runs import read_rows

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, images_seen: list[int]) -> None:
    record = Record(path)
    for count in images_seen:
        record.append({"progress/images_seen": count, "loss/critic": 1 / count})
    record.close()


def images_seen(path: Path) -> list:
    return [row["progress/images_seen"] for row in read_rows(path)]


def test_non_finite_and_numpy_values_survive_in_json_that_any_reader_takes(path):
    row = {
        "progress/images_seen": 64,
        "loss/critic": math.nan,
        "loss/generator": -math.inf,
        "penalty/r1": np.float32(np.inf),
        "logits/real": np.float32(0.5),
        "data/broken": np.int64(3),
        "samples/images": "samples/images-000000064.png",
    }
    record = Record(path)
    record.append(row)
    record.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (read,) = read_rows(path)
    assert list(read) == sorted(row)
    assert math.isnan(read.pop("loss/critic"))
    assert read == {name: row[name] for name in read}


def test_rewinding_drops_the_rows_after_a_checkpoint_and_keeps_its_own(path):
    write(path, [64, 128, 192, 256])
    assert Record(path).rewind(128) == 2
    write(path, [192])
    assert images_seen(path) == [64, 128, 192]
    assert Record(path).rewind(-1) == 3
    assert path.read_bytes() == b""


def test_rewinding_a_run_without_a_record_drops_nothing(path):
    assert Record(path).rewind(-1) == 0
    assert list(RecordTail(path).read()) == []


@pytest.mark.parametrize("kept_bytes", [1, 20, 51])
def test_a_torn_last_line_is_dropped_and_reported(path, caplog, kept_bytes):
    write(path, [64, 128])
    whole = path.read_bytes()
    line = whole.splitlines(keepends=True)[1]
    torn = whole[: -len(line)] + line[:kept_bytes]
    path.write_bytes(torn)

    Record(path).rewind(1000)
    assert "damaged" in caplog.text
    write(path, [192])
    assert images_seen(path) == [64, 192]


def test_rows_of_one_moment_have_consecutive_steps(path):
    write(path, [64, 64, 64, 65, 128, 128])
    assert [step for step, _ in RecordTail(path).read()] == [64, 65, 66, 67, 128, 129]


def test_a_row_always_has_the_same_step(path):
    rows = RecordTail(path)
    followed = []
    for images_seen in (64, 64, 128):
        write(path, [images_seen])
        followed += rows.read()
    assert followed == list(RecordTail(path).read())
    assert list(rows.read()) == []


def test_half_a_line_is_read_once_it_is_complete(path):
    write(path, [64, 128])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    rows = RecordTail(path)
    assert [step for step, _ in rows.read()] == [64]
    path.write_bytes(whole)
    assert [step for step, _ in rows.read()] == [128]


def test_a_histogram_is_kept_as_it_is(path):
    histogram = {"counts": [1, 2], "edges": [-0.5, 0.0, 0.5]}
    record = Record(path)
    record.append({"progress/images_seen": 64, "logits/real_histogram": histogram})
    record.close()
    (row,) = read_rows(path)
    assert row["logits/real_histogram"] == histogram


def test_non_finite_numbers_inside_a_histogram_are_json_too(path):
    record = Record(path)
    edges = [-math.inf, np.float32(0.5), math.inf]
    record.append({"progress/images_seen": 64, "a": {"counts": np.array([1, 2]), "edges": edges}})
    record.close()
    assert "Infinity" not in path.read_text()
    (row,) = read_rows(path)
    assert row["a"] == {"counts": [1, 2], "edges": [-math.inf, 0.5, math.inf]}


def test_a_value_that_json_cannot_hold_raises_and_writes_nothing(path):
    with pytest.raises(TypeError):
        Record(path).append({"progress/images_seen": 64, "a": object()})  # type: ignore[dict-item]
    assert not path.exists()


def test_rewinding_and_skipping_parse_only_the_rows_they_need(path, monkeypatch):
    """Parsing 10^6 rows takes a minute, and all ranks wait for it."""
    write(path, [*range(1, 2001)])
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    assert [step for step, _ in RecordTail(path).read(1999)] == [1999, 2000]
    assert len(parsed) == 2
    counted = []
    count = record_module.images_seen_of
    monkeypatch.setattr(
        record_module, "images_seen_of", lambda line: counted.append(line) or count(line)
    )
    assert Record(path).rewind(1997) == 3
    assert len(counted) == 4
    assert len(parsed) == 2


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_rewinding_finds_lines_wherever_blocks_end(path, monkeypatch, block):
    write(path, [*range(1, 20)])
    monkeypatch.setattr(record_module, "_BLOCK_BYTES", block)
    assert Record(path).rewind(12) == 7
    assert images_seen(path) == [*range(1, 13)]
    assert Record(path).rewind(-1) == 12
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": 1, "b{"a": 2, "progress/images_seen": 5}\n',  # half a row before a whole one
        b'{"progress/images_seen": 4}{"progress/images_seen": 5}\n',
        b'{"progress/images_seen": 5}',
        b'{"progress/images_seen": 5.5}\n',
        b'{"a": "\\"progress/images_seen\\": 7, }", "progress/images_seen": 5}\n',
        b'{"a": {"counts": [1]}, "progress/images_seen": 5, "z": 1}\n',
        b"\x00\x00\n",
        b"\n",
    ],
)
def test_images_seen_without_parsing_match_the_parsed_row(line):
    row = record_module.parse_row(line)
    expected = None if row is None else row["progress/images_seen"]
    assert record_module.images_seen_of(line) == expected


def test_a_row_without_images_seen_is_refused(path):
    with pytest.raises(ValueError, match="progress/images_seen"):
        Record(path).append({"loss/critic": 1.0})


def test_rows_of_a_process_that_is_killed_are_whole(path):
    """kill -9 while rows are written as fast as they can be."""
    script = f"""
from pathlib import Path
from ganscale.tracking.record import Record
record = Record(Path({str(path)!r}))
row = {{f"panel/critic/{{i}}": 0.1 for i in range(80)}}
for step in range(1, 10**9):
    record.append({{"progress/images_seen": step, **row}})
    if step == 500:
        print("500", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "500\n"
    finally:
        process.kill()
        process.communicate(timeout=300)

    last = [step for step, _ in RecordTail(path).read()][-1]
    assert last >= 500
    Record(path).rewind(400)
    assert images_seen(path) == list(range(1, 401))


def test_a_full_disk_delays_rows_and_loses_none(path):
    """A file size limit replaces the full disk: it, too, accepts only a part of a line."""
    script = f"""
import resource
from pathlib import Path
from ganscale.tracking.record import Record
record = Record(Path({str(path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(1, 101):
    record.append({{"progress/images_seen": step}})
print(len(record.pending_rows))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
record.append({{"progress/images_seen": 101}})
print(len(record.pending_rows))
"""
    done = run_python("-c", script)
    pending_when_full, pending_after = map(int, done.stdout.split())
    assert pending_when_full > 50
    assert pending_after == 0
    assert done.stderr.count("cannot be written") == 1
    assert images_seen(path) == list(range(1, 102))
