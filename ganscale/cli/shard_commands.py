"""What the subcommands of `ganscale shards` do, and print.

Each is a function of the parsed arguments that returns the exit code and raises UserError.
"""

import argparse
from pathlib import Path


def write(args: argparse.Namespace) -> int:
    from ganscale.shards.writing import DEFAULT_SHARD_BYTES, describe_bad_images, write_shards

    report = write_shards(
        args.source,
        args.output,
        resolution=args.resolution,
        channels=args.channels,
        image_format=args.format,
        quality=args.quality,
        classes=args.classes,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_bytes or DEFAULT_SHARD_BYTES,
        seed=args.seed,
        workers=args.workers,
        max_bad=args.max_bad,
    )
    if report.ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.ignored.items())
        print(f"not images, left out: {kinds}")
    if report.bad_samples:
        print(
            f"bad, left out: {len(report.bad_samples)}: {describe_bad_images(report.bad_samples)}"
        )
    if report.kept_shards:
        print(f"kept from an earlier run: {report.kept_shards} shards")
    _print_summary(report.manifest)
    return 0


def index(args: argparse.Namespace) -> int:
    from ganscale.shards.exclusions import read_list
    from ganscale.shards.indexing import index_shards

    report = index_shards(
        args.sources,
        args.output,
        names=args.names,
        workers=args.workers,
        again=args.again,
        left_out=read_list(args.leave_out) if args.leave_out else None,
        trusts_idx=args.trust_idx,
        part=args.part,
    )
    if report.kept:
        print(f"unchanged, not read again: {report.kept:,} of {report.kept + report.read:,} shards")
    if args.leave_out:
        print(f"left out: {report.left_out:,} samples, {report.left_out_shards:,} whole shards")
    if report.in_again:
        print(f"in again: {report.in_again:,} samples left out before; --leave-out FILE omits them")
    if report.manifest is None:
        print(f"indexed {report.read + report.kept:,} shards; the call without --part is still due")
        return 0
    _print_summary(report.manifest)
    if not report.listing.is_local and report.listing.base != report.manifest.location:
        base = report.listing.base
        print(
            f"no manifest holds a command, password or signature: train with data.shards='{base}'"
        )
    return 0


def verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ganscale.data.manifest import Manifest
    from ganscale.errors import UserError
    from ganscale.shards.exclusions import Exclusion, read_list, write_list
    from ganscale.shards.verifying import verify_shards

    manifest = Manifest.load(args.folder)
    # Before hours of reading: is what is to be added to a list?
    earlier = args.leave_out and args.leave_out.exists() and read_list(args.leave_out)
    found = []
    with tqdm(total=len(manifest.samples), unit=" images", disable=None) as progress:
        for findings in verify_shards(manifest, args.shards, args.workers):
            progress.update(findings.samples)
            if findings.problem or findings.bad:
                found.append(findings)
    unknown = sum(not shard.sha256 for shard in manifest.shards)
    if unknown:
        print(f"without a checksum to compare: {unknown:,} shards (indexed with --trust-idx)")
    bad = [
        Exclusion(findings.shard, key, reason)
        for findings in sorted(found)
        for key, reason in findings.bad
    ]
    if args.leave_out:
        known = earlier.samples if earlier else ()
        write_list(args.leave_out, dict.fromkeys([*known, *bad]))
    if not found:
        counts = f"{len(manifest.samples):,} images in {len(manifest.shards):,}"
        print(f"all {counts} shard{'s' * (len(manifest.shards) > 1)} are good")
        return 0
    _print_findings(found)
    changed = sum(bool(findings.problem) for findings in found)
    raise UserError(
        f"{manifest.root}: images that cannot be decoded: {len(bad):,}; shards that are missing, "
        f"unreadable or changed: {changed:,}"
        + (f" (to index these again: ganscale shards index {manifest.root})" if changed else "")
    )


def _print_findings(found) -> None:
    """A line for each shard and reason: how many samples, and the first of them."""
    width = max(len(findings.shard) for findings in found)
    for shard, samples, problem, bad in sorted(found):
        reasons: dict[str, list[str]] = {}
        for key, reason in bad:
            reasons.setdefault(reason, []).append(key)
        if problem:
            print(f"{shard:<{width}}  {samples:>9,}  {problem}")
        for reason, keys in reasons.items():
            first = f"'{keys[0]}'" + (" and others" if len(keys) > 1 else "")
            print(f"{shard:<{width}}  {len(keys):>9,}  {first} {reason}")


def export(args: argparse.Namespace) -> int:
    from ganscale.data.manifest import Manifest
    from ganscale.shards.foreign_indices import write_wids
    from ganscale.shards.index_cache import IndexCache

    manifest = Manifest.load(args.folder)
    finished = IndexCache(manifest.root)
    left_out = [finished.left_out(shard.name) for shard in manifest.shards]
    samples = [shard.samples + n for shard, n in zip(manifest.shards, left_out, strict=True)]
    write_wids(manifest, args.output, samples)
    if any(left_out):
        print(f"wids reads whole shards, also the {sum(left_out):,} samples that were left out")
    print(f"index        {args.output}")
    return 0


def show(args: argparse.Namespace) -> int:
    from ganscale.data.manifest import Manifest, check_shards

    manifest = Manifest.load(args.folder)
    check_shards(manifest)
    _print_summary(manifest)
    if manifest.class_count:
        _print_classes(manifest)
    if args.sheet:
        bad_samples = _write_sheet(manifest, args.sheet, args.count)
        print(
            f"sheet        {args.sheet}"
            + (f" ({bad_samples} broken, black)" if bad_samples else "")
        )
    return 0


def _print_summary(manifest) -> None:
    shard_bytes = sum(shard.bytes for shard in manifest.shards)
    resolution = "{} x {}".format(*manifest.resolution) if manifest.resolution else "varies"
    print(f"folder       {manifest.root}")
    print(f"location     {manifest.location}")
    print(f"samples      {len(manifest.samples):,}")
    print(f"shards       {len(manifest.shards):,}")
    print(f"bytes        {shard_bytes:,}")
    print(f"images       {', '.join(manifest.extensions)}")
    print(f"resolution   {resolution}")
    print(f"classes      {manifest.class_count or 'none'}")
    print(f"fingerprint  {manifest.fingerprint}")


def _print_classes(manifest) -> None:
    import numpy as np

    counts = np.zeros(manifest.class_count, np.int64)
    for first in range(0, len(manifest.samples), 1 << 20):
        labels = manifest.samples["label"][first : first + (1 << 20)]
        counts += np.bincount(labels, minlength=manifest.class_count)
    for label, count in enumerate(counts):
        name = manifest.class_names[label] if manifest.class_names else ""
        print(f"  class {label:>5}  {count:>12,}  {name}".rstrip())


def _write_sheet(manifest, path: Path, count: int) -> int:
    """Writes `count` evenly spaced samples as a grid; returns how many are broken."""
    import numpy as np
    from PIL import Image

    from ganscale.data.images.decoding import DecodeError, decode
    from ganscale.data.images.grid import image_grid
    from ganscale.data.shard_reader import BadSampleError, open_shard_reader
    from ganscale.schema import DataConfig

    count = min(count, len(manifest.samples))
    # Photographs of any size are shown small: a sheet is to be looked at as a whole.
    resolution = min(128, *manifest.resolution) if manifest.resolution else 128
    images = np.zeros((count, resolution, resolution, 3), np.uint8)
    store = open_shard_reader(manifest, DataConfig(path=manifest.source))
    bad_samples = 0
    for cell, sample in enumerate(np.linspace(0, len(manifest.samples) - 1, count).astype(int)):
        try:
            images[cell] = decode(store.read(int(sample)), resolution, 3)
        except (BadSampleError, DecodeError):
            bad_samples += 1
    columns = int(np.ceil(np.sqrt(count)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images, columns)).save(path, "PNG")
    return bad_samples
