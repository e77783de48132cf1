"""`ganscale shards`: make, index, verify and look at data sets of WebDataset shards."""

import argparse
import os
from pathlib import Path

from ganscale.cli import shard_commands


def add_parser(subparsers) -> None:
    """Registers `shards` and its subcommands; each sets `run`, a function of the parsed arguments
    that returns the exit code and raises UserError."""
    shards = subparsers.add_parser("shards", help="make, index, verify and look at data sets")
    commands = shards.add_subparsers(dest="shards_command", required=True, metavar="COMMAND")
    _add_write(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_show(commands)
    _add_export(commands)


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
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of bad images that is left out without an error (default: 0.01)",
    )
    _add_workers(parser)
    parser.set_defaults(run=shard_commands.write)


def _add_index(commands) -> None:
    parser = commands.add_parser(
        "index",
        help="make the manifest of shards that something else has written",
        description="Reads shards and writes manifest.json and manifest.npy, beside them or into "
        "another folder. Run again, the command reads only shards that are new or have changed: "
        "local ones by their size and time of change, remote ones by size and ETag or time, where "
        "the server states these, else by their address. Class names are taken from a list in "
        "classes.json beside the manifest, if there is one. Counts of img2dataset "
        "(NNNNN_stats.json) beside local shards are compared. "
        "Several machines can index one data set: each runs the same command with its own --part "
        "and a shared --output, and a last call without --part, after all have ended, makes the "
        "manifest.",
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="a folder (its *.tar); a path or URL, with {000..099} or wildcards; a WebDataset "
        "index (*.json); or 'pipe:COMMAND {}', which writes the shard of that name to its output",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the manifest goes (default: to the shards; needed for remote ones)",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the shards behind a pipe, with {000..099}",
    )
    parser.add_argument("--again", action="store_true", help="read all shards, trust nothing kept")
    parser.add_argument(
        "--leave-out",
        type=Path,
        metavar="FILE",
        help="leave the samples of this list out of the manifest, as `verify --leave-out` and a "
        "failed `index` write it: JSON lines of shard, key (null: all of the shard), reason",
    )
    parser.add_argument(
        "--trust-idx",
        action="store_true",
        help="take offsets from DALI's .idx beside a local shard, where there is one, instead of "
        "reading it all; its checksum then stays unknown",
    )
    parser.add_argument(
        "--part", type=_part, metavar="I/N", help="only read the I-th of N parts (1 to N)"
    )
    _add_workers(parser)
    parser.set_defaults(run=shard_commands.index)


def _add_verify(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare all shards with their manifest and decode every image",
        description="Reads every shard once: compares its size and SHA-256 with the manifest and "
        "decodes every image. Exit code 2 if anything is bad.",
    )
    parser.add_argument("folder", metavar="DATASET", type=Path)
    parser.add_argument(
        "--shards",
        default="",
        metavar="PLACE",
        help="where the shards lie, if not where the manifest says: a folder, a URL or "
        "'pipe:COMMAND {}'",
    )
    parser.add_argument(
        "--leave-out",
        type=Path,
        metavar="FILE",
        help="add the bad samples to this list, for `ganscale shards index --leave-out`",
    )
    _add_workers(parser)
    parser.set_defaults(run=shard_commands.verify)


def _add_export(commands) -> None:
    parser = commands.add_parser(
        "export", help="write an index with which WebDataset's wids reads a data set"
    )
    parser.add_argument("folder", metavar="DATASET", type=Path)
    parser.add_argument("output", metavar="JSON", type=Path)
    parser.set_defaults(run=shard_commands.export)


def _add_show(commands) -> None:
    parser = commands.add_parser("show", help="print what a data set holds")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also write a sheet of images")
    parser.add_argument(
        "--count", type=_positive, default=64, metavar="N", help="images on the sheet (default: 64)"
    )
    parser.set_defaults(run=shard_commands.show)


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


def _part(text: str) -> tuple[int, int]:
    """(part, parts), the part counted from 0."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 1 to N")
    return int(part) - 1, int(parts)
