"""How well the data order shuffles, compared with a full random shuffle and WebDataset's.

    python -m benchmarks.shuffle [--quick] [--json FILE] [--figure FILE]

The data set has the shape of ImageNet and is the worst case: its shards are sorted by class. Three
figures per shuffle, each relative to its expectation under a full random shuffle of every epoch:

classes: Pearson's chi-square of a batch's classes. At 2, a batch has the variety of a random one of
    half its size.
neighbours: how many others of a batch come from the same 256 consecutive samples of a shard.
again: how likely two samples of a batch are in the same batch again in the next epoch.

WebDataset is its own stages, `shuffle(100, seed)` of the shards and `shuffle(1000)` of the samples
in them, on sample numbers instead of files. Its splitters deal shards to ranks and workers, and a
rank takes a batch from one worker after the other, as PyTorch's loader does.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from webdataset.filters import shuffle as mix

from benchmarks.report import Row, report
from ganscale.data.order import Order

SAMPLES, CLASSES, SHARD_SAMPLES, BATCH = 1_281_167, 1000, 5000, 256
NEIGHBOURS = 256
SHARDS = np.diff([*range(0, SAMPLES, SHARD_SAMPLES), SAMPLES])

Shuffle = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""seed -> two epochs in a row, each (batches, BATCH) int64, the samples of every global batch"""


def full_shuffle(seed: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    return _batches(draws.permutation(SAMPLES)), _batches(draws.permutation(SAMPLES))


def ganscale(
    seed: int, lanes: int = 64, block_samples: int = 256, window_blocks: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    order = Order(
        SHARDS,
        seed=seed,
        fingerprint="",
        lanes=lanes,
        block_samples=block_samples,
        window_blocks=window_blocks,
    )
    by_lane = np.arange(order.epoch_length).reshape(-1, order.lanes).T.reshape(-1)

    def epoch(number: int) -> np.ndarray:
        samples = order.samples(number * order.epoch_length + by_lane)
        return _batches(samples.reshape(order.lanes, -1).T.reshape(-1))

    return epoch(0), epoch(1)


def webdataset_shuffle(
    seed: int, ranks: int, workers: int = 4, buffer: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """workers: per rank; buffer: samples that each worker mixes"""
    shares = [
        range(rank, len(SHARDS), ranks)[w::workers] for w in range(workers) for rank in range(ranks)
    ]
    draws = random.Random(seed)

    def local_batches(shards: range) -> Iterator[np.ndarray]:
        mixed_shards = mix(100, seed=seed)(iter(shards))
        samples = itertools.chain.from_iterable(map(_samples_of, mixed_shards))
        mixed = np.fromiter(mix(buffer, rng=draws)(samples), np.int64)
        share = BATCH // ranks
        yield from mixed[: len(mixed) // share * share].reshape(-1, share)

    def epoch() -> np.ndarray:
        streams = [list(local_batches(shards)) for shards in shares]
        steps = min(map(len, streams))  # the epoch ends with the shortest stream
        return np.stack(
            [
                np.concatenate([streams[worker * ranks + rank][step] for rank in range(ranks)])
                for step in range(steps)
                for worker in range(workers)
            ]
        )

    return epoch(), epoch()


def _samples_of(shard: int) -> range:
    return range(shard * SHARD_SAMPLES, min((shard + 1) * SHARD_SAMPLES, SAMPLES))


def _batches(samples: np.ndarray) -> np.ndarray:
    return samples[: len(samples) // BATCH * BATCH].reshape(-1, BATCH)


SHUFFLES: dict[str, Shuffle] = {
    "full random shuffle": full_shuffle,
    "ganscale, default (64 lanes, 8 blocks of 256)": ganscale,
    "ganscale, 256 lanes": partial(ganscale, lanes=256),
    "ganscale, windows of 32 blocks": partial(ganscale, window_blocks=32),
    "ganscale, 32 blocks of 64": partial(ganscale, block_samples=64, window_blocks=32),
    "ganscale, 2 blocks of 5,000 (whole shards)": partial(
        ganscale, block_samples=SHARD_SAMPLES, window_blocks=2
    ),
    "ganscale, 8 lanes, 2 blocks": partial(ganscale, lanes=8, window_blocks=2),
    "webdataset, 32 ranks": partial(webdataset_shuffle, ranks=32, workers=2),
    "webdataset, 8 ranks": partial(webdataset_shuffle, ranks=8),
    "webdataset, 8 ranks, shuffle(10,000)": partial(webdataset_shuffle, ranks=8, buffer=10_000),
    "webdataset, 1 rank": partial(webdataset_shuffle, ranks=1),
}


def figures(epochs: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """The three figures, relative to their expectation under a full random shuffle."""
    first, second = epochs
    batch_of = np.repeat(np.arange(len(first)), BATCH)
    samples = first.reshape(-1)

    counts = np.zeros((len(first), CLASSES), np.int64)
    np.add.at(counts, (batch_of, samples * CLASSES // SAMPLES), 1)
    shares = np.bincount(np.arange(SAMPLES) * CLASSES // SAMPLES) / SAMPLES
    chi_square = ((counts - BATCH * shares) ** 2 / (BATCH * shares)).sum(1).mean()
    without_replacement = (SAMPLES - BATCH) / (SAMPLES - 1)

    within = np.concatenate([np.arange(size) // NEIGHBOURS for size in SHARDS])
    group = np.repeat(np.arange(len(SHARDS)), SHARDS) * SHARD_SAMPLES + within
    others = _equal_pairs(batch_of * SAMPLES + group[samples]) * 2 / len(samples)
    chance = 2 * _equal_pairs(group) / (SAMPLES * (SAMPLES - 1))

    next_batch = np.full(SAMPLES, -1)
    next_batch[second.reshape(-1)] = np.repeat(np.arange(len(second)), BATCH)
    is_in_both = next_batch[samples] >= 0
    before, after = batch_of[is_in_both], next_batch[samples[is_in_both]]
    again = _equal_pairs(before * len(second) + after) / _equal_pairs(before)
    return {
        "classes": float(chi_square) / (CLASSES - 1) / without_replacement,
        "neighbours": others / ((BATCH - 1) * chance),
        "again": again / ((BATCH - 1) / (SAMPLES - 1)),
    }


def _equal_pairs(values: np.ndarray) -> int:
    """The number of pairs of equal values."""
    _, counts = np.unique(values, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


MEANINGS = {
    "classes": "chi-square of a batch's classes",
    "neighbours": "others of a batch from the same 256 in a row",
    "again": "pairs of a batch that are together again in the next epoch",
}


def draw_figure(rows: list[Row], file: Path) -> None:
    """A panel for each figure, a line for each shuffle, on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.name.rpartition("/")[0] for row in rows))
    sketch, axes = pyplot.subplots(
        1, len(MEANINGS), figsize=(13, 1 + 0.35 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (figure, meaning) in zip(axes, MEANINGS.items(), strict=True):
        of_figure = {row.name.rpartition("/")[0]: row for row in rows if row.name.endswith(figure)}
        for height, name in enumerate(names):
            ratio = of_figure[name].ratio
            colour = "#1f4e79" if "ganscale" in name else "#b5562b" if "web" in name else "#555555"
            shown = max(ratio, 0.6)  # far below 1 is not better than 1, and would fill the panel
            axis.hlines(height, 1, shown, color=colour, linewidth=1, alpha=0.5)
            axis.plot(shown, height, "o" if ratio == shown else "<", color=colour, markersize=5)
            axis.annotate(
                f"{ratio:.2g}" if ratio < 1 else f"{ratio:.3g}",
                (max(1, shown), height),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
            )
        axis.set_xscale("log")
        axis.set_xlim(0.5, 5 * max(row.ratio for row in of_figure.values()))
        axis.axvline(1, color="#999999", linewidth=0.8, zorder=0)
        axis.set_title(meaning, fontsize=9)
        axis.set_xlabel("ratio to a full random shuffle", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    sketch.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shuffle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the ratios (PNG)")
    options = parser.parse_args()
    rows: list[Row] = []
    for name, shuffle in SHUFFLES.items():
        results = [figures(shuffle(seed)) for seed in range(1 if options.quick else 3)]
        print(f"{name}: {results[0]}", file=sys.stderr)
        for figure, meaning in MEANINGS.items():
            ratios = [result[figure] for result in results]
            spread = (min(ratios), max(ratios)) if len(ratios) > 1 else (None, None)
            rows.append(
                Row(f"{name}/{figure}", "a full shuffle", fmean(ratios), *spread, "x", meaning)
            )
    report(rows, options.json)
    if options.figure:
        draw_figure(rows, options.figure)


if __name__ == "__main__":
    main()
