"""What every benchmark says: one table, printed and, on request, as JSON.

python -m benchmarks.NAME [--quick] [--json FILE]
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One comparison.

    ratio: of the rival's figure to ours, or what `unit` says; nan where there is none
    low and high: how far it scatters
    """

    name: str
    rival: str
    ratio: float
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    note: str = ""


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that all benchmarks share: `quick` (bool) and `json` (a path or None)."""
    return argument_parser(description).parse_args()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """That of `arguments`, for a benchmark that has more of them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of it, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser


def report(rows: Sequence[Row], json_file: Path | None) -> None:
    """Prints the rows as a table and writes them, with the machine, as JSON."""
    print(table(rows))
    if json_file is not None:
        content = {"machine": machine(), "rows": [_as_json(row) for row in rows]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")


def _as_json(row: Row) -> dict[str, Any]:
    return asdict(row) | ({"ratio": None} if isnan(row.ratio) else {})


def table(rows: Sequence[Row]) -> str:
    """The rows under their headings, in columns."""
    cells = [["name", "rival", "ratio", "low", "high", "unit", "note"]]
    for row in rows:
        numbers = [
            "" if n is None or isnan(n) else f"{n:.3g}" for n in (row.ratio, row.low, row.high)
        ]
        cells.append([row.name, row.rival, *numbers, row.unit, row.note])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the program."""
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
