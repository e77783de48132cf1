"""Tars without a manifest are streamed safely: no endless waits, nothing skipped silently."""

import contextlib
import itertools
import json
import logging
import os
import pickle
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ganscale.data.batch import Batch
from ganscale.data.dataset import open_data
from ganscale.data.remote import connections
from ganscale.data.streaming.loader import StreamLoader
from ganscale.data.streaming.tar_stream import check_urls, is_streamed, stream_identity, stream_urls
from ganscale.errors import UnavailableError, UserError
from ganscale.schema import DataConfig
from tests.data.conftest import S3
from tests.data.counting_loaders import CountingStreamLoader
from tests.helpers.fault_server import Fault, FaultServer
from tests.helpers.images import numbered
from tests.helpers.processes import wait_until
from tests.helpers.tars import write_tar

RESOLUTION = 4
SHARDS, PER_SHARD = 3, 10


def members_of(shard: int, count: int = PER_SHARD) -> list[tuple[str, bytes]]:
    numbers = range(shard * PER_SHARD, shard * PER_SHARD + count)
    return [
        member
        for n in numbers
        for member in ((f"{n:03d}.png", numbered(n)), (f"{n:03d}.cls", str(n % 3).encode()))
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        write_tar(tmp_path / f"shard-{shard}.tar", members_of(shard))
    return tmp_path


class Streams:
    """Opens streams and closes them."""

    def __init__(self) -> None:
        self.made: list[CountingStreamLoader] = []

    def __call__(
        self, path: Path | str, *, rank=0, world_size=1, position=0, batch=8, seed=3, **settings
    ) -> CountingStreamLoader:
        config = DataConfig(
            path=str(path),
            resolution=RESOLUTION,
            **{"workers": 1, "block_samples": 4, "window_blocks": 2, **settings},
        )
        loader = CountingStreamLoader(
            open_data(config).urls,
            config,
            seed=seed,
            global_batch_size=batch,
            rank=rank,
            world_size=world_size,
            position=position,
        )
        self.made.append(loader)
        return loader


@pytest.fixture
def streams() -> Iterator[Streams]:
    streams = Streams()
    yield streams
    for loader in streams.made:
        loader.close()


def numbers_in(batches: list[Batch]) -> list[int]:
    return [int(n) for batch in batches for n in batch.images[:, 0, 0, 0]]


def some(loader: StreamLoader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize(
    ("path", "streams"),
    [
        ("data/a.tar", True),
        ("data/shard-{000..099}.tar", True),
        ("data/*.tar", True),
        ("https://host/a-{0..9}.tar?key=1", True),
        ("pipe:cat a.tar", True),
        ("s3://bucket/folder", False),
        ("data/folder", False),
        ("data/manifest.json", False),
        ("data/folder.tars", False),
    ],
)
def test_a_path_that_names_tars_is_streamed(path: str, streams: bool) -> None:
    assert is_streamed(path) is streams


def test_braces_and_wildcards_name_the_shards(folder: Path) -> None:
    names = [str(folder / f"shard-{shard}.tar") for shard in range(SHARDS)]
    assert stream_urls(f"{folder}/shard-{{0..2}}.tar") == names
    assert stream_urls(f"{folder}/shard-*.tar") == names
    assert stream_urls(f"{folder}/shard-{{0,[12]}}.tar") == names
    assert stream_urls(f"file:{names[0]}::{names[1]}") == names[:2]
    assert stream_urls("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]


def test_the_identity_knows_the_shards_but_not_their_folder(folder: Path, tmp_path: Path) -> None:
    here = stream_identity(stream_urls(f"{folder}/shard-*.tar"))
    assert stream_identity([f"https://host/other/shard-{n}.tar?key=2" for n in range(3)]) == here
    assert stream_identity(stream_urls(f"{folder}/shard-{{0..1}}.tar")) != here


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_come_with_their_labels_and_slots_go_on_from_the_images_seen(
    streams: Streams, folder: Path, workers: int
) -> None:
    loader = streams(folder / "*.tar", position=96, workers=workers)
    batches = some(loader, 30)
    for step, batch in enumerate(batches):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, RESOLUTION, RESOLUTION, 3)
        assert batch.slots.tolist() == list(range(96 + 8 * step, 104 + 8 * step))
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            number = int(image[0, 0, 0])
            assert (image == np.array([number, 255 - number, 7])).all()
            assert label == number % 3
    assert {*numbers_in(batches)} == {*range(SHARDS * PER_SHARD)}
    assert not loader.bad_samples


def test_ranks_have_slots_of_their_own_and_see_different_images(
    streams: Streams, folder: Path
) -> None:
    ranks = [some(streams(folder / "*.tar", rank=r, world_size=2), 10) for r in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert first.slots.tolist() + second.slots.tolist() == list(
            range(int(first.slots[0]), int(first.slots[0]) + 8)
        )
    assert numbers_in(ranks[0]) != numbers_in(ranks[1])


def test_a_seed_makes_the_choice_and_a_resumed_run_makes_another(
    streams: Streams, folder: Path
) -> None:
    path = folder / "*.tar"
    first = numbers_in(some(streams(path, workers=2), 10))
    assert numbers_in(some(streams(path, workers=2), 10)) == first
    assert numbers_in(some(streams(path, workers=2, position=8), 10)) != first
    assert numbers_in(some(streams(path, workers=2, seed=4), 10)) != first


def test_one_warning_says_that_the_order_is_not_exact(
    streams: Streams, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            some(streams(folder / "*.tar", rank=rank, world_size=2), 3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "streamed in random order" in message
    assert "ganscale shards index" in message


def test_bad_samples_are_skipped_at_once_and_counted(streams: Streams, tmp_path: Path) -> None:
    bad = {0: b"", 2: b"not an image", 4: numbered(4)[:40]}
    members = [(name, bad.get(int(name[:3]), data) if ".png" in name else data)
               for name, data in members_of(0)]  # fmt: skip
    loader = streams(write_tar(tmp_path / "a.tar", members), workers=1)
    started = time.monotonic()
    batches = some(loader, 40)
    # webdataset's own handler sleeps for half a second each time: 60 s here.
    assert time.monotonic() - started < 20
    assert {*numbers_in(batches)} == {*range(PER_SHARD)} - bad.keys()
    found = Counter(key for batch in batches for _, _, key, _ in batch.bad_samples)
    assert {*found} == {"000", "002", "004"}
    assert sum(loader.bad_samples.values()) == found.total() > 40
    assert {shard for shard, _ in loader.bad_samples} == {"a.tar"}


def cut_in_an_image(path: Path) -> None:
    os.truncate(path, path.read_bytes().index(numbered(14)) + 20)


def cut_between_members(path: Path) -> None:
    os.truncate(path, path.read_bytes().index(b"014.png"))


def damaged_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = content.index(b"014.png")
    content[start + 148 : start + 156] = b"99999999"  # its checksum
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_in_an_image, "cut"),
        (cut_between_members, "cut"),
        (damaged_header, "damaged"),
        (lambda path: path.write_bytes(b"text " * 1000), "no tar"),
        (lambda path: path.write_bytes(b""), "no tar"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_what_webdataset_silently_leaves_out_is_counted(
    streams: Streams, folder: Path, damage, reason: str
) -> None:
    damage(folder / "shard-1.tar")
    loader = streams(str(folder / "shard-{0..2}.tar"))
    batches = some(loader, 40)
    assert loader.bad_samples.keys() == {("shard-1.tar", reason)}
    whole = {*range(10), *range(20, 30)}
    rest = {10, 11, 12, 13} if reason in ("cut", "damaged") else set()
    assert {*numbers_in(batches)} == whole | rest


def test_a_cut_image_never_gets_the_next_shards_label(streams: Streams, tmp_path: Path) -> None:
    """Both shards have the keys 000 and 001; the first is cut behind an image."""
    members = [
        (f"00{n}.{end}", data)
        for n in (0, 1)
        for end, data in (("png", numbered(n)), ("cls", b"0"))
    ]
    first = write_tar(tmp_path / "0.tar", members)
    os.truncate(first, first.read_bytes().index(b"001.cls") + 100)
    write_tar(tmp_path / "1.tar", [("001.cls", b"1"), ("001.png", numbered(101))])
    loader = streams(tmp_path / "*.tar", class_count=2)
    batches = some(loader, 30)
    for batch in batches:
        for number, label in zip(batch.images[:, 0, 0, 0], batch.labels, strict=True):
            assert int(label) == int(number) // 100
    assert 1 not in numbers_in(batches)
    assert loader.bad_samples[("0.tar", "no class")] > 0


@pytest.mark.parametrize(
    ("extension", "text", "label"),
    [
        ("cls", b"2\n", 2),
        ("cls", b"cat", -1),
        ("cls", str(2**31 - 1).encode(), 2**31 - 1),
        ("json", b'{"label": 1}', 1),
        ("json", b'{"label": "2"}', 2),
        ("json", b'{"class": [3.0]}', 3),
        ("json", b'{"label": [1, 2]}', -1),
        ("txt", b"0", 0),
        ("txt", b"a cat", -1),
    ],
)
def test_labels_are_read_as_indexing_reads_them(
    streams: Streams, tmp_path: Path, extension: str, text: bytes, label: int
) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", numbered(0)), (f"0.{extension}", text)])
    (batch,) = some(streams(path), 1)
    assert batch.labels.tolist() == [label] * 8


def test_labels_beyond_the_classes_are_refused_with_the_expected_range(
    streams: Streams, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", numbered(0)), ("0.cls", b"7")])
    with pytest.raises(UserError, match=r"has label 7, not one of data\.class_count=5 classes"):
        next(streams(path, class_count=5))


@pytest.mark.parametrize("label", [2**31, 10**20, -5])
def test_a_label_that_cannot_be_a_class_is_refused(
    streams: Streams, tmp_path: Path, label: int
) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", numbered(0)), ("0.cls", b"%d" % label)])
    with pytest.raises(UserError, match=f"has label {label}, which is not the number of a class"):
        next(streams(path))


def test_shards_need_no_utf8_in_their_names(streams: Streams, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "tr\udcffain.tar", [("0.png", numbered(0))])
    (batch,) = some(streams(path), 1)
    assert {*numbers_in([batch])} == {0}


def test_a_command_that_closes_its_output_and_goes_on_is_ended() -> None:
    connection = connections.connect("pipe:echo a; exec >&-; sleep 600", 0, stall_seconds=1.0)
    with contextlib.closing(connection):
        assert connection.read(100) == b"a\n"
        with pytest.raises(TimeoutError, match="did not end within 1 s"):
            connection.read(100)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ('"cat"', r"has label 'cat', not one of data\.class_count=5 classes"),
        ("[1, 2]", r"has a label that is \[1, 2\], not one class, not one of data\.class_count=5"),
        ("null", r"has no label, not one of"),
    ],
)
def test_a_label_that_is_not_a_number_is_named(
    streams: Streams, tmp_path: Path, label: str, sentence: str
) -> None:
    members = [("0.png", numbered(0)), ("0.json", f'{{"label": {label}}}'.encode())]
    with pytest.raises(UserError, match=sentence):
        next(streams(write_tar(tmp_path / "a.tar", members), class_count=5))


def test_nothing_in_a_tar_is_run(streams: Streams, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    harm = pickle.dumps(Attack())
    members = [(f"0.{end}", harm) for end in ("pyd", "pkl", "pickle", "pth", "pkl.gz", "npy")]
    write_tar(tmp_path / "a.tar", [*members, ("1.png", numbered(1)), ("1.pth", harm)])
    batches = some(streams(tmp_path / "a.tar"), 10)
    assert {*numbers_in(batches)} == {1}
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_an_image_are_an_error_and_no_endless_search(
    streams: Streams, tmp_path: Path, workers: int
) -> None:
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "texts.tar", [(f"{n}.png", b"text") for n in range(100)])
    write_tar(tmp_path / "labels.tar", [(f"{n}.cls", b"1") for n in range(100)])
    for name, sentence in (
        ("empty", r"32 shards in a row gave no sample; the last: .*empty\.tar is empty"),
        ("texts", r"64 samples in a row could not be used; .* of shard texts\.tar"),
        ("labels", r"64 samples in a row .* shard labels\.tar has no image"),
    ):
        loader = streams(tmp_path / f"{name}.tar", workers=workers)
        for _ in range(2):
            with pytest.raises(UserError, match=sentence):
                next(loader)


def test_missing_shards_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches .*/none-\*\.tar"):
        open_data(DataConfig(path=f"{tmp_path}/none-*.tar", resolution=4))
    with pytest.raises(UserError, match=r"the braces of .* do not match"):
        open_data(DataConfig(path=f"{folder}/shard-{{1..3.tar", resolution=4))
    data = open_data(DataConfig(path=f"{folder}/shard-{{1..3}}.tar", resolution=4))
    with pytest.raises(UserError, match=r"the shard .*/shard-3\.tar of data\.path is missing"):
        data.check(1.0)
    check_urls(stream_urls(f"{folder}/*.tar"))


def test_a_commands_output_is_a_shard_and_its_failure_is_noticed(
    streams: Streams, folder: Path
) -> None:
    good = streams(f"pipe:cat {folder}/shard-{{0..2}}.tar", workers=2)
    assert {*numbers_in(some(good, 30))} == {*range(30)}
    assert not good.bad_samples
    once = f"[ -e {folder}/failed ] || {{ touch {folder}/failed; "
    once += f"head -c 5000 {folder}/shard-0.tar; exit 3; }}"
    retried = streams(f"pipe:{once}; cat {folder}/shard-0.tar", retry_seconds=30)
    assert {*numbers_in(some(retried, 5))} == {*range(10)}
    assert not retried.bad_samples
    for command, code in ((f"cat {folder}/shard-0.tar; exit 3", 3), (f"cat {folder}/none", 1)):
        with pytest.raises(UnavailableError, match=f"failed with exit code {code}"):
            next(streams(f"pipe:{command}", retry_seconds=0))
    absent = streams("pipe:no-such-command-anywhere")
    with pytest.raises(UserError, match=r"cannot be read: .*the command failed with exit code 127"):
        next(absent)


def test_a_command_is_refused_where_the_environment_forbids_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(UserError, match="WDS_SECURE=1"):
        open_data(DataConfig(path=f"pipe:cat {folder}/shard-0.tar", resolution=4))


def test_a_source_that_falls_silent_asks_for_a_requeue(
    streams: Streams, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganscale.data.streaming.loader._STALL_SECONDS", 1.0)
    command = f"pipe:head -c 4000 {folder}/shard-0.tar; exec sleep 600"
    loader = streams(command, retry_seconds=0)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="nothing came from pipe:head"):
        next(loader)
    loader.close()
    assert time.monotonic() - started < 300  # of the 600 s that the command is silent


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        server.serve(folder)
        yield server


CUTS = [Fault(cut_after=6_000), Fault(status=503), Fault(cut_after=10)]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_cuts_and_a_busy_server_change_no_image(
    streams: Streams, server: FaultServer, has_ranges: bool
) -> None:
    path = f"{server.url}/shard-{{0..2}}.tar"
    expected = some(streams(path), 20)
    assert {*numbers_in(expected)} == {*range(30)}
    server.has_ranges = has_ranges
    server.faults["/shard-1.tar"].extend(CUTS)
    loader = streams(path)
    for batch, other in zip(some(loader, 20), expected, strict=True):
        assert batch.images.equal(other.images)
        assert batch.labels.equal(other.labels)
    assert not any(server.faults.values())
    assert not loader.bad_samples


def test_a_cut_that_the_protocol_cannot_show_is_counted(
    streams: Streams, server: FaultServer
) -> None:
    server.has_length = False
    server.faults["/shard-1.tar"].append(Fault(cut_after=6_000))
    loader = streams(f"{server.url}/shard-{{0..2}}.tar")
    assert {*numbers_in(some(loader, 40))} == {*range(30)}
    assert loader.bad_samples == {("shard-1.tar", "cut"): 1}


def test_shards_are_streamed_from_s3_also_by_wildcard(
    streams: Streams, folder: Path, s3: S3
) -> None:
    for shard in range(SHARDS):
        s3.put(f"stream/shard-{shard}.tar", (folder / f"shard-{shard}.tar").read_bytes())
    s3.proxy.faults["/bucket/stream/shard-1.tar"].extend(CUTS)
    assert stream_urls("s3://bucket/stream/*.tar") == [
        f"s3://bucket/stream/shard-{shard}.tar" for shard in range(SHARDS)
    ]
    s3.proxy.faults["/bucket"].append(Fault(status=503))
    loader = streams("s3://bucket/stream/*.tar", workers=2)
    assert {*numbers_in(some(loader, 30))} == {*range(30)}
    assert not loader.bad_samples
    assert not any(s3.proxy.faults.values())


def test_one_missing_shard_is_counted_and_none_at_all_is_an_error(
    streams: Streams, server: FaultServer
) -> None:
    loader = streams(f"{server.url}/shard-{{0..3}}.tar?token=secret")
    batches = some(loader, 20)
    assert {*numbers_in(batches)} == {*range(30)}
    assert loader.bad_samples.keys() == {("shard-3.tar", "cannot be read")}
    details = {bad.detail for batch in batches for bad in batch.bad_samples}
    assert details == {"cannot be read: there is no such object"}
    missing = streams(f"{server.url}/none.tar?token=secret")
    with pytest.raises(UserError, match=r"/none\.tar cannot be read: there is no such object$"):
        next(missing)


def test_an_unreachable_network_asks_for_a_requeue_at_the_start_and_later(
    streams: Streams, server: FaultServer
) -> None:
    for name in ("{0..9}", "*"):
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
            next(streams(f"http://127.0.0.1:9/{name}.tar", retry_seconds=0))
    for shard in range(SHARDS):
        server.faults[f"/shard-{shard}.tar"].extend([Fault()] * 9 + [Fault(cut_after=6_000)])
        server.faults[f"/shard-{shard}.tar"].extend([Fault(status=503)] * 1000)
    loader = streams(f"{server.url}/shard-{{0..2}}.tar", retry_seconds=0.5)
    some(loader, 5)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"shard-.\.tar cannot be read: 503"):
            some(loader, 200)
    assert not loader.bad_samples


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member's header that says that it has `size` bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (header("900.png", 1 << 40), "too large"),
        (header("900.cls", 1 << 62), "too large"),
        (header("900.bin", 1 << 62), "cut"),
        (header("././@PaxHeader", 1 << 40, tarfile.XHDTYPE), "damaged"),
        (header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME), "damaged"),
    ],
)
def test_a_size_that_only_a_header_claims_costs_neither_memory_nor_time(
    streams: Streams, tmp_path: Path, lie: bytes, reason: str
) -> None:
    good = write_tar(tmp_path / "a.tar", members_of(0)).read_bytes().rstrip(b"\0")
    good += bytes(-len(good) % tarfile.BLOCKSIZE)
    (tmp_path / "a.tar").write_bytes(good + lie + bytes(20_000))
    loader = streams(tmp_path / "a.tar")
    assert {*numbers_in(some(loader, 10))} == {*range(10)}
    assert ("a.tar", reason) in loader.bad_samples
    assert loader.bad_samples.keys() <= {("a.tar", reason), ("a.tar", "cut")}


def test_a_member_beyond_the_limit_is_left_out_and_the_rest_is_read(
    streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganscale.data.streaming.tar_stream.LARGEST_IMAGE_BYTES", 50_000)
    members = [(name, data + bytes(50_000) if name == "004.png" else data)
               for name, data in members_of(0)]  # fmt: skip
    loader = streams(write_tar(tmp_path / "a.tar", members))
    batches = some(loader, 20)
    assert {*numbers_in(batches)} == {*range(10)} - {4}
    assert loader.bad_samples.keys() == {("a.tar", "too large")}
    found = {(bad.key, bad.detail) for batch in batches for bad in batch.bad_samples}
    assert found == {("004", f"has {50_000 + len(numbered(4)):,} bytes, more than 256 MiB")}


@pytest.mark.parametrize(
    "path", ["pipe:echo $$ > {pid}; exec sleep 600", "http://127.0.0.1:9/a.tar"]
)
def test_close_ends_a_read_that_hangs_and_its_command(
    streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("ganscale.data.backoff._FIRST_DELAY_SECONDS", 30.0)
    monkeypatch.setattr("random.uniform", max)
    pid_file = tmp_path / "pid"
    loader = streams(path.format(pid=pid_file), retry_seconds=600)

    def wait() -> None:
        with contextlib.suppress(BaseException):
            next(loader)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    if path.startswith("pipe:"):
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
    loader.close()
    waiting.join(300)
    assert not any(thread.name.startswith("stream-") for thread in threading.enumerate())
    if path.startswith("pipe:"):
        assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


def test_close_ends_the_threads(streams: Streams, folder: Path) -> None:
    before = set(threading.enumerate())
    loader = streams(folder / "*.tar", workers=3)
    some(loader, 3)
    assert len(set(threading.enumerate()) - before) == 3
    loader.close()
    assert set(threading.enumerate()) <= before
    loader.close()


def test_a_summary_of_bad_samples_is_plain_json(streams: Streams, folder: Path) -> None:
    cut_in_an_image(folder / "shard-1.tar")
    loader = streams(folder / "*.tar")
    batches = some(loader, 20)
    assert json.loads(json.dumps([bad for batch in batches for bad in batch.bad_samples]))


@pytest.mark.parametrize("has_label", [False, True])
def test_images_under_other_names_are_named_with_the_option_that_takes_them(
    tmp_path: Path, streams: Streams, has_label: bool
) -> None:
    members = [
        (f"{i}.{name}", numbered(i)) for i in range(99) for name in ("left.jpg", "right.jpg")
    ]
    labels = [(f"{i}.cls", b"1") for i in range(99)] if has_label else []
    write_tar(tmp_path / "stereo.tar", sorted(members + labels))
    sentence = (
        "has no image, only .left.jpg and .right.jpg: `ganscale shards index --image left.jpg`"
    )
    with pytest.raises(UserError, match=sentence):
        next(streams(tmp_path / "stereo.tar"))


def test_of_several_images_the_first_is_used_and_a_warning_says_so_once(
    tmp_path: Path, streams: Streams, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("jpg", "png", "npy")
    members = [(f"{i}.{name}", numbered(i)) for i in range(9) for name in names]
    write_tar(tmp_path / "both.tar", members)
    assert len(some(streams(tmp_path / "both.tar"), 4)) == 4
    messages = [record.getMessage() for record in caplog.records]
    (message,) = [message for message in messages if message.startswith("samples have")]
    assert message == (
        "samples have several images, .jpg and .png: the first is used; `ganscale shards index "
        "--image EXT` chooses one"
    )
