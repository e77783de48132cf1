"""What `ganscale shards` prints of a data set: its properties, and the counts of its classes."""

from typing import TYPE_CHECKING

from ganscale.terminal import echo

if TYPE_CHECKING:
    from ganscale.data.manifest import Manifest


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

    counts = np.zeros(manifest.class_count, np.int64)
    for first in range(0, len(manifest.samples), 1 << 20):
        labels = manifest.samples["label"][first : first + (1 << 20)]
        counts += np.bincount(labels, minlength=manifest.class_count)
    for label, count in enumerate(counts[:most]):
        name = manifest.class_names[label] if manifest.class_names else ""
        echo(f"  class {label:>5}  {count:>12,}  {name}".rstrip())
    if most is not None and len(counts) > most:
        echo(f"  and {len(counts) - most:,} more: ganscale shards show {manifest.root}")
    if empty := int((counts == 0).sum()):
        echo(f"classes without a sample: {empty:,}")
