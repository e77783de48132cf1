"""`ganscale report RUN...`: one HTML page of a run, or of several in comparison."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="show runs as one HTML page",
        description="Writes one HTML page that needs nothing else: curves, samples over time, "
        "faults and settings of a run, also while it trains. Several runs are compared.",
    )
    parser.add_argument(
        "run_folders", metavar="RUN", type=Path, nargs="+", help="for example runs/demo"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: report.html in the run folder, or here for several runs",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from datetime import datetime

    from ganscale.errors import EXIT_DONE, UserError
    from ganscale.files import write_text
    from ganscale.report import read_runs, render

    runs = read_runs(arguments.run_folders)
    folder = arguments.run_folders[0] if len(runs) == 1 else Path()
    output = arguments.output or folder / "report.html"
    page = render(runs, datetime.now())
    try:
        write_text(output, page)
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}") from error
    what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    print(f"report of {what} ({len(page.encode()) / 1e6:.1f} MB): {output}")
    return EXIT_DONE
