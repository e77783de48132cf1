"""Batches are the same for every cluster and restart; bad samples are replaced, not hidden."""

import contextlib
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ganscale.data.bad_samples import (
    BadSample,
    BadSampleLog,
    bad_sample_rows,
    check_bad_sample_limit,
)
from ganscale.data.batch import Batch
from ganscale.data.dataset import open_data
from ganscale.data.loader import Loader
from ganscale.data.manifest import Manifest
from ganscale.data.order import Order, WindowTracker, batch_positions, shards_ahead
from ganscale.errors import UserError
from ganscale.schema import DataConfig
from ganscale.shards.indexing import build_manifest
from tests.data.counting_loaders import CountingLoader
from tests.helpers.fault_server import FaultServer
from tests.helpers.images import encoded
from tests.helpers.processes import wait_until
from tests.helpers.tars import overwrite, write_tar

SHARDS = (11, 5, 14)  # samples each
TOTAL = sum(SHARDS)
RESOLUTION = 4


def pixels_of(sample: int) -> np.ndarray:
    """An image that tells which sample it is, in each of its channels in another way."""
    y, x = np.mgrid[:RESOLUTION, :RESOLUTION]
    channels = [sample + 0 * x, 16 * x + y, (sample * 7 + x) % 256]
    return np.stack(channels, axis=2).astype(np.uint8)


def write_shards(folder: Path, *, labelled: bool = True) -> Manifest:
    samples = itertools.count()
    for number, count in enumerate(SHARDS):
        members = []
        for sample in itertools.islice(samples, count):
            members.append((f"{sample:05d}.png", encoded(pixels_of(sample))))
            if labelled:
                members.append((f"{sample:05d}.cls", str(sample % 3).encode()))
        write_tar(folder / f"shard-{number}.tar", members)
    return build_manifest(folder)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_shards(tmp_path)


@pytest.fixture(autouse=True)
def chunks_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else batches as small as these are not dealt out to several threads."""
    monkeypatch.setattr("ganscale.data.loader._CHUNK_PIXELS", RESOLUTION**2)


class Loaders:
    """Makes loaders of one data set, and closes them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.made: list[CountingLoader] = []

    def __call__(
        self, *, workers=0, rank=0, world_size=1, position=0, batch=8, **settings
    ) -> CountingLoader:
        config = DataConfig(
            path=str(self.manifest.root),
            resolution=RESOLUTION,
            workers=workers,
            **{"lanes": 4, "block_samples": 3, "window_blocks": 2, **settings},
        )
        loader = CountingLoader(
            self.manifest,
            config,
            seed=3,
            global_batch_size=batch,
            rank=rank,
            world_size=world_size,
            position=position,
        )
        self.made.append(loader)
        return loader

    def batches(self, count: int, **settings) -> list[Batch]:
        return list(itertools.islice(self(**settings), count))


@pytest.fixture
def loaders(manifest: Manifest):
    made = Loaders(manifest)
    yield made
    for loader in made.made:
        loader.close()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("images", "labels", "slots")
    )


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """The global batches of which each rank had a share."""
    return [
        Batch(
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.slots for part in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]


def samples_in(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def expected_samples(loader: Loader, batch: Batch) -> list[int]:
    """What the order says, for one rank, in the order of the lanes."""
    lanes, first = loader.order.lanes, int(batch.slots[0])
    positions = sorted(range(first, first + len(batch.slots)), key=lambda p: (p % lanes, p))
    return loader.order.samples(np.array(positions)).tolist()


def test_a_batch_holds_the_pixels_and_labels_of_the_samples_that_the_order_names(loaders):
    loader = loaders()
    for batch in itertools.islice(loader, 6):
        assert batch.images.dtype == torch.uint8
        samples = expected_samples(loader, batch)
        assert np.array_equal(batch.images.numpy(), np.stack([pixels_of(s) for s in samples]))
        assert batch.labels.tolist() == [sample % 3 for sample in samples]


def test_slots_count_the_images_since_the_start_of_the_run(loaders):
    slots = [batch.slots.tolist() for batch in loaders.batches(3, position=100)]
    assert slots == [list(range(first, first + 8)) for first in (100, 108, 116)]


def test_samples_without_labels_have_label_minus_one(tmp_path):
    manifest = write_shards(tmp_path, labelled=False)
    (batch,) = Loaders(manifest).batches(1)
    assert batch.labels.tolist() == [-1] * 8


def test_the_number_of_workers_changes_nothing(loaders):
    alone = loaders.batches(12, workers=0)
    for workers in (1, 2, 3):
        assert same(loaders.batches(12, workers=workers), alone)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_of_all_ranks_together_are_those_of_one_rank(loaders, world_size, workers):
    ranks = [
        loaders.batches(8, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    assert same(joined(ranks), loaders.batches(8))


def test_starting_in_the_middle_continues_the_stream(loaders):
    whole = loaders.batches(10)
    assert same(loaders.batches(7, position=24), whole[3:])
    assert same(loaders.batches(7, position=24, workers=2), whole[3:])
    halves = [loaders.batches(4, position=48, rank=r, world_size=2) for r in range(2)]
    assert same(joined(halves), whole[6:])


def test_an_epoch_has_every_sample_but_fewer_than_one_per_lane(loaders):
    loader = loaders(batch=7)  # 28 of 30 samples are an epoch of 4 lanes
    assert loader.order.epoch_length == 28
    seen = [s for batch in itertools.islice(loader, 4) for s in samples_in(batch)]
    assert len(set(seen)) == len(seen) == 28


def test_a_seed_and_a_fingerprint_make_the_order_and_nothing_else(loaders):
    """As the documentation says it: an `Order` made of them alone names the same samples."""
    manifest = loaders.manifest
    order = Order(
        SHARDS,
        seed=3,
        fingerprint=manifest.fingerprint,
        lanes=4,
        block_samples=3,
        window_blocks=2,
    )
    (batch,) = loaders.batches(1, batch=4)
    assert samples_in(batch) == order.samples(np.arange(4)).tolist()


def shard_of(manifest: Manifest, sample: int) -> int:
    return int(manifest.shards_of(np.array([sample]))[0])


def member_of(manifest: Manifest, sample: int) -> tuple[Path, int, int]:
    """(tar, offset, size) of a sample's image."""
    shard = shard_of(manifest, sample)
    row = manifest.samples[sample]
    return manifest.root / manifest.shards[shard].name, int(row["offset"]), int(row["size"])


def damage(manifest: Manifest, sample: int) -> None:
    """Damages a sample after it was indexed: the order stays the same."""
    path, offset, size = member_of(manifest, sample)
    overwrite(path, offset, b"?" * size)


def epoch_lanes(loader: Loader, epochs: int) -> list[list[int]]:
    """The samples of each lane, one after the other."""
    positions = np.arange(epochs * loader.order.epoch_length)
    return loader.order.samples(positions).reshape(-1, loader.order.lanes).T.tolist()


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane_for_every_cluster(loaders):
    clean = loaders.batches(8)
    bad = samples_in(clean[2])[5]
    damage(loaders.manifest, bad)
    one = loaders.batches(8)
    followers = {
        lane[place + 1]
        for lane in epoch_lanes(loaders.made[0], 4)
        for place, sample in enumerate(lane[:-1])
        if sample == bad
    }
    replaced = 0
    for before, after in zip(clean, one, strict=True):
        for sample, found, label in zip(
            samples_in(before), samples_in(after), after.labels.tolist(), strict=True
        ):
            assert found == sample or (sample == bad and found in followers)
            assert label == found % 3
            replaced += sample == bad
    assert replaced >= 2  # 64 images of 30 samples
    for world_size, workers in ((1, 3), (2, 0), (4, 2)):
        ranks = [
            loaders.batches(8, rank=rank, world_size=world_size, workers=workers)
            for rank in range(world_size)
        ]
        assert same(joined(ranks), one)
    assert same(loaders.batches(6, position=16), one[2:])


def test_a_bad_sample_is_counted_and_named_in_the_log(loaders, caplog):
    damage(loaders.manifest, 12)
    loader = loaders(batch=TOTAL - 2, lanes=1, block_samples=100)
    with caplog.at_level(logging.WARNING):
        batch = next(loader)
    assert 12 not in samples_in(batch)
    assert loader.bad_samples == {("shard-1.tar", "no image"): 1}
    (bad,) = batch.bad_samples
    assert (bad.shard, bad.reason, bad.key) == ("shard-1.tar", "no image", "00012")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"sample 00012 of shard shard-1.tar {bad.detail}" in record.getMessage()


def damage_some(manifest: Manifest) -> set[int]:
    """Two neighbours, one elsewhere, and the end of a shard; returns which samples these are."""
    for sample in (3, 4, 12):
        damage(manifest, sample)
    path, offset, _ = member_of(manifest, 27)
    os.truncate(path, offset + 10)
    return {3, 4, 12, 27, 28, 29}


def counts_by_hand(loader: Loader, damaged: set[int], images: range) -> Counter:
    """How often the order comes by each bad sample."""
    positions = np.array(images)
    return Counter(
        (f"shard-{shard_of(loader._manifest, sample)}.tar", "cut" if sample >= 27 else "no image")
        for sample in loader.order.samples(positions).tolist()
        if sample in damaged
    )


def test_bad_samples_are_counted_once_per_position_on_every_cluster(loaders):
    """The oracle is the order alone; that replacements are bad too is not counted again."""
    damaged = damage_some(loaders.manifest)
    for world_size, workers in ((1, 0), (1, 3), (2, 2), (4, 1)):
        ranks = [loaders(rank=r, world_size=world_size, workers=workers) for r in range(world_size)]
        for images_seen in range(8, 100, 8):
            for loader in ranks:
                next(loader)
            found = sum((Counter(loader.bad_samples) for loader in ranks), Counter())
            assert found == counts_by_hand(ranks[0], damaged, range(images_seen))


def test_counts_of_two_sessions_add_up_to_those_of_one(loaders):
    damage_some(loaders.manifest)
    whole, first, second = (
        loaders(workers=2),
        loaders(workers=3),
        loaders(position=40, workers=1),
    )
    for loader, batches in ((whole, 12), (first, 5), (second, 7)):
        list(itertools.islice(loader, batches))
    assert Counter(first.bad_samples) + Counter(second.bad_samples) == whole.bad_samples


def test_the_batch_carries_its_bad_samples_in_the_order_of_its_rows(loaders):
    damaged = damage_some(loaders.manifest)
    for workers in (0, 2):
        loader = loaders(workers=workers, batch=TOTAL)
        batch = next(loader)
        wanted = [s for s in expected_samples(loader, batch) if s in damaged]
        assert [int(bad.key) for bad in batch.bad_samples] == wanted


def test_a_flood_of_bad_samples_is_a_few_lines_in_the_log(caplog):
    log = BadSampleLog()
    with caplog.at_level(logging.WARNING):
        for number in range(100_000):
            log.warn(
                [BadSample(f"{number % 1000}.tar", "cut", f"{number}", "is cut: 1 of 2 bytes")]
            )
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == (
        "sample 0 of shard 0.tar is cut: 1 of 2 bytes; another sample replaces it"
    )
    assert len(messages) < 130
    assert "65,536 bad samples so far on this rank" in messages[-1]


def test_one_bad_shard_is_named_once_after_the_first_few_samples(caplog):
    log = BadSampleLog()
    with caplog.at_level(logging.WARNING):
        log.warn(BadSample("a.tar", "cut", str(number), "is cut") for number in range(15))
        log.warn(
            [BadSample("b.tar", "cut", "first", "is cut"), BadSample("b.tar", "cut", "x", "is cut")]
        )
    messages = [record.getMessage() for record in caplog.records]
    assert sum("shard a.tar" in message for message in messages) == 10
    assert [message for message in messages if "b.tar" in message] == [
        "sample first of shard b.tar is cut; another sample replaces it"
    ]


def test_a_shard_that_was_cut_costs_only_the_samples_behind_the_cut(loaders):
    path, offset, _ = member_of(loaders.manifest, 29)
    os.truncate(path, offset + 10)
    loader = loaders(batch=TOTAL)
    found = [s for batch in itertools.islice(loader, 3) for s in samples_in(batch)]
    assert 29 not in found
    assert {*found} == {*range(29)}
    assert set(loader.bad_samples) == {("shard-2.tar", "cut")}


@pytest.mark.parametrize(
    ("bad_samples", "read", "limit", "is_too_much"),
    [
        (0, 0, 0.0, False),
        (1, 10**9, 0.0, True),
        (10, 64, 0.01, False),  # ten of the first thousand
        (11, 64, 0.01, True),
        (20, 2000, 0.01, False),
        (21, 2000, 0.01, True),
    ],
)
def test_the_limit_is_a_share_of_what_was_read_but_at_least_of_a_thousand(
    bad_samples, read, limit, is_too_much
):
    counts = Counter({("b.tar", "cut"): bad_samples - 1, ("a.tar", "no image"): 1})
    if not is_too_much:
        return check_bad_sample_limit(counts, read, limit)
    with pytest.raises(UserError) as raised:
        check_bad_sample_limit(counts, read, limit)
    assert f"{bad_samples:,} of {read:,} samples could not be used" in str(raised.value)
    assert f"data.max_bad_fraction={limit:g} allows" in str(raised.value)
    assert bad_samples == 1 or f"b.tar: {bad_samples - 1} cut; a.tar: 1 no image" in str(
        raised.value
    )


def test_a_summary_lists_the_worst_and_sums_the_rest():
    counts = Counter({(f"{n}.tar", "cut"): n for n in range(1, 6)})
    assert bad_sample_rows(counts, most=3) == [
        {"shard": "5.tar", "reason": "cut", "count": 5},
        {"shard": "4.tar", "reason": "cut", "count": 4},
        {"shard": "3.tar", "reason": "cut", "count": 3},
        {"shard": "(2 more)", "reason": "any", "count": 3},
    ]
    assert len(bad_sample_rows(counts)) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_without_a_good_sample_is_an_error_and_no_endless_search(loaders, workers):
    for sample in range(TOTAL):
        damage(loaders.manifest, sample)
    loader = loaders(workers=workers)
    with pytest.raises(UserError, match="64 samples in a row could not be used") as raised:
        next(loader)
    assert "sample 000" in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_in_place_of_its_batch_and_no_batch_is_skipped(loaders, workers):
    settings = {"batch": 1, "lanes": 1}
    expected = loaders.batches(TOTAL, **settings)
    shards = [shard_of(loaders.manifest, samples_in(batch)[0]) for batch in expected]
    first_use, missing = max((shards.index(shard), shard) for shard in range(3))
    assert first_use >= 2
    (loaders.manifest.root / f"shard-{missing}.tar").unlink()
    loader = loaders(workers=workers, **settings)
    assert same(list(itertools.islice(loader, first_use)), expected[:first_use])
    for _ in range(3):
        with pytest.raises(UserError, match=rf"shard-{missing}\.tar .*is missing"):
            next(loader)


def test_a_missing_shard_is_named(loaders):
    (loaders.manifest.root / "shard-1.tar").unlink()
    with pytest.raises(UserError, match=r"shard-1\.tar .*is missing"):
        loaders.batches(6, workers=2)


def test_close_does_not_wait_for_a_read_that_hangs(loaders, monkeypatch):
    """A pipe that nobody writes to stands for a dead file server: opening it hangs."""
    monkeypatch.setattr("ganscale.data.loader._CLOSE_SECONDS", 0.5)
    shard = loaders.manifest.root / "shard-1.tar"
    content = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)
    before = set(threading.enumerate())
    loader = loaders(workers=2, batch=TOTAL)
    loaders.made.remove(loader)

    def wait_for_a_batch() -> None:
        with contextlib.suppress(Exception):  # it is closed meanwhile
            next(loader)

    waiting = threading.Thread(target=wait_for_a_batch, daemon=True)
    waiting.start()
    submitted = loader._depth * loader._chunks
    wait_until(lambda: len(loader._started) >= loader._depth)
    wait_until(lambda: loader._threads._tasks.qsize() <= submitted - 2)
    time.sleep(0.1)  # what a thread has taken, it has begun
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 300  # the reads never end
    hanging = [t for t in set(threading.enumerate()) - before if t.name.startswith("decode")]
    assert hanging  # and these hold nothing up: they are daemons
    assert all(thread.daemon for thread in hanging)
    with shard.open("wb") as pipe, contextlib.suppress(BrokenPipeError):
        pipe.write(content)
    for thread in [*hanging, waiting]:
        thread.join(20)
        assert not thread.is_alive()


def test_close_ends_the_threads_and_drops_what_was_decoded_ahead(loaders):
    before = set(threading.enumerate())
    loader = loaders(workers=3)
    next(loader)
    started = set(threading.enumerate()) - before
    assert 1 <= len(started) <= 3
    loader.close()
    assert not any(thread.is_alive() for thread in started)
    loader.close()  # twice is as good as once


def test_two_loaders_of_one_process_do_not_disturb_each_other(loaders):
    expected = loaders.batches(6)
    first, second = loaders(workers=2), loaders(workers=2)
    pairs = [(next(first), next(second)) for _ in range(6)]
    assert same([a for a, _ in pairs], expected)
    assert same([b for _, b in pairs], expected)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 4)])
def test_a_shard_is_announced_once_a_window_and_before_it_is_needed(loaders, rank, world_size):
    """The oracle walks the order position by position."""
    manifest = loaders.manifest
    order = loaders(lanes=4, block_samples=2, window_blocks=2).order
    watch, announced, last_announced = WindowTracker(order), set(), 0
    positions = np.arange(0)
    for step in range(60):
        positions, _ = batch_positions(8 * step, 8, order.lanes, rank, world_size)
        entered = watch.entered(positions)
        if len(entered):
            ahead = shards_ahead(manifest, order, entered).tolist()
            assert len(set(ahead)) == len(ahead)
            announced |= {(step, shard) for shard in ahead}
            last_announced = step
            assert ahead == needed_by_hand(manifest, order, entered.tolist())
        recent = {shard for at, shard in announced if at >= step - 4}
        assert set(manifest.shards_of(order.samples(positions)).tolist()) <= recent
    assert last_announced > 50
    assert len({at for at, _ in announced}) < 45  # not at every batch: a window has 4 samples
    assert not len(watch.entered(positions))


def needed_by_hand(manifest: Manifest, order: Order, positions: list[int]) -> list[int]:
    """The shards of the lanes' windows in turn: this one's rest, and the whole next one."""
    queues = []
    for position in positions:
        index = position % order.epoch_length // order.lanes
        window = index // order.window_length
        samples = []
        for _ in range(2):
            while index // order.window_length == window and index < order.lane_length:
                samples.append(int(order.samples(np.array([position]))[0]))
                position, index = position + order.lanes, index + 1
            index = index % order.lane_length
            window = index // order.window_length
        queues.append(samples)
    found: list[int] = []
    for row in itertools.zip_longest(*queues):
        for sample in row:
            if sample is not None and shard_of(manifest, sample) not in found:
                found.append(shard_of(manifest, sample))
    return found


@pytest.fixture
def address(manifest: Manifest) -> Iterator[str]:
    """The data set on a web server."""

    with FaultServer().running() as server:
        server.serve(manifest.root)
        yield server.url


def remote_loader(address: str, cache: Path, *, batch: int = 8, workers: int = 0) -> Loader:
    config = DataConfig(
        path=address,
        cache=str(cache),
        resolution=RESOLUTION,
        workers=workers,
        lanes=1,
        block_samples=3,
        window_blocks=2,
    )
    loader = open_data(config).make_loader(
        seed=3, global_batch_size=batch, rank=0, world_size=1, position=0
    )
    assert isinstance(loader, Loader)
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_from_a_web_server_give_the_same_batches(loaders, address, tmp_path, workers):
    expected = loaders.batches(10, lanes=1)
    with contextlib.closing(remote_loader(address, tmp_path / "cache", workers=workers)) as loader:
        assert same(list(itertools.islice(loader, 10)), expected)


def test_the_shards_of_the_next_window_are_fetched_before_they_are_read(loaders, address, tmp_path):
    """One image was read, of one shard."""
    order = loaders(lanes=1).order
    announced = shards_ahead(loaders.manifest, order, np.array([0])).tolist()
    assert len(announced) == 3
    with contextlib.closing(remote_loader(address, tmp_path / "cache", batch=1)) as loader:
        next(loader)
        wait_until(lambda: len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 3)
