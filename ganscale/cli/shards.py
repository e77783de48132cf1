"""`ganscale shards`: make, index and look at data sets of WebDataset shards."""

import argparse
import os
from pathlib import Path


def add_parser(subparsers) -> None:
    """Registers `shards` and its subcommands; each sets `run`, a function of the parsed arguments
    that returns the exit code and raises UserError."""
    shards = subparsers.add_parser("shards", help="make, index and look at data sets")
    commands = shards.add_subparsers(dest="shards_command", required=True, metavar="COMMAND")
    _add_write(commands)
    _add_index(commands)
    _add_show(commands)


def _add_write(commands) -> None:
    parser = commands.add_parser(
        "write",
        help="make a data set of images",
        description="Makes a data set of images. Run again after an interruption, the same command "
        "goes on where it was stopped.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder (with subfolders), zip or tar of images, or bundled:mnist or bundled:emoji",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the folder of the data set")
    parser.add_argument(
        "--resolution",
        type=_positive,
        metavar="PIXELS",
        help="crop to the centred square and resize to this (default: as they are)",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="grey or RGB (default: RGB; bundled:mnist 1)"
    )
    parser.add_argument(
        "--format",
        choices=("png", "webp", "jpeg", "npy", "keep"),
        help="how images are stored; keep: as the files are (default: keep where nothing is to be "
        "changed, else png)",
    )
    parser.add_argument(
        "--quality",
        type=_positive,
        metavar="1-100",
        help="of jpeg (default: 95) or webp (default: lossless)",
    )
    parser.add_argument(
        "--classes",
        choices=("folder", "none"),
        default="none",
        help="folder: the subfolders are the classes (default: none; bundled sets have theirs)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-samples", type=_positive, metavar="N", help="images in a shard")
    size.add_argument(
        "--shard-bytes",
        type=_positive,
        metavar="BYTES",
        help="about so many bytes a shard (default: 128 MiB)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images' order (default: 0)")
    parser.add_argument(
        "--max-broken",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of broken images that is left out without an error (default: 0.01)",
    )
    _add_workers(parser)
    parser.set_defaults(run=write)


def _add_index(commands) -> None:
    parser = commands.add_parser(
        "index",
        help="make the manifest of shards that something else has written",
        description="Reads all *.tar of a folder and writes manifest.json and manifest.npy beside "
        "them. Class names are taken from a list in classes.json, if there is one.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    _add_workers(parser)
    parser.set_defaults(run=index)


def _add_show(commands) -> None:
    parser = commands.add_parser("show", help="print what a data set holds")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also write a sheet of images")
    parser.add_argument(
        "--count", type=_positive, default=64, metavar="N", help="images on the sheet (default: 64)"
    )
    parser.set_defaults(run=show)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        default=_cores(),
        help="processes (default: one a core, %(default)s); they do not change the result",
    )


def _cores() -> int:
    """The cores that this process may use, which a batch system limits; macOS cannot tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def write(args: argparse.Namespace) -> int:
    from ganscale.shards.writing import DEFAULT_SHARD_BYTES, describe_broken, write_shards

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
        max_broken=args.max_broken,
    )
    if report.ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.ignored.items())
        print(f"not images, left out: {kinds}")
    if report.broken:
        print(f"broken, left out: {len(report.broken)}: {describe_broken(report.broken)}")
    if report.kept_shards:
        print(f"kept from an earlier run: {report.kept_shards} shards")
    _print_summary(report.manifest)
    return 0


def index(args: argparse.Namespace) -> int:
    from ganscale.shards.building import build_manifest

    _print_summary(build_manifest(args.folder, args.workers))
    return 0


def show(args: argparse.Namespace) -> int:
    from ganscale.data.manifest import Manifest, check_shards

    manifest = Manifest.load(args.folder)
    check_shards(manifest)
    _print_summary(manifest)
    if manifest.class_count:
        _print_classes(manifest)
    if args.sheet:
        broken = _write_sheet(manifest, args.sheet, args.count)
        print(f"sheet        {args.sheet}" + (f" ({broken} broken, black)" if broken else ""))
    return 0


def _print_summary(manifest) -> None:
    shard_bytes = sum(shard.bytes for shard in manifest.shards)
    resolution = "{} x {}".format(*manifest.resolution) if manifest.resolution else "varies"
    print(f"folder       {manifest.root}")
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

    from ganscale.data.contact_sheet import image_grid
    from ganscale.data.decoding import DecodeError, decode
    from ganscale.data.store import BrokenSample, ShardStore

    count = min(count, len(manifest.samples))
    # Photographs of any size are shown small: a sheet is to be looked at as a whole.
    resolution = min(128, *manifest.resolution) if manifest.resolution else 128
    images = np.zeros((count, resolution, resolution, 3), np.uint8)
    store = ShardStore(manifest)
    broken = 0
    for cell, sample in enumerate(np.linspace(0, len(manifest.samples) - 1, count).astype(int)):
        try:
            images[cell] = decode(store.read(int(sample)), resolution, 3)
        except (BrokenSample, DecodeError):
            broken += 1
    columns = int(np.ceil(np.sqrt(count)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images, columns)).save(path, "PNG")
    return broken
