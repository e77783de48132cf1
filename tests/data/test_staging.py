"""Staged shards are whole, fetched once for all, and never more than there is room for."""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.manifest import Shard
from ganscale.data.staging import ShardCache, StagedShard, working_set
from ganscale.errors import UnavailableError, UserError
from tests.conftest import REPOSITORY, end_tree
from tests.data.fault_server import Fault, FaultServer

SHARD_BYTES = 200_000


def content_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SHARD_BYTES)


def shard_of(content: bytes) -> Shard:
    """Its name is its checksum, too, for processes that know no contents."""
    digest = hashlib.sha256(content).hexdigest()
    return Shard(f"{digest}.tar", len(content), digest, 1)


SHARDS = [shard_of(content_of(number)) for number in range(8)]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer().running() as server:
        for number, shard in enumerate(SHARDS):
            server.objects[f"/{shard.name}"] = content_of(number)
        yield server


class Caches:
    """Makes caches on one folder, and closes them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.made: list[ShardCache] = []

    def __call__(self, shards: float = 100, retry_seconds: float = 20.0) -> ShardCache:
        capacity = round(shards * SHARD_BYTES)
        self.made.append(ShardCache(self.folder, capacity, retry_seconds, stall_seconds=0.5))
        return self.made[-1]

    def address(self, shard: Shard) -> str:
        return f"{self.url}/{shard.name}"

    def copies(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "shards").glob("*.tar"))

    def partials(self) -> list[Path]:
        return list((self.folder / "shards").glob("*.partial"))


@pytest.fixture
def caches(tmp_path, server) -> Iterator[Caches]:
    caches = Caches(tmp_path / "cache", server.url)
    yield caches
    for cache in caches.made:
        cache.close()


def bytes_in(staged: StagedShard) -> bytes:
    return os.pread(staged.descriptor, 10 * SHARD_BYTES, 0)


def until(happened, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def process(
    caches: Caches, shards: list[Shard], *, room: float = 100, hold: bool = False
) -> Iterator[subprocess.Popen[str]]:
    script = str(Path(__file__).with_name("staging_process.py"))
    listed = json.dumps([asdict(shard) for shard in shards])
    where = [str(caches.folder), str(round(room * SHARD_BYTES)), caches.url, listed]
    started = subprocess.Popen(
        [sys.executable, script, *where, *(["hold"] if hold else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        yield started
    finally:
        end_tree(started)
        for stream in (started.stdin, started.stdout, started.stderr):
            if stream is not None:
                stream.close()


def test_a_shard_is_fetched_once_and_named_by_its_contents(caches, server):
    url = caches.address(SHARDS[0])
    assert bytes_in(caches().open(url, SHARDS[0])) == content_of(0)
    again = pickle.loads(pickle.dumps(caches())).open("http://127.0.0.1:9/moved.tar", SHARDS[0])
    assert bytes_in(again) == content_of(0)
    assert server.gets.total() == 1
    assert caches.copies() == [SHARDS[0].sha256]
    assert not caches.partials()


def test_equal_names_of_different_shards_are_kept_apart(caches, server):
    """With and without checksums."""
    for number in range(2):
        server.objects[f"/set-{number}/a.tar"] = content_of(number)
    for sha256 in (True, False):
        for number in range(2):
            shard = replace(SHARDS[number], name="a.tar")
            shard = shard if sha256 else replace(shard, sha256="")
            staged = caches().open(f"{server.url}/set-{number}/a.tar", shard)
            assert bytes_in(staged) == content_of(number)


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503), Fault(cut_after=70_000), Fault(stall_after=70_000), Fault(cut_after=0)],
)
@pytest.mark.parametrize("server_has", ["all", "no ranges", "no length", "neither"])
def test_faults_leave_no_trace_in_a_copy(caches, server, fault, server_has):
    server.has_ranges = server_has in ("all", "no length")
    server.has_length = server_has in ("all", "no ranges")
    server.faults[f"/{SHARDS[0].name}"].append(fault)
    for shard in (SHARDS[0], replace(SHARDS[1], sha256="")):
        staged = caches().open(caches.address(shard), shard)
        assert hashlib.sha256(bytes_in(staged)).hexdigest() == shard.name.removesuffix(".tar")


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (content_of(100), "another SHA-256"),
        (content_of(0)[:-1], "199,999 bytes, not 200,000"),
        (content_of(0) + b"x", "200,001 bytes, not 200,000"),
    ],
)
def test_an_object_that_is_not_the_indexed_one_is_fetched_twice_and_then_named(
    caches, server, other, found
):
    path = f"/{SHARDS[0].name}"
    server.objects[path] = other
    with pytest.raises(UserError, match=rf"\.tar changed since it was indexed: it has {found}"):
        caches().open(caches.address(SHARDS[0]), SHARDS[0])
    assert server.gets[path] == 2
    assert not caches.copies() + caches.partials()
    server.objects[path] = content_of(0)
    assert bytes_in(caches().open(caches.address(SHARDS[0]), SHARDS[0])) == content_of(0)


def test_a_longer_object_of_unknown_length_is_noticed_without_a_checksum(caches, server):
    server.has_length = False
    server.objects[f"/{SHARDS[0].name}"] += b"x"
    with pytest.raises(UserError, match="it has more than 200,000 bytes"):
        caches().open(caches.address(SHARDS[0]), replace(SHARDS[0], sha256=""))


def test_missing_shards_and_lasting_failures_end_as_they_should(caches, server):
    gone = replace(SHARDS[0], name="gone.tar")
    with pytest.raises(UserError, match=r"gone\.tar: there is no such object"):
        caches().open(caches.address(gone), gone)
    server.faults[f"/{SHARDS[1].name}"].extend([Fault(status=503)] * 100)
    with pytest.raises(UnavailableError, match="503"):
        caches(retry_seconds=0.3).open(caches.address(SHARDS[1]), SHARDS[1])
    assert not caches.copies()


def test_a_copy_of_another_size_is_dropped_and_fetched_again(caches, server):
    cache = caches()
    cache.open(caches.address(SHARDS[0]), SHARDS[0])
    copy = caches.folder / "shards" / f"{SHARDS[0].sha256}.tar"
    with copy.open("r+b") as file:
        file.truncate(1000)
    assert bytes_in(cache.open(caches.address(SHARDS[0]), SHARDS[0])) == content_of(0)
    assert server.gets.total() == 2


def test_processes_that_share_a_cache_fetch_each_shard_once(caches, server):
    for shard in SHARDS:  # slow enough that all want the same one at the same time
        server.faults[f"/{shard.name}"].append(Fault(seconds_a_piece=0.002))
    with contextlib.ExitStack() as stack:
        all_of_them = [stack.enter_context(process(caches, SHARDS)) for _ in range(3)]
        for each in all_of_them:
            output, errors = each.communicate(timeout=60)
            assert (each.returncode, errors) == (0, "")
            assert output.split() == [word for s in SHARDS for word in (s.name, "True")]
    assert server.gets == {f"/{shard.name}": 1 for shard in SHARDS}


def test_threads_that_share_a_cache_fetch_each_shard_once(caches, server):
    cache, wrong = caches(), []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, len(SHARDS), 60).tolist():
            staged = cache.open(caches.address(SHARDS[number]), SHARDS[number])
            if bytes_in(staged) != content_of(number):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert set(server.gets.values()) == {1}


@pytest.mark.parametrize("has_checksum", [True, False])
def test_what_a_killed_process_fetched_in_part_is_taken_up_if_it_can_be_verified(
    caches, server, has_checksum
):
    shard = SHARDS[0] if has_checksum else replace(SHARDS[0], sha256="")
    path = f"/{shard.name}"
    server.faults[path].append(Fault(seconds_a_piece=0.02))
    with process(caches, [shard]) as victim:
        until(lambda: any(each.stat().st_size > 20_000 for each in caches.partials()))
        victim.kill()
        victim.wait(10)
    (partial,) = caches.partials()
    assert not caches.copies()
    left = partial.stat().st_size
    assert bytes_in(caches().open(caches.address(shard), shard)) == content_of(0)
    assert server.ranges[path] == [0, left if has_checksum else 0]
    assert not caches.partials()


def test_a_spoilt_partial_is_given_up(caches, server):
    folder = caches.folder / "shards"
    folder.mkdir(parents=True)
    for number, spoilt in enumerate((b"x" * 1000, content_of(1) + b"longer")):
        partial = folder / f"{SHARDS[number].sha256}.{SHARD_BYTES}.partial"
        partial.write_bytes(spoilt)
        staged = caches().open(caches.address(SHARDS[number]), SHARDS[number])
        assert bytes_in(staged) == content_of(number)


def test_killing_at_any_moment_leaves_nothing_half_in_use(caches, server):
    """Two processes with room for half of the shards are killed again and again, at any point of
    fetching, renaming and evicting."""
    for shard in SHARDS:
        server.faults[f"/{shard.name}"].extend([Fault(seconds_a_piece=0.0005)] * 1000)
    random = np.random.default_rng(0)
    for _ in range(6):
        order = [SHARDS[i] for i in random.permutation(len(SHARDS))] * 20
        with contextlib.ExitStack() as stack:
            pair = [stack.enter_context(process(caches, order, room=4)) for _ in range(2)]
            assert pair[0].stdout is not None
            assert pair[0].stdout.readline()  # it is at work
            time.sleep(random.uniform(0, 0.4))
            for victim in pair:
                victim.kill()
                output, errors = victim.communicate(timeout=10)
                assert "False" not in output
                assert errors == ""
        found = [path.read_bytes() for path in (caches.folder / "shards").glob("*.tar")]
        names = [hashlib.sha256(each).hexdigest() for each in found]
        assert sorted(names) == caches.copies()
        kept = [*found, *(path.read_bytes() for path in caches.partials())]
        assert sum(map(len, kept)) <= 4 * SHARD_BYTES
    for number, shard in enumerate(SHARDS):
        assert bytes_in(caches(4).open(caches.address(shard), shard)) == content_of(number)
    assert len(caches.copies()) <= 4


def age(caches: Caches, shard: Shard, seconds: float) -> None:
    copy = caches.folder / "shards" / f"{shard.sha256}.tar"
    used_at = time.time() - seconds
    os.utime(copy, (used_at, used_at))


def test_the_least_recently_used_go_first_and_what_is_open_stays(caches):
    cache = caches(3)
    for number in range(3):
        cache.open(caches.address(SHARDS[number]), SHARDS[number])
        age(caches, SHARDS[number], 100 - number)
    held = cache.open(caches.address(SHARDS[0]), SHARDS[0])
    age(caches, SHARDS[0], 200)
    cache.open(caches.address(SHARDS[2]), SHARDS[2])  # touched: 1 is the oldest that is free
    cache.open(caches.address(SHARDS[3]), SHARDS[3])
    assert caches.copies() == sorted(SHARDS[i].sha256 for i in (0, 2, 3))
    with process(caches, [SHARDS[2]], hold=True) as reader:  # another run reads 2
        assert reader.stdout is not None
        assert reader.stdout.readline()
        age(caches, SHARDS[2], 300)
        cache.open(caches.address(SHARDS[4]), SHARDS[4])
        assert caches.copies() == sorted(SHARDS[i].sha256 for i in (0, 2, 4))
    del held
    cache.open(caches.address(SHARDS[5]), SHARDS[5])  # a killed reader holds nothing
    assert caches.copies() == sorted(SHARDS[i].sha256 for i in (0, 4, 5))


def test_who_finds_no_room_waits_until_others_are_done(caches, server):
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


def test_who_waits_in_vain_gives_up(caches, server):
    held = caches(1).open(caches.address(SHARDS[0]), SHARDS[0])
    with pytest.raises(UnavailableError, match=r"all room in .* and did nothing for 1 s"):
        caches(1, retry_seconds=0).open(caches.address(SHARDS[1]), SHARDS[1])
    del held
    server.faults[f"/{SHARDS[2].name}"].append(Fault(seconds_a_piece=0.05))
    with process(caches, [SHARDS[2]]) as sleeper:
        until(caches.partials)
        sleeper.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="another process holds it"):
            caches(retry_seconds=0).open(caches.address(SHARDS[2]), SHARDS[2])


def test_a_cache_that_is_too_small_is_named_with_what_it_needs(caches):
    with pytest.raises(UserError, match=r"no room .* of 200,000 bytes.* data\.cache_gib=0\.001"):
        caches(0.9).open(caches.address(SHARDS[0]), SHARDS[0])


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache=.*file cannot be written"):
        ShardCache(tmp_path / "file", 1, 0)


def test_a_full_disk_costs_copies_first_and_then_a_sentence(caches, tmp_path):
    """On a real small disk, in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = str(Path(__file__).with_name("staging_process.py"))
    listed = json.dumps([asdict(shard) for shard in SHARDS])
    run = f"{sys.executable} {script} {disk} {10**12} {caches.url} '{listed}'"
    mount = f"mount -t tmpfs -o size=%dk none {disk}"
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*private, mount % 100], capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    for kib, exit_code in ((500, 0), (100, 1)):
        ended = subprocess.run(
            [*private, f"{mount % kib} && {run}; code=$?; ls {disk}/shards | wc -l; exit $code"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=REPOSITORY,
        )
        assert ended.returncode == exit_code, ended.stderr
        if exit_code == 0:
            assert ended.stdout.count("True") == len(SHARDS)
            assert ended.stdout.split()[-1] == "3"  # two copies and the lock
        else:
            assert "no room in data.cache" in ended.stderr
            assert "the disk has" in ended.stderr


def test_prefetching_stages_in_order_and_leaves_mistakes_to_the_reader(caches, server):
    cache = caches()
    gone = replace(SHARDS[0], name="gone.tar", sha256="")
    wanted = [gone, *SHARDS]
    cache.prefetch((caches.address(shard), shard) for shard in wanted)
    cache.prefetch((caches.address(shard), shard) for shard in wanted)
    until(lambda: len(caches.copies()) == len(SHARDS))
    assert set(server.gets.values()) == {1}
    for number, shard in enumerate(SHARDS):
        assert bytes_in(cache.open(caches.address(shard), shard)) == content_of(number)
    assert set(server.gets.values()) == {1}
    with pytest.raises(UserError, match="no such object"):
        cache.open(caches.address(gone), gone)


def test_who_needs_a_shard_does_not_queue_behind_those_fetched_ahead(caches, server):
    for shard in SHARDS[:4]:
        server.faults[f"/{shard.name}"].append(Fault(stall_after=10))
    cache = ShardCache(caches.folder, 10**9, 60, stall_seconds=60)
    caches.made.append(cache)
    cache.prefetch((caches.address(shard), shard) for shard in SHARDS)  # all threads hang
    until(lambda: sum(server.gets.values()) == 4)
    assert bytes_in(cache.open(caches.address(SHARDS[7]), SHARDS[7])) == content_of(7)
    start = time.monotonic()
    cache.close(0.1)
    assert time.monotonic() - start < 5


def test_the_working_set_is_that_of_two_windows_of_each_lane():
    def need(**settings) -> int:
        sizes = np.full(1000, 10**8)
        default = {"node_lanes": 8, "lanes": 64, "block_samples": 256, "window_blocks": 4}
        return working_set(sizes, np.full(1000, 2560), **{**default, **settings})

    assert need() == 8 * 10 * 10**8  # of each lane twice 4 blocks and one more, all far apart
    assert need(window_blocks=8) == 8 * 18 * 10**8
    assert need(node_lanes=1) == 10 * 10**8
    assert need(node_lanes=64, window_blocks=100) == 1000 * 10**8  # no more than there are
    assert need(block_samples=512, window_blocks=2) == 8 * 6 * 10**8
