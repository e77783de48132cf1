"""What works on this machine's GPU, and how fast: `make gpu`, in less than eight minutes.

    python -m benchmarks.gpu [--results FOLDER] [--steps NAME ...] [--seconds N]

Runs the tests of tests/cuda, then the benchmarks `launches`, `limit`, `loop`, `forms` and
`step_on_gpu`, each in a process of its own. `FOLDER/gpu-NAME.json`, with the card's name, has
versions, tests and all rows; it is written after every step, so a step that fails loses nothing of
the others. The exit code is 1 if one did. Tables for docs/performance.md are printed.

With the environment variable GANSCALE_DEVICE=cpu, all of it runs on the CPU, to see that it works.
Nothing is downloaded or installed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.ranks import REPOSITORY

SECONDS = {"cuda": 460.0, "cpu": 1200.0}
_NEEDED = (
    "accelerate", "beartype", "braceexpand", "fsspec", "jaxtyping", "omegaconf", "psutil", "pytest",
    "pytest_timeout", "safetensors", "simplejpeg", "torch", "wandb", "webdataset",
)  # fmt: skip
_OUTPUT_CHARACTERS = 10_000  # of a step that fails
_TESTS = ("-m", "pytest", "-v", "-W", "default", "-o", "timeout=100", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Step:
    """A program of Python.

    arguments: FILE stands for the file to write, as JSON of `benchmarks.report` or as JUnit's XML,
        and SECONDS for the time that there is
    share: of all the time, at most
    """

    name: str
    arguments: tuple[str, ...]
    share: float = 1.0


STEPS = (
    Step("tests", (*_TESTS, "--junit-xml", "FILE", "tests/cuda"), 0.45),
    Step("launches", ("-m", "benchmarks.launches", "--quick", "--json", "FILE"), 0.08),
    Step("limit", ("-m", "benchmarks.limit", "--quick", "--json", "FILE"), 0.1),
    Step("loop", ("-m", "benchmarks.loop", "--quick", "--json", "FILE"), 0.17),
    Step("forms", ("-m", "benchmarks.forms", "--seconds", "SECONDS", "--json", "FILE"), 0.085),
    Step("step", ("-m", "benchmarks.step_on_gpu", "--seconds", "SECONDS", "--json", "FILE")),
)


def run_step(step: Step, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """What it found in `seconds` at most: `rows`, or tests as `_read_tests` has them; and how it
    failed, "" if it did not."""
    with tempfile.TemporaryDirectory() as name:
        found = Path(name) / "found"
        values = {"FILE": str(found), "SECONDS": str(0.9 * seconds)}
        started = time.monotonic()
        with (Path(name) / "output").open("w+") as output:
            process = subprocess.Popen(
                [sys.executable, *(values.get(each, each) for each in step.arguments)],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group to end with all that it has started
            )
            try:
                code = process.wait(seconds)
                failure = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                failure = f"not done after {seconds:.0f} s"
            finally:
                _end_group(process)
            output.seek(0)
            printed = output.read()
        result: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
        result["failure"] = failure and f"{failure}: {printed[-_OUTPUT_CHARACTERS:]}"
        if found.exists():
            read = _read_tests if "--junit-xml" in step.arguments else _read_rows
            try:
                result |= read(found)
            except (SyntaxError, ValueError) as error:  # cut off with the process that wrote it
                result["failure"] += f"\nand its file cannot be read: {error}"
    return result


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_rows(path: Path) -> dict[str, Any]:
    return {"rows": json.loads(path.read_text())["rows"]}


def _read_tests(path: Path) -> dict[str, Any]:
    """How many passed, the names of those that failed, how many were skipped by reason, and what
    tests have recorded as properties, by their names and the test's parameters."""
    passed, failed, skipped, recorded = 0, [], Counter[str](), {}
    for case in ElementTree.parse(path).iter("testcase"):
        parameters = case.get("name", "").partition("[")[2].removesuffix("]")
        for each in case.iter("property"):
            recorded[f"{each.get('name')}/{parameters}"] = each.get("value")
        if (skip := case.find("skipped")) is not None:
            skipped[skip.get("message", "")] += 1
        elif case.find("failure") is None and case.find("error") is None:
            passed += 1
        else:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
    found = {"passed": passed, "failed": failed, "skipped": dict(skipped)}
    return found | {"recorded": recorded}


def measure(
    steps: Sequence[Step], folder: Path, total_seconds: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Runs the steps and writes `gpu-NAME.json` after each; its content."""
    from benchmarks.report import machine

    about, deadline = machine(), time.monotonic() + total_seconds
    content: dict[str, Any] = {"machine": about, "tf32": False, "steps": {}}
    name = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or "cpu").lower()).strip("-")
    path = folder / f"gpu-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        seconds = max(1.0, min(step.share * total_seconds, deadline - time.monotonic()))
        print(f"{step.name}: at most {seconds:.0f} s", flush=True)
        result = content["steps"][step.name] = run_step(step, seconds, environment)
        print(f"{step.name}: {result['failure'] or 'done'} ({result['seconds']} s)", flush=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{path}\n\n{tables(content)}")
    return content


def tables(content: dict[str, Any]) -> str:
    """In Markdown: the tests, the steps with all rivals, and the other rows."""
    about, steps = content["machine"], content["steps"]
    versions = [about["gpu"] or about["cpu"], f"torch {about['torch']}"]
    if about["gpu"]:
        versions += [f"CUDA {about['cuda']}", f"driver {about['driver']}"]
    lines = [f"{', '.join(versions)}; float32 without TF32."]
    if "passed" in (tests := steps.get("tests", {})):
        lines[0] += f" Tests: {tests['passed']} passed, {len(tests['failed'])} failed."
    if recorded := tests.get("recorded"):
        lines += ["", _line("recorded by tests", ""), _rule(2)]
        lines += [_line(f"`{name}`", value) for name, value in recorded.items()]
    rows = []
    for name, step in steps.items():
        for row in step.get("rows", []):
            is_named = row["name"].startswith(("launches/", "host/", "step/"))
            rows.append(row if is_named else row | {"name": f"{name}/{row['name']}"})
    compared = [row for row in rows if row.get("rivals")]
    rivals = list(dict.fromkeys(name for row in compared for name in row["rivals"]))
    if compared:
        lines += ["", _line("cycle", "images/s", *rivals, "of the peak"), _rule(len(rivals) + 3)]
    for row in compared:
        ratios = [f"{row['rivals'][name]:.2f}" if name in row["rivals"] else "" for name in rivals]
        name, speed = row["name"].removeprefix("step/"), f"{row['images_per_second']:,.0f}"
        lines.append(_line(f"`{name}`", speed, *ratios, f"{row['percent_of_peak']:.0f} %"))
    others = [row for row in rows if not row.get("rivals")]
    if others:
        lines += ["", _line("row", "compared with", "ratio", "unit or reason"), _rule(4)]
    for row in others:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
        unit = row["note"] if row["ratio"] is None else row["unit"]
        lines.append(_line(f"`{row['name']}`", row["rival"], ratio, unit))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    add = parser.add_argument
    add("--results", type=Path, default=REPOSITORY / "results", metavar="FOLDER")
    add("--steps", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--seconds", type=float, help="for all steps together (default: 460; on a CPU, 1200)")
    options = parser.parse_args(arguments)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        print(f"error: {sys.executable} lacks {', '.join(missing)}", file=sys.stderr)
        return 2

    import torch

    if os.environ.get("GANSCALE_DEVICE") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("error: no GPU; GANSCALE_DEVICE=cpu runs the same on the CPU", file=sys.stderr)
        return 2
    seconds = options.seconds or SECONDS["cuda" if torch.cuda.is_available() else "cpu"]
    chosen = [step for step in STEPS if step.name in options.steps]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    content = measure(chosen, options.results, seconds, environment)
    return 1 if any(step["failure"] for step in content["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
