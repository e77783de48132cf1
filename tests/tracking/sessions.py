"""Sessions of training in separate processes, and what they leave."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.processes import REPOSITORY, run_python
from tests.helpers.runs import read_rows

IMAGES_PER_STEP = 64
DEADLINE_SECONDS = 300
API_KEY = "0" * 40
RUN_ID = "same-run"

started: list[subprocess.Popen[str]] = []


def start(environment: dict[str, str], **arguments) -> subprocess.Popen[str]:
    arguments["run_folder"] = str(arguments["run_folder"])
    script = REPOSITORY / "tests/tracking/training_process.py"
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(arguments)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def end(process: subprocess.Popen[str]) -> dict:
    """What the process reports when it is left to go on; its output is under `output`."""
    try:
        stdout, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, stderr
    return {**json.loads(stdout.splitlines()[-1]), "output": stdout + stderr}


def train(environment: dict[str, str], **arguments) -> dict:
    return end(start(environment, **arguments))


def wait_until_paused(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if any(line.startswith('{"logged"') for line in process.stdout):
        return
    pytest.fail("the process ended before it paused")


def go_on(process: subprocess.Popen[str]) -> None:
    """Ends a pause; `end` and `kill` do not need it."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def offline_records(run_folder: Path, kind: str) -> list[dict]:
    """All records of a kind in the offline fragments of a run, as the client itself reads them."""
    records = []
    for fragment in sorted(run_folder.glob("wandb/offline-run-*/*.wandb")):
        output = run_python("-m", "wandb", "leet", "inspect", "--json", str(fragment)).stdout
        parsed = [json.loads(line) for line in output.splitlines()]
        records += [record[kind] for record in parsed if record["type"] == kind]
    return records


def steps(rows: list[dict], name: str = "loss/critic") -> list[int]:
    """The training steps of the rows that hold `name`, in order."""
    return [row["progress/step"] for row in rows if name in row]


def recorded_steps(run_folder: Path, name: str = "loss/critic") -> list[int]:
    return steps(list(read_rows(run_folder / "metrics.jsonl")), name)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 for a process and all that it has started, as when its node dies."""
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.communicate(timeout=DEADLINE_SECONDS)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {DEADLINE_SECONDS} s: {what}")
        time.sleep(0.02)


def synchronize(
    environment: dict[str, str], run_folder: Path, cwd: Path = REPOSITORY, **arguments: Any
) -> dict:
    """Runs `synchronize` in a separate process: its result, or {"error"} and its name."""
    script = REPOSITORY / "tests/tracking/sync_process.py"
    arguments_of_script = (str(script), str(run_folder), json.dumps(arguments))
    return json.loads(run_python(*arguments_of_script, env=environment, cwd=cwd).stdout)
