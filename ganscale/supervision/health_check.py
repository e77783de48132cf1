"""A check of every device, and of the network between the ranks, before a run starts.

A GPU that hangs, fails or crawls is found in seconds. In the training, the others would first wait
for it as long as a checkpoint or a slow disk may take.
"""

import statistics
import time

import torch

from ganscale.errors import DeviceError
from ganscale.runtime import Runtime

_SLOW_FACTOR = 5
_SUMMED_ELEMENTS = 1 << 20


def check_health(runtime: Runtime) -> None:
    """Collective. Raises DeviceError on a rank whose device computes wrongly, or far slower than
    those of most ranks; does not return if a device or the network hangs."""
    seconds = _exercise(runtime.device)
    median = statistics.median(runtime.all_gather_object(seconds))
    # The cores of a machine are often shared with other programs, its GPUs hardly ever.
    is_cuda = runtime.device.type == "cuda"
    if seconds > _SLOW_FACTOR * median + (0.1 if is_cuda else 10.0):
        raise DeviceError(
            f"its device ({runtime.device}) took {seconds:.2f} s to compute what takes most ranks "
            f"{median:.2f} s"
        )
    total = runtime.all_reduce_sum(torch.ones(_SUMMED_ELEMENTS, device=runtime.device))
    if not torch.equal(total, torch.full_like(total, runtime.world_size)):
        raise DeviceError("a sum over all ranks arrived with errors")


def _exercise(device: torch.device) -> float:
    """The seconds for some matrix products whose results are known."""
    size, count = (4096, 10) if device.type == "cuda" else (128, 1)
    ones, expected = (torch.full((size, size), value, device=device) for value in (1.0, size))
    seconds = 0.0
    for repetitions in (1, count):  # the first one loads the library
        started = time.perf_counter()
        product = ones
        for _ in range(repetitions):
            product = ones @ ones
        is_right = torch.equal(product, expected)  # waits for the device
        seconds = time.perf_counter() - started
        if not is_right:
            raise DeviceError(f"its device ({device}) computes wrongly")
    return seconds
