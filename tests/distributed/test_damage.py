"""Shards are damaged after they were indexed: two ranks with workers see the same as one without,
count what they could not use, or end together with a sentence."""

import json
import math
import os
import re
import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.images.decoding import DecodeError, decode
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order
from ganscale.shards.indexing import build_manifest
from tests.distributed.test_promise import curve
from tests.helpers.images import encoded
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Runs
from tests.helpers.tars import write_tar

SIZE = 32
SAMPLES = 40  # of a shard
IMAGES = 640

# What is in the shards, in order; the damage done to each is in `kinds_of_damage`.
FORMATS = {
    "whole": "PNG",
    "cut-in-an-image": "JPEG",
    "cut-between-members": "PNG",
    "flipped-bytes": "JPEG",
    "text": "JPEG",
    "bad-crc": "PNG",
    "bad-pixels": "PNG",
    "zeros": "PNG",
    "bomb": "PNG",
}

Damage = tuple[str, str, int, str]


def image(kind: str, number: int) -> bytes:
    """A smooth grey image, another one each time."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    phase = 0.37 * number + len(kind)
    pixels = 128 + 100 * np.sin(7 * x + phase) * np.cos(5 * y - phase)
    return encoded(pixels.astype(np.uint8), FORMATS[kind])


def write_data(folder: Path, kinds: list[str]) -> Manifest:
    for kind in kinds:
        extension = "jpg" if FORMATS[kind] == "JPEG" else "png"
        members = [(f"{n:03d}.{extension}", image(kind, n)) for n in range(SAMPLES)]
        write_tar(folder / f"{kind}.tar", members)
    return build_manifest(folder)


class Shards:
    """Where things are in the shards of a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.number = {shard.name: i for i, shard in enumerate(manifest.shards)}

    def path(self, kind: str) -> Path:
        return self.manifest.root / f"{kind}.tar"

    def member(self, kind: str, number: int) -> tuple[int, bytes]:
        """(offset, content) of an image."""
        row = self.manifest.samples[self.sample(kind, number)]
        offset, size = int(row["offset"]), int(row["size"])
        return offset, self.path(kind).read_bytes()[offset : offset + size]

    def sample(self, kind: str, number: int) -> int:
        return int(self.manifest.first_sample[self.number[f"{kind}.tar"]]) + number

    def overwritten(self, kind: str, number: int, at: int, data: bytes) -> Damage:
        offset, content = self.member(kind, number)
        changed = content[:at] + data + content[at + len(data) :]
        assert len(changed) == len(content)
        with pytest.raises(DecodeError):
            decode(changed, SIZE, 1)
        return "overwrite", f"{kind}.tar", offset + at, data.hex()


def kinds_of_damage(shards: Shards) -> tuple[list[Damage], dict[int, tuple[str, str]]]:
    """What is done, and what of each sample is to be counted: (shard, reason)."""
    bad_samples: dict[int, tuple[str, str]] = {}

    def expect(kind: str, numbers: range | tuple[int, ...], reason: str) -> None:
        bad_samples.update({shards.sample(kind, n): (f"{kind}.tar", reason) for n in numbers})

    def cut(kind: str, at: int) -> Damage:
        return "cut", f"{kind}.tar", at, ""

    offset, content = shards.member("cut-in-an-image", 35)
    damage = [cut("cut-in-an-image", offset + len(content) // 2)]
    expect("cut-in-an-image", range(35, SAMPLES), "cut")

    damage += [cut("cut-between-members", shards.member("cut-between-members", 36)[0] - 512)]
    expect("cut-between-members", range(36, SAMPLES), "cut")

    for number in (1, 2, 30):
        _, content = shards.member("flipped-bytes", number)
        middle = len(content) * 3 // 4
        flipped = bytes(byte ^ 0xFF for byte in content[middle : middle + 20])
        damage += [shards.overwritten("flipped-bytes", number, middle, flipped)]
    expect("flipped-bytes", (1, 2, 30), "cannot be decoded")

    for number in (8, 9):
        size = len(shards.member("text", number)[1])
        damage += [shards.overwritten("text", number, 0, (b"404 not found " * size)[:size])]
    expect("text", (8, 9), "no image")

    _, content = shards.member("bad-crc", 20)
    end = content.index(b"IEND") - 4
    wrong = bytes(byte ^ 0x55 for byte in content[end - 4 : end])
    damage += [shards.overwritten("bad-crc", 20, end - 4, wrong)]
    expect("bad-crc", (20,), "cannot be decoded")

    _, content = shards.member("bad-pixels", 21)
    damage += [shards.overwritten("bad-pixels", 21, content.index(b"IDAT") + 20, b"\0" * 8)]
    expect("bad-pixels", (21,), "cannot be decoded")

    for number in (3, 17):  # as a file system leaves a file that was never flushed
        size = len(shards.member("zeros", number)[1])
        damage += [shards.overwritten("zeros", number, 0, bytes(size))]
    expect("zeros", (3, 17), "no image")

    _, content = shards.member("bomb", 11)
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    checked = header + struct.pack(">I", zlib.crc32(header))
    damage += [shards.overwritten("bomb", 11, 12, checked)]
    expect("bomb", (11,), "too large")
    return damage, bad_samples


def settings_of(data: Path, damage: list[Damage]) -> list[str]:
    plan = data.with_suffix(".json")
    plan.write_text(json.dumps(damage))
    return [
        f"data.path={data}",
        "generator.target=tests.distributed.damaging:Generator",
        f"generator.options.damage={plan}",
        "data.block_samples=8",
        "training.precision=float64",
        f"training.total_images={IMAGES}",
        "data.retry_seconds=1",
    ]


def test_two_ranks_with_workers_count_and_replace_what_one_rank_without_does(
    runs: Runs, tmp_path: Path
) -> None:
    manifest = write_data(tmp_path / "data", sorted(FORMATS))
    shards = Shards(manifest)
    damage, bad_samples = kinds_of_damage(shards)
    shutil.copytree(manifest.root, tmp_path / "copy")  # each run does its own damage
    settings = [*settings_of(manifest.root, damage), "data.max_bad_fraction=0.2", "data.workers=2"]
    output = runs.finish("two", *settings, ranks=2)
    settings = [
        *settings_of(tmp_path / "copy", damage),
        "data.max_bad_fraction=0.2",
        "data.workers=0",
    ]
    runs.finish("one", *settings)

    # What the order alone says.
    order = Order(
        np.diff(manifest.first_sample),
        seed=0,
        fingerprint=manifest.fingerprint,
        lanes=64,
        block_samples=8,
        window_blocks=8,
    )
    samples = order.samples(np.arange(IMAGES)).tolist()
    expected = Counter(bad_samples[sample] for sample in samples if sample in bad_samples)
    assert expected.keys() == {*bad_samples.values()}
    for name in ("one", "two"):
        summary = runs.summary(name)
        found = {
            (row["shard"], row["reason"]): row["count"] for row in summary["bad_samples_by_shard"]
        }
        assert found == expected
        assert runs.rows(name)[-1]["data/bad_samples"] == expected.total()
    for shard, _ in expected:
        assert f"shard {shard}" in output
    assert "Traceback" not in output

    one, two = curve(runs.rows("one")), curve(runs.rows("two"))
    assert len(one) == len(two) == IMAGES // 32
    for row_of_one, row_of_two in zip(one, two, strict=True):
        assert row_of_one.keys() == row_of_two.keys()
        for name, value in row_of_one.items():
            assert math.isclose(value, row_of_two[name], rel_tol=1e-7, abs_tol=1e-7), name


def end_of_ranks(runs: Runs, settings: list[str]) -> tuple[list[int], str]:
    """(exit codes of two ranks, what they printed): a launcher would report only one code."""
    ranks = Ranks(runs, 2, *settings, "data.workers=2")
    try:
        codes = ranks.exit_codes(0, 1)
    finally:
        ranks.end()
    return codes, ranks.printed(0) + ranks.printed(1)


@pytest.mark.parametrize("kind", ["deleted", "a folder", "too many"])
def test_what_cannot_be_borne_ends_both_ranks_with_a_sentence(
    runs: Runs, tmp_path: Path, kind: str
) -> None:
    manifest = write_data(tmp_path / "data", ["bad-pixels", "text", "whole"])
    shards = Shards(manifest)
    path = shards.path("text")
    limit = 0.5
    if kind == "deleted":
        damage = [("delete", path.name, 0, "")]
        sentence = rf"the shard {path} .*is missing"
    elif kind == "a folder":
        damage = [("replace by a folder", path.name, 0, "")]
        sentence = f"the shard {path} cannot be read: Is a directory"
    else:
        limit = 0.001  # of a thousand: one
        damage = [shards.overwritten("text", number, 0, b"?" * 20) for number in range(10)]
        sentence = r"more than data\.max_bad_fraction=0\.001 allows; most of them in text\.tar: "
    settings = [*settings_of(manifest.root, damage), f"data.max_bad_fraction={limit}"]
    codes, said = end_of_ranks(runs, settings)
    errors = [line for line in said.splitlines() if "error: " in line]
    assert codes == [2, 2], said
    assert len(errors) == 1, said  # for both
    assert re.search(sentence, errors[0])
    assert "Traceback" not in said


def test_a_shard_of_another_size_than_when_it_was_indexed_is_refused_at_the_start(
    runs: Runs, tmp_path: Path
) -> None:
    manifest = write_data(tmp_path / "data", ["whole"])
    path = Shards(manifest).path("whole")
    settings = settings_of(manifest.root, [])
    os.truncate(path, 20_000)
    codes, said = end_of_ranks(runs, settings)
    assert codes == [2, 2], said
    assert said.count(f"the shard {path} has 20,000 bytes, but") == 1
    assert "Traceback" not in said
