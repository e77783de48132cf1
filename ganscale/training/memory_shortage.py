"""One sentence for a run that does not fit into memory: what it tried, and what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ganscale.errors import OutOfMemoryError, is_out_of_memory
from ganscale.evaluation.sampling import CHUNK_SIZE
from ganscale.runtime import Runtime
from ganscale.schema import TrainingConfig
from ganscale.supervision.progress import Progress


@contextmanager
def memory_shortage_explained(
    training: TrainingConfig, runtime: Runtime, progress: Progress, group_size: int = 1
) -> Iterator[None]:
    """Raises OutOfMemoryError if the block runs out of memory.

    group_size: images that have to stay in one micro-batch
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where, stage = _describe_memory(runtime.device, error), progress.current.stage
        advice = _advice(training, runtime.world_size, stage, group_size)
        raise OutOfMemoryError(f"{where} ran out of memory in `{stage}`, {advice}") from error


def _describe_memory(device: torch.device, error: Exception) -> str:
    """Which memory, and how much of a GPU's is this rank's: other processes may hold the rest."""
    if device.type != "cuda" or "DefaultCPUAllocator" in str(error):
        return "the machine"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    own = torch.cuda.max_memory_reserved(device) / 2**30
    return f"{device} (this rank took {own:.1f} of its {total:.1f} GiB)"


def _advice(training: TrainingConfig, world_size: int, stage: str, group_size: int) -> str:
    smaller_networks = "use narrower networks or a smaller data.resolution"
    if stage == "building the networks":
        return f"which tries them with a few images: {smaller_networks}"
    if stage == "samples":
        return f"which makes {CHUNK_SIZE} images at a time: {smaller_networks}"
    per_rank = training.global_batch_size // world_size
    batch = f"with {per_rank} images per rank"
    if training.accumulate > 1:
        batch += f" in {training.accumulate} micro-batches"
    larger = range(training.accumulate + 1, per_rank + 1)
    parts = next((count for count in larger if per_rank % (count * group_size) == 0), None)
    if parts is None:
        return f"{batch}: {smaller_networks}"
    return (
        f"{batch}: continue with training.accumulate={parts}, for {per_rank // parts} images at a "
        "time, or a smaller training.global_batch_size, and with resume.allow=[training]"
    )
