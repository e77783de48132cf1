"""`ganscale report RUN...`: one HTML page of a run, or of several in comparison."""

import argparse
from pathlib import Path

from ganscale.errors import UserError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="show runs on one HTML page",
        description="Writes one self-contained HTML page with the curves, samples, faults and "
        "settings of a run, also while it trains. Several runs are compared.",
    )
    add = parser.add_argument
    add("run_folders", metavar="RUN", type=Path, nargs="+", help="for example runs/demo")
    add(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: report.html in the run folder; for several runs, in the current folder",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from datetime import datetime

    from ganscale.files import write_text
    from ganscale.report import read_runs, render

    runs = read_runs(arguments.run_folders)
    is_single = len(runs) == 1
    default = runs[0].folder.report
    output = arguments.output or (default if is_single else Path(default.name))
    # A shard's name need not be UTF-8.
    page = render(runs, datetime.now()).encode("utf-8", "backslashreplace").decode()
    try:
        write_text(output, page)
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}") from error
    subject = runs[0].name if is_single else f"{len(runs)} runs"
    print(f"report of {subject} ({len(page.encode()) / 1e6:.1f} MB): {output}")
