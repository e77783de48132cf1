"""What `ganscale shards` prints of a data set: its properties, and the counts of its classes."""

from collections import Counter
from typing import TYPE_CHECKING

from ganscale.terminal import echo

if TYPE_CHECKING:
    from ganscale.data.manifest import Manifest

_MOST_GAPS = 10_000


def print_summary(manifest: "Manifest", most_classes: int | None = None) -> None:
    """Prints a line for each property of the data set and for each class, or for the first
    `most_classes` of them."""
    resolution = "{} x {}".format(*manifest.resolution) if manifest.resolution else "varies"
    echo(f"folder       {manifest.root}")
    echo(f"location     {manifest.location}")
    echo(f"samples      {len(manifest.samples):,}")
    echo(f"shards       {len(manifest.shards):,}")
    echo(f"bytes        {sum(shard.bytes for shard in manifest.shards):,}")
    echo(f"images       {', '.join(manifest.extensions)}")
    echo(f"resolution   {resolution}")
    echo(f"classes      {manifest.class_count or 'none'}")
    echo(f"fingerprint  {manifest.fingerprint}")
    if manifest.class_count:
        _print_classes(manifest, most_classes)


def _print_classes(manifest: "Manifest", most: int | None) -> None:
    import numpy as np

    counts: Counter[int] = Counter()
    for first in range(0, len(manifest.samples), 1 << 20):
        labels = manifest.samples["label"][first : first + (1 << 20)]
        found, numbers_found = np.unique(labels, return_counts=True)
        counts.update(dict(zip(found.tolist(), numbers_found.tolist(), strict=True)))
    # Of numbers such as WordNet's or a time, only those that occur are printed.
    has_gaps = manifest.class_count > _MOST_GAPS + len(counts)
    numbers = sorted(counts) if has_gaps else range(manifest.class_count)
    for label in numbers[:most]:
        name = manifest.class_names[label] if manifest.class_names else ""
        echo(f"  class {label:>5}  {counts[label]:>12,}  {name}".rstrip())
    if most is not None and len(numbers) > most:
        echo(f"  and {len(numbers) - most:,} more: ganscale shards show {manifest.root}")
    if empty := manifest.class_count - len(counts):
        echo(f"classes without a sample: {empty:,} (numbers stay as they are in the labels)")
