"""Ranks and runs that share a cache, and are killed or stopped at any moment."""

import contextlib
import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from ganscale.errors import UnavailableError
from tests.data.shard_caches import SHARD_BYTES, SHARDS, age, bytes_in, content_of, process
from tests.helpers.fault_server import Fault
from tests.helpers.processes import REPOSITORY, wait_until


def test_processes_that_share_a_cache_fetch_each_shard_once(caches, shard_server):
    for shard in SHARDS:  # slow enough that all want the same one at the same time
        shard_server.faults[f"/{shard.name}"].append(Fault(seconds_a_piece=0.002))
    with contextlib.ExitStack() as stack:
        all_of_them = [stack.enter_context(process(caches, SHARDS)) for _ in range(3)]
        for each in all_of_them:
            output, errors = each.communicate(timeout=300)
            assert (each.returncode, errors) == (0, "")
            assert output.split() == [word for s in SHARDS for word in (s.name, "True")]
    assert shard_server.gets == {f"/{shard.name}": 1 for shard in SHARDS}


@pytest.mark.parametrize("has_checksum", [True, False])
def test_the_partial_of_a_killed_process_is_completed_if_it_can_be_verified(
    caches, shard_server, has_checksum
):
    shard = SHARDS[0] if has_checksum else replace(SHARDS[0], sha256="")
    path = f"/{shard.name}"
    shard_server.faults[path].append(Fault(seconds_a_piece=0.02))
    with process(caches, [shard]) as victim:
        wait_until(lambda: any(each.stat().st_size > 20_000 for each in caches.partials()))
        victim.kill()
        victim.wait(10)
    (partial,) = caches.partials()
    assert not caches.copies()
    left = partial.stat().st_size
    assert bytes_in(caches().open(caches.address(shard), shard)) == content_of(0)
    assert shard_server.ranges[path] == [0, left if has_checksum else 0]
    assert not caches.partials()


def test_killing_at_any_moment_leaves_nothing_half_in_use(caches, shard_server):
    """Two processes with room for half of the shards are killed again and again, at any point of
    fetching, renaming and evicting."""
    for shard in SHARDS:
        shard_server.faults[f"/{shard.name}"].extend([Fault(seconds_a_piece=0.0005)] * 1000)
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
                output, errors = victim.communicate(timeout=300)
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


def test_a_reader_that_waits_in_vain_gives_up(caches, shard_server):
    held = caches(1).open(caches.address(SHARDS[0]), SHARDS[0])
    with pytest.raises(UnavailableError, match=r"all space in .* and has made no progress for 1 s"):
        caches(1, retry_seconds=0).open(caches.address(SHARDS[1]), SHARDS[1])
    del held
    shard_server.faults[f"/{SHARDS[2].name}"].append(Fault(seconds_a_piece=0.05))
    with process(caches, [SHARDS[2]]) as sleeper:
        wait_until(caches.partials)
        sleeper.send_signal(signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="another process holds it"):
            caches(retry_seconds=0).open(caches.address(SHARDS[2]), SHARDS[2])


def test_a_reader_that_waits_in_vain_for_the_folder_gives_up(caches):
    """As if another process had been stopped with the lock."""
    caches()
    with (caches.folder / "shards" / "lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="another process has kept it locked for 1 s"):
            caches(retry_seconds=0)


def test_a_full_disk_evicts_copies_first_and_then_is_an_error(caches, tmp_path):
    """On a real small disk, in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = str(Path(__file__).with_name("shard_cache_process.py"))
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
            timeout=300,
            cwd=REPOSITORY,
        )
        assert ended.returncode == exit_code, ended.stderr
        if exit_code == 0:
            assert ended.stdout.count("True") == len(SHARDS)
            assert ended.stdout.split()[-1] == "3"  # two copies and the lock
        else:
            assert "no space in data.cache" in ended.stderr
            assert "the disk has" in ended.stderr
