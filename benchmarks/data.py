"""Images per second on one core: our loader compared with the readers that people use.

    python -m benchmarks.data [--quick] [--json FILE]

The same images are in a temporary folder in the formats of all readers, several times each, as if
the data sets were larger. Batches of 64 are read in shuffled order from a warm page cache:

- `jpeg256`: JPEG of 256 pixels, read at that size; `jpeg256_to_64`: the same, reduced to 64 pixels
- `png32`: the bundled emoji as PNG of 32 pixels

`benchmarks/readers.py` describes the rivals; `decoder alone` is the limit for any reader. All
contestants are bound to the same core, with their processes and threads, and take turns. Compared
is the processor time per image of all their processes and threads, which other programs hardly
disturb: the ratio is the rival's over ours, the median of the rounds; low and high are its
quartiles. Read-ahead counts too: each turn begins and ends at rest.

Linux only. litdata and mosaicml-streaming (pip install -e '.[bench,rivals]', in a separate
environment) are "not measured" if they cannot be imported.
"""

import os
import statistics
import tempfile
from math import nan
from pathlib import Path

from benchmarks import data_sets
from benchmarks.one_core import Contestant, Cost
from benchmarks.readers import LIMIT, OURS, READERS, Case
from benchmarks.report import Row, arguments, report
from benchmarks.timing import speedup


def measure(
    contestants: dict[str, Contestant], case: Case, images: int, rounds: int
) -> dict[str, list[Cost]]:
    """The costs of each contestant in each round, without those that failed."""
    for contestant in contestants.values():
        if not contestant.failure:
            contestant.open(case)
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for turn in range(1 + rounds):
        for name, contestant in contestants.items():
            cost = contestant.read(images)
            if cost is not None and turn > 0:  # the first warms up
                costs[name].append(cost)
    return {name: rows for name, rows in costs.items() if len(rows) == rounds}


def rows_of(case: str, costs: dict[str, list[Cost]], failures: dict[str, str]) -> list[Row]:
    """One row per rival."""
    rows = []
    ours = costs[OURS]
    for name in READERS:
        if name == OURS:
            continue
        if name not in costs:
            rows.append(Row(case, name, nan, note=f"not measured: {failures[name]}"))
            continue
        rival = costs[name]
        ratio, low, high = speedup([cost.cpu for cost in rival], [cost.cpu for cost in ours])
        speeds = " and ".join(
            f"{reader} {1 / statistics.median(cost.cpu for cost in reader_costs):,.0f}"
            f" ({1 / statistics.median(cost.wall for cost in reader_costs):,.0f})"
            for reader, reader_costs in (("ours", ours), ("rival", rival))
        )
        unit = "of the limit" if name == LIMIT else "x faster"
        rows.append(Row(case, name, ratio, low, high, unit, f"images/s (wall clock): {speeds}"))
    return rows


def main() -> None:
    options = arguments(__doc__)
    images, repeats, rounds = (512, 8, 3) if options.quick else (2048, 4, 9)
    core = min(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["HF_HOME"] = os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        jpeg, png = root / "jpeg256", root / "png32"
        jpegs, pngs = repeats * data_sets.natural_jpegs(images), 4 * data_sets.emoji_pngs()
        failed_formats = data_sets.write(jpeg, jpegs, "jpg", data_sets.FORMATS)
        failed_formats |= data_sets.write(png, pngs, "png", data_sets.FORMATS)
        cases = [
            Case("jpeg256", jpeg, "jpg", 256, is_resized=False),
            Case("jpeg256_to_64", jpeg, "jpg", 64, is_resized=True),
            Case("png32", png, "png", 32, is_resized=False),
        ]
        failures = {
            name: failed_formats[kind]
            for name, (_, kind) in READERS.items()
            if kind in failed_formats
        }
        contestants = {name: Contestant(name, core) for name in READERS if name not in failures}
        try:
            for case in cases:
                # More small images: a turn of milliseconds would measure cold caches.
                factor = 4 if case is cases[2] else 1
                costs = measure(contestants, case, factor * images, rounds)
                failures |= {name: reader.failure for name, reader in contestants.items()}
                if OURS not in costs:
                    raise SystemExit(f"{OURS} failed: {failures[OURS]}")
                rows += rows_of(case.name, costs, failures)
        finally:
            for contestant in contestants.values():
                contestant.close()
    report(rows, options.json)


if __name__ == "__main__":
    main()
