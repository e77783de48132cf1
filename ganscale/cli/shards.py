"""`ganscale shards`: make, index, verify and inspect data sets of WebDataset shards."""

import argparse
import os
from collections import defaultdict
from pathlib import Path

from ganscale.cli.arguments import finite_float, positive_int, resolution
from ganscale.cli.data_set_summary import print_summary
from ganscale.terminal import echo

_MOST_CLASSES = 20  # that `write` and `index` print


def add_parser(subparsers) -> None:
    """Registers `shards`; each of its commands sets `run(args)`, which returns the exit code."""
    shards = subparsers.add_parser("shards", help="make, index, verify and inspect data sets")
    commands = shards.add_subparsers(required=True, metavar="COMMAND")
    for add_command in (_add_write, _add_index, _add_verify, _add_show, _add_export):
        add_command(commands)


def _add_write(commands) -> None:
    parser = commands.add_parser(
        "write",
        help="make a data set from images",
        description="Makes a data set from images. If interrupted, run it again to continue.",
    )
    parser.set_defaults(run=_write)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a folder (with subfolders), zip or tar of images, or bundled:mnist or bundled:emoji",
    )
    add("output", metavar="OUTPUT", type=Path, help="the folder for the data set")
    add(
        "--resolution",
        type=resolution,
        metavar="PIXELS",
        help="crop and resize to this square, or, as 256x512, to this height and width",
    )
    add("--channels", type=int, choices=(1, 3), help="default: 3 (RGB), for bundled:mnist 1 (grey)")
    add(
        "--format",
        dest="image_format",
        choices=("png", "webp", "jpeg", "npy", "keep"),
        help="how images are stored (default: keep the files if no image is changed, else png)",
    )
    add("--quality", type=positive_int, metavar="1-100", help="jpeg default: 95; webp: lossless")
    _add_members(
        parser,
        ("folder", "json", "cls", "txt", "none"),
        "folder: each subfolder is a class; json: StyleGAN's dataset.json, or a .json beside each "
        "image; cls, txt: such a file beside each image (default: dataset.json or .cls, if any)",
    )
    add(
        "--split",
        dest="splits",
        action="append",
        metavar="FOLDER",
        help="only the images in this folder of SOURCE, such as train; repeat it for more",
    )
    add(
        "--zip-encoding",
        metavar="NAME",
        help="of names in a zip that does not say it, such as gbk (default: UTF-8 or cp437)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-samples", type=positive_int, metavar="N", help="images per shard")
    size.add_argument(
        "--shard-bytes", type=positive_int, metavar="BYTES", help="shard size (default: 128 MiB)"
    )
    add("--seed", type=int, default=0, help="seed of the images' order (default: 0)")
    add(
        "--max-bad",
        type=finite_float,
        default=0.01,
        metavar="SHARE",
        help="share of bad images to leave out before it is an error (default: 0.01)",
    )
    _add_workers(parser)


def _write(args: argparse.Namespace) -> int:
    from ganscale.shards.writing import describe_bad_images, write_shards

    # Options have the names of the function's parameters, and its defaults if they are not given.
    options = {name: value for name, value in vars(args).items() if value is not None}
    del options["run"]
    result = write_shards(**options)
    if result.ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.ignored.items())
        echo(f"files that are not stored: {kinds}")
    for note in result.notes:
        echo(note)
    if bad := result.bad_images:
        echo(f"left out {len(bad)} bad images: {describe_bad_images(bad)}")
    if result.kept_shards:
        echo(f"kept {result.kept_shards} shards from an earlier run")
    print_summary(result.manifest, most_classes=_MOST_CLASSES)
    return 0


def _add_index(commands) -> None:
    parser = commands.add_parser(
        "index",
        help="make the manifest of existing shards",
        description="Reads shards and writes manifest.json and manifest.npy, beside them or into "
        "another folder. Run again, it reads only shards that are new or have changed. Class names "
        "come from classes.json beside the manifest; where labels are names, it is made if it does "
        "not exist. To share the work between machines, run the same command on each with its own "
        "--part and a shared --output; when all have finished, run it once without --part to make "
        "the manifest.",
    )
    parser.set_defaults(run=_index)
    add = parser.add_argument
    add(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="a folder (its *.tar); a path or URL, with {000..099} or wildcards; a WebDataset "
        "index (*.json); or 'pipe:COMMAND {}', which prints the shard whose name replaces {}",
    )
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for the manifest (default: that of the shards; required for remote shards)",
    )
    add("--names", nargs="+", default=[], metavar="NAME", help="shards of a pipe, with {000..099}")
    add("--again", action="store_true", help="read all shards, even unchanged ones")
    add(
        "--leave-out",
        type=Path,
        metavar="FILE",
        help="leave the samples in this list out of the manifest; `verify --leave-out` and a "
        "failed `index` write one: JSON lines of shard, key (null: the whole shard), reason",
    )
    add(
        "--trust-idx",
        action="store_true",
        help="take offsets from DALI's .idx beside a local shard instead of reading the shard, "
        "which then has no checksum",
    )
    _add_members(
        parser,
        ("cls", "json", "txt", "none"),
        "the member of a sample with its class (default: the first of these that holds classes)",
    )
    add("--part", type=_part, metavar="I/N", help="only read the I-th of N parts (1 to N)")
    _add_workers(parser)


def _index(args: argparse.Namespace) -> int:
    from ganscale.shards.class_labels import MemberChoice
    from ganscale.shards.exclusions import read_exclusions
    from ganscale.shards.indexing import index_shards

    result = index_shards(
        args.sources,
        args.output,
        names=args.names,
        workers=args.workers,
        again=args.again,
        exclusions=read_exclusions(args.leave_out) if args.leave_out else (),
        choice=MemberChoice(args.image, args.classes, args.class_key),
        trust_idx=args.trust_idx,
        part=args.part,
    )
    shards = result.read + result.kept
    if result.kept:
        echo(f"not read, since unchanged: {result.kept:,} of {shards:,} shards")
    if args.leave_out:
        samples, whole_shards = result.excluded_samples, result.excluded_shards
        echo(f"left out: {samples:,} samples, {whole_shards:,} whole shards")
    if result.restored_samples:
        echo(f"restored: {result.restored_samples:,} samples that were left out before")
    if result.manifest is None:
        echo(f"indexed {shards:,} shards; run without --part to make the manifest")
        return 0
    print_summary(result.manifest, most_classes=_MOST_CLASSES)
    if result.json_keys:
        keys = ", ".join(result.json_keys)
        echo(f"no classes, but JSON with {keys}: --class-key KEY takes one of them")
    base = result.listing.base
    if not result.listing.is_local and base != result.manifest.location:
        echo(
            "the manifest does not store commands, passwords and signatures: "
            f"train with data.shards='{base}'"
        )
    return 0


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="check all shards against their manifest and decode every image",
        description="Reads every shard once, compares its size and SHA-256 with the manifest, and "
        "decodes every image. The exit code is 2 if anything is bad.",
    )
    parser.set_defaults(run=_verify)
    _add_data_set(parser)
    parser.add_argument(
        "--shards",
        default="",
        metavar="PLACE",
        help="folder, URL or 'pipe:COMMAND {}' of the shards, if not that of the manifest",
    )
    parser.add_argument(
        "--leave-out",
        type=Path,
        metavar="FILE",
        help="add the bad samples to this list, for `ganscale shards index --leave-out`",
    )
    _add_workers(parser)


def _verify(args: argparse.Namespace) -> int:
    from ganscale.data.manifest import Manifest
    from ganscale.errors import UserError
    from ganscale.shards.exclusions import Exclusion, read_exclusions, write_exclusions
    from ganscale.shards.verifying import verify_shards

    manifest = Manifest.load(args.folder)
    has_list = args.leave_out and args.leave_out.exists()
    # Read now: a bad list should fail before hours of work.
    exclusions = read_exclusions(args.leave_out) if has_list else []
    results = verify_shards(manifest, args.shards, args.workers)
    bad_shards = [result for result in results if result.problem or result.bad]
    if unknown := sum(not shard.sha256 for shard in manifest.shards):
        echo(f"without a checksum to compare: {unknown:,} shards (indexed with --trust-idx)")
    if args.leave_out:
        exclusions += [Exclusion(result.shard, *bad) for result in results for bad in result.bad]
        write_exclusions(args.leave_out, dict.fromkeys(exclusions))
    if not bad_shards:
        shards = f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) > 1)}"
        echo(f"all {len(manifest.samples):,} images in {shards} are good")
        return 0
    _print_bad(bad_shards)
    bad_images = sum(len(result.bad) for result in bad_shards)
    changed = sum(bool(result.problem) for result in bad_shards)
    again = f" (to index them again: ganscale shards index {manifest.root})" if changed else ""
    raise UserError(
        f"{manifest.root}: images that cannot be decoded: {bad_images:,}; shards that are missing, "
        f"unreadable or changed: {changed:,}{again}"
    )


def _print_bad(bad_shards) -> None:
    """Prints a line for each shard and reason: how many samples, and the first of them."""
    width = max(len(result.shard) for result in bad_shards)
    for shard, samples, problem, bad in bad_shards:
        if problem:
            echo(f"{shard:<{width}}  {samples:>9,}  {problem}")
        reasons = defaultdict(list)
        for key, reason in bad:
            reasons[reason].append(key)
        for reason, keys in reasons.items():
            others = " and others" if len(keys) > 1 else ""
            echo(f"{shard:<{width}}  {len(keys):>9,}  '{keys[0]}'{others} {reason}")


def _add_show(commands) -> None:
    parser = commands.add_parser("show", help="print a summary of a data set")
    parser.set_defaults(run=_show)
    _add_data_set(parser)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also write a grid of images")
    parser.add_argument(
        "--count", type=positive_int, default=64, metavar="N", help="images in it (default: 64)"
    )
    parser.add_argument(
        "--augment",
        type=Path,
        metavar="PNG",
        help="also write a grid of 8 images, with a row for each transformation of --pipeline",
    )
    parser.add_argument(
        "--pipeline", choices=("ada", "diffaugment"), default="ada", help="default: ada"
    )


def _show(args: argparse.Namespace) -> int:
    from ganscale.data.manifest import Manifest, check_shards

    manifest = Manifest.load(args.folder)
    check_shards(manifest)
    print_summary(manifest)
    if args.sheet:
        from ganscale.shards.sample_sheet import write_sheet

        bad = write_sheet(manifest, args.sheet, args.count)
        echo(f"sheet        {args.sheet}{f' ({bad} bad, black)' if bad else ''}")
    if args.augment:
        from ganscale.augmentation.contact_sheet import write_contact_sheet

        bad = write_contact_sheet(manifest, args.augment, args.pipeline, columns=8)
        echo(f"augmented    {args.augment}{f' ({bad} bad, black)' if bad else ''}")
    return 0


def _add_export(commands) -> None:
    parser = commands.add_parser("export", help="write an index for WebDataset's wids")
    parser.set_defaults(run=_export)
    _add_data_set(parser)
    parser.add_argument("output", metavar="JSON", type=Path, help="the file of the index")


def _export(args: argparse.Namespace) -> int:
    from ganscale.data.manifest import Manifest
    from ganscale.shards.index_cache import IndexCache
    from ganscale.shards.interop import write_wids

    manifest = Manifest.load(args.folder)
    cache = IndexCache(manifest.root)
    excluded = [cache.excluded(shard.name) for shard in manifest.shards]
    samples = [shard.samples + n for shard, n in zip(manifest.shards, excluded, strict=True)]
    write_wids(manifest, args.output, samples)
    if any(excluded):
        echo(f"wids reads whole shards, including the {sum(excluded):,} samples that are left out")
    echo(f"index        {args.output}")
    return 0


def _add_data_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DATASET", type=Path, help="the folder of the manifest")


def _add_members(
    parser: argparse.ArgumentParser, classes: tuple[str, ...], classes_help: str
) -> None:
    add = parser.add_argument
    add(
        "--image",
        default="",
        type=lambda text: text.lower().lstrip("."),
        metavar="EXT",
        help="the extension of the images, such as left.jpg, where samples have several",
    )
    add("--classes", default="", choices=classes, help=classes_help)
    add(
        "--class-key",
        default="",
        metavar="KEY",
        help="where JSON has the class (default: label or class)",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    # The affinity respects the limits of a batch system; macOS has none.
    has_affinity = hasattr(os, "sched_getaffinity")
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        default=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        help="processes (default: %(default)s, one per core); they do not change the result",
    )


def _part(text: str) -> tuple[int, int]:
    """(part, parts), the part counted from 0."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 1 to N")
    return int(part) - 1, int(parts)
