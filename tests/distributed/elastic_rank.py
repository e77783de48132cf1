"""A rank that only reads data: what the processes of test_elastic.py do until they are killed."""

import json
import os
import time
from pathlib import Path

from ganscale.data import loader as loading
from ganscale.data.loader import Loader
from ganscale.data.manifest import Manifest
from ganscale.schema import DataConfig
from tests.helpers.processes import HANG_SECONDS

GLOBAL_BATCH = 12
RESOLUTION = 4
SEED = 11


def config_of(data: Path, workers: int) -> DataConfig:
    return DataConfig(
        path=str(data),
        resolution=RESOLUTION,
        workers=workers,
        lanes=24,
        block_samples=4,
        window_blocks=2,
    )


def consume(
    data: Path,
    record: Path,
    rank: int,
    world_size: int,
    workers: int,
    start: int,
    *,
    stop: int,
    stalls: bool = False,
) -> None:
    """Appends one line per batch: its first slot, its samples, and the bad ones.

    A rank that stalls waits at `stop` until it is killed.
    """
    loading._CHUNK_PIXELS = RESOLUTION**2  # otherwise one thread decodes such small batches
    loader = Loader(
        Manifest.load(data),
        config_of(data, workers),
        seed=SEED,
        global_batch_size=GLOBAL_BATCH,
        rank=rank,
        world_size=world_size,
        position=start,
    )
    file = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(start, stop, GLOBAL_BATCH):
        batch = next(loader)
        samples = batch.images[:, 0, 0, 0].tolist()
        line = json.dumps([int(batch.slots[0]), samples, [bad.key for bad in batch.bad_samples]])
        os.write(file, f"{line}\n".encode())
    if stalls:
        time.sleep(HANG_SECONDS)
    loader.close()
