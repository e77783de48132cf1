"""What a data set of billions of samples costs a process at its start and while it reads.

    python -m benchmarks.manifest [--quick] [--json FILE] [--samples N]

There are two data sets, each measured in a fresh process: a synthetic manifest of N samples on
disk, read by `Manifest.load`, with the order of its samples; and only the order of ten billion
samples in 100,000 shards. There are no images, only sample numbers. The manifest is dropped from
the page cache before it is loaded, and deleted afterwards.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.report import Row, report
from ganscale.data.manifest import JSON_NAME, ROWS_NAME, SAMPLE_ROW, Manifest
from ganscale.data.order import Order, batch_positions
from ganscale.shards.indexing import build_manifest

SAMPLES, QUICK_SAMPLES, MANY_SAMPLES = 100_000_000, 5_000_000, 10_000_000_000
SHARD_SAMPLES, MANY_SHARD_SAMPLES = 20_000, 100_000
IMAGE_BYTES = 12_000
LANES, BLOCK_SAMPLES, WINDOW_BLOCKS, BATCH = 64, 256, 8, 256  # the schema's, and one GPU's batch


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.manifest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--samples", type=int, help="in the manifest", metavar="N")
    options = parser.parse_args()
    samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = write_manifest(folder, samples)
        size = sum((folder / name).stat().st_size for name in (JSON_NAME, ROWS_NAME))
        name = f"manifest of {samples:,} samples in {shards:,} shards"
        rows = [Row(f"{name}/size on disk", "", size / 1e6, unit="MB")]
        rows += in_fresh_process("manifest_costs", name, temporary)
    name = f"order of {MANY_SAMPLES:,} samples in {MANY_SAMPLES // MANY_SHARD_SAMPLES:,} shards"
    rows += in_fresh_process("order_costs", name, "")
    report(rows, options.json)


def write_manifest(folder: Path, samples: int) -> int:
    """Writes a manifest without shards to a folder; returns the number of shards that it lists.

    A data set of one image provides the other contents of its JSON file.
    """
    image, encoded = Image.new("RGB", (64, 64)), io.BytesIO()
    image.save(encoded, "png")
    with tarfile.open(folder / "one.tar", "w") as tar:
        member = tarfile.TarInfo("one.png")
        member.size = len(encoded.getvalue())
        tar.addfile(member, io.BytesIO(encoded.getvalue()))
    build_manifest(folder)
    content = json.loads((folder / JSON_NAME).read_text())
    one = content["shards"][0]
    sizes = shard_sizes(samples, SHARD_SAMPLES)
    content["shards"] = [
        one | {"name": f"{i:06}.tar", "bytes": int(size) * IMAGE_BYTES, "samples": int(size)}
        for i, size in enumerate(sizes)
    ]
    (folder / JSON_NAME).write_text(json.dumps(content, indent=1))
    with (folder / ROWS_NAME).open("wb") as file:
        header = {"descr": SAMPLE_ROW.descr, "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for size in sizes:
            rows = np.empty(size, SAMPLE_ROW)
            rows["offset"] = np.arange(size) * IMAGE_BYTES
            rows["size"] = IMAGE_BYTES
            rows["label"] = -1
            file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return len(sizes)


def shard_sizes(samples: int, mean: int) -> np.ndarray:
    """(samples / mean,) int64, within a tenth of the mean; their sum is `samples`."""
    count = max(2, samples // mean)
    swing = np.random.default_rng(0).integers(-mean // 10, mean // 10, count)
    cuts = np.linspace(0, samples, count + 1).astype(np.int64)[1:-1] + swing[1:] // 2
    return np.diff(cuts, prepend=0, append=samples)


def in_fresh_process(function: str, name: str, argument: str) -> list[Row]:
    """The rows of one of the two functions below."""
    program = f"import sys, benchmarks.manifest as m; m.{function}(sys.argv[1])"
    output = subprocess.run(
        [sys.executable, "-c", program, argument],
        cwd=Path(__file__).parent.parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return [
        Row(f"{name}/{figure}", "", value, unit=unit) for figure, value, unit in json.loads(output)
    ]


Cost = tuple[str, float, str]
"""(figure, value, unit)"""


def manifest_costs(folder: str) -> None:
    before = _resident()
    start = time.perf_counter()
    manifest = Manifest.load(folder)
    loaded = time.perf_counter() - start
    sizes = np.diff(manifest.first_sample)
    load: list[Cost] = [("Manifest.load", loaded * 1e3, "ms")]
    costs = _order_costs(sizes, before, manifest.samples)
    print(json.dumps(load + costs))


def order_costs(_: str) -> None:
    sizes = shard_sizes(MANY_SAMPLES, MANY_SHARD_SAMPLES)
    print(json.dumps(_order_costs(sizes, _resident())))


def _order_costs(
    sizes: np.ndarray, resident_before: int, rows: np.ndarray | None = None
) -> list[Cost]:
    start = time.perf_counter()
    order = Order(
        sizes,
        seed=0,
        fingerprint="",
        lanes=LANES,
        block_samples=BLOCK_SAMPLES,
        window_blocks=WINDOW_BLOCKS,
    )
    start_seconds = time.perf_counter() - start
    resident_after_start = _resident()

    deep = 5 * order.epoch_length + order.epoch_length * 7 // 10
    start = time.process_time()
    positions, _ = batch_positions(deep, BATCH, order.lanes, 0, 1)
    samples = order.samples(positions)
    first_batch = time.process_time() - start
    start = time.perf_counter()
    if rows is not None:
        rows[samples]  # reads from disk
    first_rows = time.perf_counter() - start

    repeats = 200
    start = time.process_time()
    for _ in range(repeats):
        order.samples(positions)
    warm = (time.process_time() - start) / repeats / BATCH

    draws = np.random.default_rng(0)
    window_positions = draws.integers(0, 100 * order.epoch_length, repeats).tolist()
    start = time.process_time()
    computed = sum(len(order.window(position)) for position in window_positions)
    cold = (time.process_time() - start) / computed

    batches = 4 * order.window_length * order.lanes // BATCH
    start = time.process_time()
    for seen in range(deep, deep + batches * BATCH, BATCH):
        order.samples(batch_positions(seen, BATCH, order.lanes, 0, 1)[0])
    sequential = (time.process_time() - start) / batches / BATCH
    row_costs: list[Cost] = [("its rows of the manifest", first_rows * 1e3, "ms")]
    return [
        ("Order, start", start_seconds * 1e3, "ms"),
        ("resident memory added so far", (resident_after_start - resident_before) / 1e6, "MB"),
        ("first batch, at 70 % of epoch 5", first_batch * 1e3, "ms of processor"),
        *(row_costs if rows is not None else []),
        ("first use of a window of 2,048", cold * 1e6, "us of processor per sample"),
        ("a batch of 256 in known windows", warm * 1e6, "us of processor per sample"),
        ("through four windows of each lane", sequential * 1e6, "us of processor per sample"),
        ("resident memory added in all", (_resident() - resident_before) / 1e6, "MB"),
    ]


def _resident() -> int:
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
