"""The output of every benchmark: a table, printed and optionally written as JSON.

python -m benchmarks.NAME [--quick] [--json FILE]
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One comparison.

    ratio: the rival's figure over ours, or as `unit` says; nan if it was not measured
    low and high: its spread
    """

    name: str
    rival: str
    ratio: float
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    note: str = ""


def arguments(description: str | None) -> argparse.Namespace:
    """The options that all benchmarks share: `quick` (bool) and `json` (a path or None)."""
    return argument_parser(description).parse_args()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `arguments`, for a benchmark with further options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    return parser


def report(rows: Sequence[Row], json_file: Path | None) -> None:
    """Prints the rows as a table and writes them, with the machine, as JSON."""
    print(table(rows))
    write(rows, json_file)


def write(rows: Sequence[Row], json_file: Path | None) -> None:
    """Writes the rows, with the machine, as JSON, if there is a file for them."""
    if json_file is not None:
        content = {"machine": machine(), "rows": [_as_json(row) for row in rows]}
        part = json_file.with_suffix(".part")  # whoever ends this process finds a whole file
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(json_file)


def _as_json(row: Row) -> dict[str, Any]:
    return asdict(row) | ({"ratio": None} if isnan(row.ratio) else {})


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns with headings."""
    cells = [["name", "rival", "ratio", "low", "high", "unit", "note"]]
    for row in rows:
        numbers = [
            "" if n is None or isnan(n) else f"{n:.3g}" for n in (row.ratio, row.low, row.high)
        ]
        cells.append([row.name, row.rival, *numbers, row.unit, row.note])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def machine() -> dict[str, Any]:
    """What else the figures depend on."""
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "cuda": torch.version.cuda if has_gpu else None,
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,
        "driver": _driver_version() if has_gpu else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _driver_version() -> str:
    """Of the first GPU, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return printed.stdout.split("\n")[0].strip()


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
