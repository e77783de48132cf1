"""Real ranks on this machine: one process with one thread each, over gloo."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def run_ranks(
    function: str,
    folder: Path,
    world_size: int,
    seconds: float,
    environment: Mapping[str, str] = {},
) -> None:
    """Calls `package.module:function` with `folder` on every rank, and waits for all.

    Ranks get the environment of a launcher, unless there is only one, and `environment`, without
    which they see no GPU. Their output goes to
    `rankN.txt` in the folder. Raises RuntimeError, with the end of its output, as soon as a rank
    fails, and after `seconds`; the other ranks are then killed.
    """
    module, _, name = function.partition(":")
    program = f"import sys, pathlib, {module} as m; m.{name}(pathlib.Path(sys.argv[1]))"
    port = str(free_port())
    logs = [folder / f"rank{rank}.txt" for rank in range(world_size)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", program, str(folder)],
                        cwd=REPOSITORY,
                        env=os.environ | environment_of(rank, world_size, port) | {**environment},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        _wait(processes, logs, seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environment_of(rank: int, world_size: int, port: str) -> dict[str, str]:
    """The environment that a launcher gives a rank; a single rank gets none."""
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if world_size == 1:
        return common
    return common | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    codes: list[int | None] = [None]
    while None in codes:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                output = logs[rank].read_text(errors="replace")[-4000:]
                raise RuntimeError(f"rank {rank} of {len(codes)} ended with {code}:\n{output}")
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            raise RuntimeError(
                f"ranks {running} of {len(codes)} are still running after {seconds} s"
            )
        time.sleep(0.02)


def free_port() -> int:
    """Below the range of ephemeral ports, which another process might get in between."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
