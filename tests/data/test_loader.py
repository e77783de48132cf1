"""Batches are the same for every cluster and restart; broken samples are replaced, not hidden."""

import io
import itertools
import logging
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale.data.loader import Batch, Loader
from ganscale.data.manifest import Manifest
from ganscale.shards.building import build_manifest
from ganscale.data.order import Order
from ganscale.errors import UserError
from ganscale.schema import DataConfig

SHARDS = (11, 5, 14)  # samples each
TOTAL = sum(SHARDS)
RESOLUTION = 4


def pixels_of(sample: int) -> np.ndarray:
    """An image that tells which sample it is, in each of its channels in another way."""
    y, x = np.mgrid[:RESOLUTION, :RESOLUTION]
    channels = [sample + 0 * x, 16 * x + y, (sample * 7 + x) % 256]
    return np.stack(channels, axis=2).astype(np.uint8)


def write_shards(folder: Path, *, labelled: bool = True) -> Manifest:
    sample = 0
    for number, count in enumerate(SHARDS):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for _ in range(count):
                stream = io.BytesIO()
                Image.fromarray(pixels_of(sample)).save(stream, "PNG")
                files = {"png": stream.getvalue()}
                if labelled:
                    files["cls"] = str(sample % 3).encode()
                for extension, data in files.items():
                    member = tarfile.TarInfo(f"{sample:05d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                sample += 1
    return build_manifest(folder)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_shards(tmp_path)


class Loaders:
    """Makes loaders of one data set, and closes them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.made: list[Loader] = []

    def __call__(
        self, *, workers=0, rank=0, world_size=1, images_seen=0, batch=8, **settings
    ) -> Loader:
        config = DataConfig(
            path=str(self.manifest.root),
            resolution=RESOLUTION,
            workers=workers,
            **{"lanes": 4, "block_samples": 3, "window_blocks": 2, **settings},
        )
        loader = Loader(
            self.manifest,
            config,
            seed=3,
            global_batch_size=batch,
            rank=rank,
            world_size=world_size,
            images_seen=images_seen,
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
            *(
                torch.cat([getattr(b, name) for b in parts])
                for name in ("images", "labels", "slots")
            )
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
    slots = [batch.slots.tolist() for batch in loaders.batches(3, images_seen=100)]
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
def test_the_ranks_batches_laid_together_are_those_of_one_rank(loaders, world_size, workers):
    ranks = [
        loaders.batches(8, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    assert same(joined(ranks), loaders.batches(8))


def test_starting_in_the_middle_continues_the_stream(loaders):
    whole = loaders.batches(10)
    assert same(loaders.batches(7, images_seen=24), whole[3:])
    assert same(loaders.batches(7, images_seen=24, workers=2), whole[3:])
    halves = [loaders.batches(4, images_seen=48, rank=r, world_size=2) for r in range(2)]
    assert same(joined(halves), whole[6:])


def test_an_epoch_of_batches_shows_every_sample_but_less_than_one_a_lane(loaders):
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


def member_of(manifest: Manifest, sample: int) -> tuple[Path, int, int]:
    """(tar, offset, size) of a sample's image."""
    shard = manifest.shard_of(sample)
    row = manifest.samples[sample]
    return manifest.root / manifest.shards[shard].name, int(row["offset"]), int(row["size"])


def overwrite(manifest: Manifest, sample: int) -> None:
    """Damages a sample after it was indexed: the order stays the same."""
    path, offset, size = member_of(manifest, sample)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)


def epoch_lanes(loader: Loader, epochs: int) -> list[list[int]]:
    """The samples of each lane, one after the other."""
    positions = np.arange(epochs * loader.order.epoch_length)
    return loader.order.samples(positions).reshape(-1, loader.order.lanes).T.tolist()


def test_a_broken_sample_is_replaced_by_the_next_of_its_lane_for_every_cluster(loaders):
    clean = loaders.batches(8)
    broken = samples_in(clean[2])[5]
    overwrite(loaders.manifest, broken)
    one = loaders.batches(8)
    followers = {
        lane[place + 1]
        for lane in epoch_lanes(loaders.made[0], 4)
        for place, sample in enumerate(lane[:-1])
        if sample == broken
    }
    replaced = 0
    for before, after in zip(clean, one, strict=True):
        for sample, found, label in zip(
            samples_in(before), samples_in(after), after.labels.tolist(), strict=True
        ):
            assert found == sample or (sample == broken and found in followers)
            assert label == found % 3
            replaced += sample == broken
    assert replaced >= 2  # 64 images of 30 samples
    for world_size, workers in ((1, 3), (2, 0), (4, 2)):
        ranks = [
            loaders.batches(8, rank=rank, world_size=world_size, workers=workers)
            for rank in range(world_size)
        ]
        assert same(joined(ranks), one)
    assert same(loaders.batches(6, images_seen=16), one[2:])


def test_a_broken_sample_is_counted_and_named_in_the_log(loaders, caplog):
    overwrite(loaders.manifest, 12)
    loader = loaders(batch=TOTAL - 2, lanes=1, block_samples=100)
    with caplog.at_level(logging.WARNING):
        batch = next(loader)
    assert 12 not in samples_in(batch)
    assert sum(loader.broken.values()) == 1
    (((shard, reason), count),) = loader.broken.items()
    assert (shard, count) == ("shard-1.tar", 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"sample 00012 of shard shard-1.tar {reason}" in record.getMessage()


def test_a_shard_that_was_cut_costs_only_the_samples_behind_the_cut(loaders):
    path, offset, _ = member_of(loaders.manifest, 29)
    with path.open("r+b") as file:
        file.truncate(offset + 10)
    loader = loaders(batch=TOTAL)
    found = [s for batch in itertools.islice(loader, 3) for s in samples_in(batch)]
    assert 29 not in found
    assert {*found} == {*range(29)}
    assert {shard for shard, _ in loader.broken} == {"shard-2.tar"}
    assert all("is cut" in reason for _, reason in loader.broken)


def test_more_broken_samples_than_allowed_end_the_run_with_their_number_and_the_key(loaders):
    overwrite(loaders.manifest, 12)
    loader = loaders(batch=TOTAL, broken_limit=0.0)
    with pytest.raises(UserError, match=r"data\.broken_limit=0 allows; the last: sample 00012 of"):
        list(itertools.islice(loader, 2))


def test_a_share_of_broken_samples_is_borne_up_to_the_limit(loaders):
    """Of the first thousand: a limit of 1 % is ten samples."""
    for sample in range(3):
        overwrite(loaders.manifest, sample)
    loader = loaders(batch=TOTAL, broken_limit=0.01)
    with pytest.raises(UserError, match=r"^11 of \d+ samples could not be decoded"):
        list(itertools.islice(loader, 12))
    patient = loaders(batch=TOTAL, broken_limit=0.5)
    list(itertools.islice(patient, 12))
    assert sum(patient.broken.values()) > 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0.01, 0.99])
def test_a_data_set_without_a_good_sample_is_an_error_and_no_endless_search(
    loaders, workers, limit
):
    for sample in range(TOTAL):
        overwrite(loaders.manifest, sample)
    loader = loaders(workers=workers, broken_limit=limit)
    with pytest.raises(UserError, match="could not be decoded") as raised:
        next(loader)
    assert "sample 000" in str(raised.value)


def test_a_missing_shard_is_named(loaders):
    (loaders.manifest.root / "shard-1.tar").unlink()
    with pytest.raises(UserError, match=r"shard-1\.tar of the manifest is missing"):
        loaders.batches(6, workers=2)


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
