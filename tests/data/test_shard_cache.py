"""Cached shards are whole, fetched once for all readers, and never exceed the capacity."""

import hashlib
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from ganscale.data.order import working_set_bytes
from ganscale.data.remote.shard_cache import ShardCache
from ganscale.errors import UnavailableError, UserError
from tests.data.shard_caches import SHARD_BYTES, SHARDS, bytes_in, content_of
from tests.helpers.fault_server import Fault
from tests.helpers.processes import wait_until


def test_a_shard_is_fetched_once_and_named_by_its_contents(caches, shard_server):
    url = caches.address(SHARDS[0])
    assert bytes_in(caches().open(url, SHARDS[0])) == content_of(0)
    again = caches().open("http://127.0.0.1:9/moved.tar", SHARDS[0])
    assert bytes_in(again) == content_of(0)
    assert shard_server.gets.total() == 1
    assert caches.copies() == [SHARDS[0].sha256]
    assert not caches.partials()


def test_equal_names_of_different_shards_are_kept_apart(caches, shard_server):
    """With and without checksums."""
    for number in range(2):
        shard_server.objects[f"/set-{number}/a.tar"] = content_of(number)
    for sha256 in (True, False):
        for number in range(2):
            shard = replace(SHARDS[number], name="a.tar")
            shard = shard if sha256 else replace(shard, sha256="")
            copy = caches().open(f"{shard_server.url}/set-{number}/a.tar", shard)
            assert bytes_in(copy) == content_of(number)


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503), Fault(cut_after=70_000), Fault(stall_after=70_000), Fault(cut_after=0)],
)
@pytest.mark.parametrize("server_has", ["all", "no ranges", "no length", "neither"])
def test_faults_leave_no_trace_in_a_copy(caches, shard_server, fault, server_has):
    shard_server.has_ranges = server_has in ("all", "no length")
    shard_server.has_length = server_has in ("all", "no ranges")
    shard_server.faults[f"/{SHARDS[0].name}"].append(fault)
    for shard in (SHARDS[0], replace(SHARDS[1], sha256="")):
        copy = caches().open(caches.address(shard), shard)
        assert hashlib.sha256(bytes_in(copy)).hexdigest() == shard.name.removesuffix(".tar")


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (content_of(100), "another SHA-256"),
        (content_of(0)[:-1], "199,999 bytes, not 200,000"),
        (content_of(0) + b"x", "200,001 bytes, not 200,000"),
    ],
)
def test_an_object_that_is_not_the_indexed_one_is_fetched_twice_and_then_named(
    caches, shard_server, other, found
):
    path = f"/{SHARDS[0].name}"
    shard_server.objects[path] = other
    with pytest.raises(UserError, match=rf"\.tar changed since it was indexed: it has {found}"):
        caches().open(caches.address(SHARDS[0]), SHARDS[0])
    assert shard_server.gets[path] == 2
    assert not caches.copies() + caches.partials()
    shard_server.objects[path] = content_of(0)
    assert bytes_in(caches().open(caches.address(SHARDS[0]), SHARDS[0])) == content_of(0)


def test_a_longer_object_of_unknown_length_is_noticed_without_a_checksum(caches, shard_server):
    shard_server.has_length = False
    shard_server.objects[f"/{SHARDS[0].name}"] += b"x"
    with pytest.raises(UserError, match="it has more than 200,000 bytes"):
        caches().open(caches.address(SHARDS[0]), replace(SHARDS[0], sha256=""))


def test_missing_shards_and_lasting_failures_end_as_they_should(caches, shard_server):
    gone = replace(SHARDS[0], name="gone.tar")
    with pytest.raises(UserError, match=r"gone\.tar: there is no such object"):
        caches().open(caches.address(gone), gone)
    shard_server.faults[f"/{SHARDS[1].name}"].extend([Fault(status=503)] * 100)
    with pytest.raises(UnavailableError, match="503"):
        caches(retry_seconds=0.3).open(caches.address(SHARDS[1]), SHARDS[1])
    assert not caches.copies()


def test_a_copy_of_another_size_is_dropped_and_fetched_again(caches, shard_server):
    cache = caches()
    cache.open(caches.address(SHARDS[0]), SHARDS[0])
    copy = caches.folder / "shards" / f"{SHARDS[0].sha256}.tar"
    os.truncate(copy, 1000)
    assert bytes_in(cache.open(caches.address(SHARDS[0]), SHARDS[0])) == content_of(0)
    assert shard_server.gets.total() == 2


def test_threads_that_share_a_cache_fetch_each_shard_once(caches, shard_server):
    cache, wrong = caches(), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, len(SHARDS), 60).tolist():
            copy = cache.open(caches.address(SHARDS[number]), SHARDS[number])
            if bytes_in(copy) != content_of(number):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert set(shard_server.gets.values()) == {1}


def test_a_spoilt_partial_is_given_up(caches, shard_server):
    folder = caches.folder / "shards"
    folder.mkdir(parents=True)
    for number, spoilt in enumerate((b"x" * 1000, content_of(1) + b"longer")):
        partial = folder / f"{SHARDS[number].sha256}.{SHARD_BYTES}.partial"
        partial.write_bytes(spoilt)
        copy = caches().open(caches.address(SHARDS[number]), SHARDS[number])
        assert bytes_in(copy) == content_of(number)


def test_a_reader_without_space_waits_until_others_are_done(caches, shard_server):
    held = caches(1).open(caches.address(SHARDS[0]), SHARDS[0])
    found: list[bytes] = []
    cache = caches(1)

    def read() -> None:
        found.append(bytes_in(cache.open(caches.address(SHARDS[1]), SHARDS[1])))

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    assert not found
    del held
    thread.join(20)
    assert found == [content_of(1)]
    assert caches.copies() == [SHARDS[1].sha256]


def test_what_is_being_fetched_counts_as_a_whole(caches, shard_server):
    shard_server.faults[f"/{SHARDS[0].name}"].append(Fault(stall_after=1000))
    slow = ShardCache(caches.folder, round(1.5 * SHARD_BYTES), 20, stall_seconds=2)
    caches.made.append(slow)
    slow.prefetch([(caches.address(SHARDS[0]), SHARDS[0])])
    wait_until(lambda: caches.partials() and caches.partials()[0].stat().st_size)
    # There is room for the 1,000 bytes that came and this one, but not for both in the end.
    assert bytes_in(caches(1.5).open(caches.address(SHARDS[1]), SHARDS[1])) == content_of(1)
    assert shard_server.gets[f"/{SHARDS[0].name}"] == 2  # begun first, done first
    assert caches.copies() == [SHARDS[1].sha256]


def test_a_cache_that_is_too_small_is_named_with_what_it_needs(caches):
    with pytest.raises(UserError, match=r"no space .* of 200,000 bytes.* data\.cache_gib=0\.001"):
        caches(0.9).open(caches.address(SHARDS[0]), SHARDS[0])


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache=.*file cannot be written"):
        ShardCache(tmp_path / "file", 1, 0)


def test_prefetching_fetches_in_order_and_leaves_errors_to_the_reader(caches, shard_server):
    cache = caches()
    gone = replace(SHARDS[0], name="gone.tar", sha256="")
    wanted = [gone, *SHARDS]
    cache.prefetch((caches.address(shard), shard) for shard in wanted)
    cache.prefetch((caches.address(shard), shard) for shard in wanted)
    wait_until(lambda: len(caches.copies()) == len(SHARDS))
    assert set(shard_server.gets.values()) == {1}
    for number, shard in enumerate(SHARDS):
        assert bytes_in(cache.open(caches.address(shard), shard)) == content_of(number)
    assert set(shard_server.gets.values()) == {1}
    with pytest.raises(UserError, match="no such object"):
        cache.open(caches.address(gone), gone)


def test_a_needed_shard_does_not_queue_behind_those_fetched_ahead(caches, shard_server):
    for shard in SHARDS[:4]:
        shard_server.faults[f"/{shard.name}"].append(Fault(stall_after=10))
    cache = ShardCache(caches.folder, 10**9, 600, stall_seconds=600)
    caches.made.append(cache)
    cache.prefetch((caches.address(shard), shard) for shard in SHARDS)  # all threads hang
    wait_until(lambda: sum(shard_server.gets.values()) == 4)
    assert bytes_in(cache.open(caches.address(SHARDS[7]), SHARDS[7])) == content_of(7)
    start = time.monotonic()
    cache.close(0.1)
    assert time.monotonic() - start < 300  # of the 600 s after which a fetch gives up


def test_the_working_set_is_that_of_two_windows_of_each_lane():
    def need(**settings) -> int:
        sizes = np.full(1000, 10**8)
        default = {"node_lanes": 8, "lanes": 64, "block_samples": 256, "window_blocks": 4}
        return working_set_bytes(sizes, np.full(1000, 2560), **{**default, **settings})

    assert need() == 8 * 10 * 10**8  # of each lane twice 4 blocks and one more, all far apart
    assert need(window_blocks=8) == 8 * 18 * 10**8
    assert need(node_lanes=1) == 10 * 10**8
    assert need(node_lanes=64, window_blocks=100) == 1000 * 10**8  # no more than there are
    assert need(block_samples=512, window_blocks=2) == 8 * 6 * 10**8
