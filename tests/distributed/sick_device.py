"""`launch/train.py` with a device that is sick on one rank, set by the environment variable
SICK=RANK:hang, RANK:fail or RANK:slow. A stand-in, since no GPU can be made to fail on request."""

import os
import runpy
import time
from pathlib import Path

import torch

from ganscale.supervision import health_check


def exercise(device: torch.device) -> float:
    rank, _, how = os.environ["SICK"].partition(":")
    if rank != os.environ.get("RANK", "0"):
        return 0.1
    if how == "hang":
        time.sleep(1e6)
    if how == "fail":
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    return 100.0


health_check._exercise = exercise
train = Path(__file__).parent.parent.parent / "launch" / "train.py"
runpy.run_path(str(train), run_name="__main__")
