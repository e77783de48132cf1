"""A stand-in for training: logs rows as fast as it can, in a process that tests may kill.

Takes one JSON object, prints one JSON object per line: {"logged": step} where it pauses, and
the outcome at the end.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ganscale.run_folder import RunFolder
from ganscale.tracking.console import setup_logging
from ganscale.tracking.tracker import Tracker
from ganscale.tracking.uploader_messages import Checkpoint, WandbIdentity

IMAGES_PER_STEP = 64


def main(
    run_folder: str,
    mode: str,
    first_step: int,
    last_step: int,
    evaluation_interval: int = 10,
    pause_at: int = 0,
    pause_again_at: int = 0,
    checkpoints: list[dict] | None = None,
    finish_seconds: float = 30.0,
    project: str = "tests",
) -> None:
    setup_logging(Path(run_folder) / "log.txt", rank=0)
    started = time.monotonic()
    tracker = Tracker(
        RunFolder(Path(run_folder)),
        WandbIdentity("same-run", "a run", {"world_size": first_step}, {"project": project}),
        mode,  # type: ignore[arg-type]
        (first_step - 1) * IMAGES_PER_STEP if first_step > 1 else None,
        retry_seconds=2.0,
        finish_seconds=finish_seconds,
    )
    start_seconds = time.monotonic() - started
    for step in range(first_step, last_step + 1):
        position = {"step": step, "images_seen": step * IMAGES_PER_STEP}
        tracker.log({"loss/critic": 1 / step, "loss/generator": float("nan")}, **position)
        if evaluation_interval and step % evaluation_interval == 0:
            path = Path(run_folder) / "samples" / f"images-{step:09d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((16, 32, 3), step, np.uint8)).save(path)
            tracker.log({"samples/images": path}, **position)
            tracker.log({"logits/wasserstein": 100.0 / step}, **position)
        if step in (pause_at, pause_again_at):
            print(json.dumps({"logged": step}), flush=True)
            sys.stdin.readline()
    started = time.monotonic()
    uploads = [Checkpoint(**fields) for fields in checkpoints or []]
    tracker.finish({"final/critic": 0.5}, exit_code=0, checkpoints=uploads)
    outcome = {
        "location": tracker.location,
        "start_seconds": start_seconds,
        "finish_seconds": time.monotonic() - started,
    }
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
