"""`ganscale evaluate RUN|IMAGES...`: FID and other figures of checkpoints, or of any images."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ganscale.cli.arguments import (
    ALLOW_CHANGED_CODE,
    TRUNCATION,
    finite_float,
    natural_int,
    positive_int,
)
from ganscale.errors import UserError

if TYPE_CHECKING:
    from ganscale.cli.evaluation_subjects import Subject
    from ganscale.evaluation.figures import Figures
    from ganscale.runtime import Runtime


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compute FID and other figures of sample quality",
        description="Judges the EMA generator of runs, exported generators, or images in a folder, "
        "zip, tar or data set. Several give a table. Options default to the run's settings "
        "`evaluation`. On several ranks: "
        "`accelerate launch -m ganscale evaluate ...`.",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="RUN|IMAGES", type=Path, help="for example runs/demo")
    add(
        "--checkpoint",
        metavar="NAME",
        help="such as images-000200000, or `all` (default: the newest)",
    )
    add("--metrics", metavar="NAME,...", help="such as fd,kid,precision,recall")
    add(
        "--network",
        metavar="NAME",
        help="inception, dinov2, efficientnet_lite0 or package.module:Class",
    )
    add("--option", metavar="KEY=VALUE", action="append", help="of the network, such as path=FILE")
    add("--samples", metavar="N", type=positive_int, help="generated images, or files, to judge")
    add("--reference", metavar="DATA|NPZ", help="a data set, or a file of mu and sigma")
    add(
        "--reference-images",
        metavar="N",
        type=natural_int,
        help="images of the reference to use (0: all)",
    )
    add("--batch-size", metavar="N", type=positive_int, help="images per forward")
    add("--seed", type=int, help="of the latents (default: the run's)")
    add("--truncation", type=finite_float, default=1.0, metavar="PSI", help=TRUNCATION)
    add("--weights", choices=("ema", "generator"), default="ema", help="ema (default) or non-EMA")
    add("--allow-changed-code", action="store_true", help=ALLOW_CHANGED_CODE)
    add("--json", action="store_true", help="print JSON in place of a table")
    add(
        "--save-statistics",
        metavar="NPZ",
        type=Path,
        help="write the reference's mu and sigma there, for --reference of other evaluations",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ganscale.cli.evaluation_subjects import UnusableCheckpointError, subjects_of
    from ganscale.evaluation.figures import STATISTICS_SUFFIX
    from ganscale.runtime import Runtime

    statistics = arguments.save_statistics
    if statistics is not None and statistics.suffix != STATISTICS_SUFFIX:
        raise UserError(f"--save-statistics {statistics}: its name must end with .npz")
    runtime = Runtime.start()
    try:
        level = logging.INFO if runtime.is_main else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        subjects = [*subjects_of(arguments, runtime)]
        _check_comparable(subjects)
        results, unusable = list[tuple[str, "Figures"]](), list[str]()
        try:
            for subject in subjects:
                try:
                    results.append((subject.name, _evaluate(subject, runtime)))
                except UnusableCheckpointError as error:
                    unusable.append(str(error))
            if statistics is not None and results:
                runtime.run_on_main(lambda: subjects[0].evaluator.save_reference(statistics))
        finally:  # what was found so far may have taken hours
            if runtime.is_main and results:
                print(as_json(results) if arguments.json else _as_table(results))
        runtime.barrier()
        if unusable:
            raise UserError(
                f"{len(unusable)} of {len(subjects)} checkpoints could not be evaluated: "
                f"{'; '.join(unusable[:3])}"
            )
    finally:
        runtime.close()


def _check_comparable(subjects: "list[Subject]") -> None:
    """Before anything takes long. Raises UserError."""
    first, *others = subjects
    for other in others:
        mine, theirs = first.evaluator.identity(), other.evaluator.identity()
        if differences := mine.differences(theirs):
            raise UserError(
                f"figures of {first.name} and {other.name} are not comparable ("
                f"{'; '.join(differences)}): give options that make these equal, or evaluate each "
                "by itself"
            )


def _evaluate(subject: "Subject", runtime: "Runtime") -> "Figures":
    from tqdm import tqdm

    bar = tqdm(total=1, desc=subject.name, unit="round", disable=None if runtime.is_main else True)

    def on_round(stage: str, begun: int, total: int) -> None:
        bar.set_description(f"{subject.name}: {stage}", refresh=False)
        bar.total, bar.n = max(total, begun, 1), begun
        bar.refresh()

    with bar:
        return subject.evaluator.evaluate(subject.images(), lambda: False, on_round)


def as_json(results: "list[tuple[str, Figures]]") -> str:
    from ganscale.tracking.record import to_json

    rows = [{"source": name, **figures.row()} for name, figures in results]
    return json.dumps(to_json(rows), indent=1, allow_nan=False)


def _as_table(results: "list[tuple[str, Figures]]") -> str:
    """One line for each result, and below what all of them depend on."""
    names = [*dict.fromkeys(name for _, figures in results for name in figures.values)]
    rows = [["", *(name.removeprefix("eval/") for name in names)]]
    for source, figures in results:
        values = [
            f"{figures.values[name]:.6g}" if name in figures.values else "-" for name in names
        ]
        rows.append([source, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    identity = results[0][1].identity
    images = f"{identity.reference_images:,}" if identity.reference_images else "unknown"
    lines += [
        "",
        f"network:    {identity.network} (sha256 {identity.checksum[:16]}), {identity.resize}",
        f"reference:  {identity.reference}, {images} images",
        f"samples:    {identity.samples:,}",
    ]
    if identity.truncation != 1:
        lines.append(f"truncation: {identity.truncation}")
    return "\n".join(lines)
