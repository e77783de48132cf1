"""Ranks are killed twenty times and start again with another world size and number of workers: what
they committed is, sample by sample, what one uninterrupted process would have read."""

import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import pytest

from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, batch_positions
from ganscale.shards.indexing import build_manifest
from tests.distributed.elastic_rank import GLOBAL_BATCH, RESOLUTION, SEED, config_of, consume
from tests.helpers.images import numbered
from tests.helpers.preloaded import stop_server
from tests.helpers.processes import HANG_SECONDS, REPOSITORY
from tests.helpers.tars import overwrite, write_tar

KILLS = 20
IMAGES = 250 * GLOBAL_BATCH  # fourteen epochs of 216 samples
COMMIT_EVERY = 5 * GLOBAL_BATCH  # samples read after the last commit are read again
SHARDS = (60, 11, 90, 55)
DAMAGED = {5, 6, 7, 70, 150, *range(211, 216)}  # the last five by cutting their shard


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServerContext]:
    """Processes that are forked from one that has imported torch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    stop_server()  # the one that runs has other imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.elastic_rank"])
    yield context
    stop_server()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images that show their number; some are damaged after they were indexed."""
    folder, numbers = tmp_path / "data", itertools.count()
    for shard, count in enumerate(SHARDS):
        members = [
            (f"{n:03d}.png", numbered(n, RESOLUTION)) for n in itertools.islice(numbers, count)
        ]
        write_tar(folder / f"shard-{shard}.tar", members)
    manifest = build_manifest(folder)
    for number in sorted(DAMAGED):
        path = folder / manifest.shards[int(manifest.shards_of(np.array([number]))[0])].name
        offset = int(manifest.samples[number]["offset"])
        if number == 211:
            os.truncate(path, offset + 20)
        elif number < 211:
            overwrite(path, offset, b"damage")
    return folder


def uninterrupted(data: Path) -> tuple[list[int], list[str]]:
    """(samples, keys of the order's bad ones) slot by slot, from the order alone."""
    manifest, config = Manifest.load(data), config_of(data, 0)
    order = Order(
        np.diff(manifest.first_sample),
        seed=SEED,
        fingerprint=manifest.fingerprint,
        lanes=config.lanes,
        block_samples=config.block_samples,
        window_blocks=config.window_blocks,
    )
    samples, bad_samples = [], []
    for images_seen in range(0, IMAGES, GLOBAL_BATCH):
        positions, _ = batch_positions(images_seen, GLOBAL_BATCH, order.lanes, 0, 1)
        for position in positions.tolist():
            (sample,) = order.samples(np.array([position])).tolist()
            if sample in DAMAGED:
                # After the cut, names cannot be read.
                offset = int(manifest.samples[sample]["offset"])
                bad_samples.append(f"{sample:03d}" if sample <= 211 else f"byte {offset}")
            while sample in DAMAGED:
                position += order.lanes
                (sample,) = order.samples(np.array([position])).tolist()
            samples.append(sample)
    return samples, bad_samples


def read_record(record: Path) -> list[tuple[int, list[int], list[str]]]:
    """(first slot, samples, keys of bad ones) of each complete line: a kill may cut the last."""
    if not record.exists():
        return []
    lines = record.read_text().splitlines(keepends=True)
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
        process.join(20)
        process.close()


def test_killed_ranks_commit_what_one_process_would_have_read(
    ranks: ForkServerContext, data: Path, tmp_path: Path
) -> None:
    chance = random.Random(7)
    expected_samples, expected_bad = uninterrupted(data)
    deadline = time.monotonic() + HANG_SECONDS
    samples: list[int] = []
    bad_samples: list[str] = []
    world_sizes = (1, 2, 4, 3)
    committed_kills = 0
    for session in range(KILLS + 1):
        world_size, start = world_sizes[session % len(world_sizes)], len(samples)
        records = [tmp_path / f"session{session}-rank{rank}" for rank in range(world_size)]
        # A session reads a limited number, so that some samples remain for the last one.
        is_last = session == KILLS
        stop = IMAGES if is_last else min(IMAGES, start + 3 * COMMIT_EVERY)
        watched, batches = (
            [chance.choice(records)],
            chance.randrange((stop - start) // GLOBAL_BATCH + 1),
        )
        stalled, stall = None, stop
        if session < len(world_sizes):  # one rank waits for the kill between two commits
            watched, batches = records, COMMIT_EVERY // GLOBAL_BATCH
            stalled = chance.randrange(world_size)
            stall = start + chance.randrange(COMMIT_EVERY, 3 * COMMIT_EVERY, GLOBAL_BATCH)
        processes = [
            ranks.Process(
                target=consume,
                args=(data, record, rank, world_size, chance.randrange(4), start),
                kwargs={"stop": stall, "stalls": True} if rank == stalled else {"stop": stop},
            )
            for rank, record in enumerate(records)
        ]
        for process in processes:
            process.start()
        try:
            if is_last:
                for process in processes:
                    process.join(deadline - time.monotonic())
                    assert process.exitcode == 0
            else:
                while any(len(read_record(record)) < batches for record in watched):
                    assert time.monotonic() < deadline
                    assert all(process.exitcode in (None, 0) for process in processes)
                    time.sleep(0.005)
                chance.shuffle(processes)
        finally:
            end(processes)

        lines_of_ranks = [read_record(record) for record in records]
        whole = min(len(lines) for lines in lines_of_ranks) * GLOBAL_BATCH
        kept = whole if is_last else whole // COMMIT_EVERY * COMMIT_EVERY
        committed_kills += 0 < kept < stop - start
        for batch in range(kept // GLOBAL_BATCH):
            for rank, lines in enumerate(lines_of_ranks):
                slot, rank_samples, rank_bad = lines[batch]
                assert slot == start + batch * GLOBAL_BATCH + rank * GLOBAL_BATCH // world_size
                samples += rank_samples
                bad_samples += rank_bad
    assert samples == expected_samples
    assert bad_samples == expected_bad
    assert len({*bad_samples}) == len(DAMAGED)
    assert committed_kills >= len(world_sizes)
