"""A stand-in for training: logs rows as fast as it can, in a process that tests may kill.

Takes one JSON object, prints one JSON object per line: {"logged": step} where it pauses, and what
it found in the end.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from ganscale.tracking import Tracker, setup_logging

IMAGES_PER_STEP = 64


def main(
    run_folder: str,
    mode: str,
    first_step: int,
    last_step: int,
    evaluation_interval: int = 10,
    pause_at: int | None = None,
) -> None:
    setup_logging(Path(run_folder) / "log.txt", rank=0)
    started = time.monotonic()
    tracker = Tracker(
        Path(run_folder),
        project="tests",
        name="a run",
        mode=mode,  # type: ignore[arg-type]
        config={"world_size": first_step},
        run_id="same-run",
        resumed_at=(first_step - 1) * IMAGES_PER_STEP if first_step > 1 else None,
    )
    start_seconds = time.monotonic() - started
    location = tracker.location
    for step in range(first_step, last_step + 1):
        position = {"step": step, "images_seen": step * IMAGES_PER_STEP}
        tracker.log({"loss/critic": 1 / step, "loss/generator": float("nan")}, **position)
        if evaluation_interval and step % evaluation_interval == 0:
            grid = np.full((16, 32, 3), step, np.uint8)
            tracker.log_samples("samples/images", grid, **position)
            tracker.log({"eval/fid": 100.0 / step}, **position)
        if step == pause_at:
            print(json.dumps({"logged": step}), flush=True)
            sys.stdin.readline()
    started = time.monotonic()
    tracker.finish({"final/critic": 0.5}, exit_code=0)
    report = {
        "location": location,
        "degraded": tracker.degraded,
        "start_seconds": start_seconds,
        "finish_seconds": time.monotonic() - started,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
