"""A rank's device memory: its peak in a cycle, and the batches that fit a GPU.

The peak is that of the tensors that exist at the same time, found by running the cycle on the meta
device: weights, gradients, optimizers' states, the EMA, DDP's buckets, two cycles' batches,
activations, and the second graph of a penalty. Not known are what a kernel needs while it runs,
such as cuDNN's workspaces, and what `training.compile` changes.
"""

import math
from bisect import bisect_right
from dataclasses import replace
from functools import cached_property

import torch

from ganscale.data.batch import Batch
from ganscale.errors import UserError
from ganscale.networks.batch_groups import batch_group_size
from ganscale.objectives.objective import Objective
from ganscale.plan.live_bytes import LiveBytes
from ganscale.plan.meta_device import META, MetaRuntime, meta_device
from ganscale.plan.networks import planned_networks
from ganscale.plan.sections import DeviceMemory, readable_bytes
from ganscale.schedules import ends
from ganscale.schema import Config
from ganscale.tensor_cache import clear_cached_tensors
from ganscale.training.cycle import Cycle, makes_fakes_together
from ganscale.training.data_flow import batches_per_cycle, has_own_real_batch
from ganscale.training.device_batch import draws_ahead
from ganscale.training.state import TrainingState

USUAL_GPUS = (16, 24, 40, 80, 141)  # GB


def usable_bytes(gpu_gigabytes: int) -> int:
    """What a GPU of that many 10^9 bytes has for tensors. A tenth is left for workspaces and gaps
    between blocks, and 10^9 bytes for the context and NCCL: assumptions, not measurements."""
    return max(0, gpu_gigabytes * 900_000_000 - 1_000_000_000)


class MemoryPlanner:
    """Plans the memory of one run with other batches and other GPUs."""

    def __init__(self, config: Config, objective: Objective, num_classes: int, ranks: int) -> None:
        self._config, self._objective = config, objective
        self._num_classes, self._ranks = num_classes, ranks
        self._images = config.training.global_batch_size // ranks
        self._accumulate = config.training.accumulate
        self._group_size = batch_group_size(*planned_networks(config, num_classes))
        self._peaks: dict[tuple[int, int], int] = {}

    def section(self, gpu_gigabytes: int | None) -> DeviceMemory:
        """gpu_gigabytes: of a GPU that the run has to fit; None describes several usual ones

        Raises UserError, with what would fit, if the run does not; and whatever a network raises
        that cannot run on the meta device.
        """
        peak, images = self.peak(self._images), self._images
        if gpu_gigabytes is not None and peak > usable_bytes(gpu_gigabytes):
            raise UserError(self._refusal(gpu_gigabytes))
        gpus = USUAL_GPUS if gpu_gigabytes is None else (gpu_gigabytes,)
        return DeviceMemory(
            peak_bytes=peak,
            bytes_per_image=(self.peak(2 * images) - peak) // images,
            peak_bytes_with_accumulate={
                count: self.peak(images, count) for count in self._more_micro_batches[:2]
            },
            images_per_rank_on=dict(
                zip((f"{each} GB" for each in gpus), self.largest_batches(gpus), strict=True)
            ),
        )

    def largest_batches(self, gpus: tuple[int, ...]) -> list[int]:
        """The most images per rank that fit each GPU: as many whole groups in each micro-batch.

        Memory at any one moment is linear in the batch, so the peak, their maximum, is convex:
        between two batches, a straight line is nowhere below it, but for rounding.
        """
        limits, unit = [usable_bytes(each) for each in gpus], self._accumulate * self._group_size
        batches = sorted({unit, self._images, 2 * self._images})
        while (missing := max(limits) - self.peak(batches[-1])) >= 0:
            *_, smaller, larger = batches
            rise = (self.peak(larger) - self.peak(smaller)) / (larger - smaller)
            more = max(larger, math.ceil(1.01 * missing / rise)) if rise > 0 else larger
            batches.append(larger + -(-more // unit) * unit)
        return [self._largest_batch(limit, batches) for limit in limits]

    def _largest_batch(self, limit: int, batches: list[int]) -> int:
        """batches: ascending, of which the last does not fit"""
        above = bisect_right(batches, limit, key=self.peak)
        if above == 0:
            return 0
        smaller, larger = batches[above - 1], batches[above]
        rise = (self.peak(larger) - self.peak(smaller)) / (larger - smaller)
        images = smaller + int((limit - self.peak(smaller)) / rise)
        unit = self._accumulate * self._group_size
        return images // unit * unit

    def peak(self, images: int, accumulate: int | None = None) -> int:
        """In bytes, with `images` per rank and critic step; accumulate: None as in the config"""
        key = images, accumulate or self._accumulate
        if key not in self._peaks:
            training = replace(
                self._config.training,
                accumulate=key[1],
                global_batch_size=self._ranks * images,
                compile=False,
            )
            config = replace(self._config, training=training)
            self._peaks[key] = peak_bytes(config, self._objective, self._num_classes, self._ranks)
        return self._peaks[key]

    @cached_property
    def _more_micro_batches(self) -> list[int]:
        """Larger values of `training.accumulate` that divide the images of a rank."""
        counts = range(2 * self._accumulate, self._images + 1, self._accumulate)
        return [count for count in counts if self._images % (count * self._group_size) == 0]

    def _refusal(self, gpu_gigabytes: int) -> str:
        usable, choices = usable_bytes(gpu_gigabytes), []
        (images,) = self.largest_batches((gpu_gigabytes,))
        if images:
            choices.append(f"training.global_batch_size={images * self._ranks} or less")
        counts = (n for n in self._more_micro_batches if self.peak(self._images, n) <= usable)
        if count := next(counts, None):
            choices.append(f"training.accumulate={count}")
        advice = " or ".join(choices) or "smaller networks"
        return (
            f"a rank needs {readable_bytes(self.peak(self._images))} of device memory, but a GPU "
            f"of {gpu_gigabytes} GB has {readable_bytes(usable)} for it, as 10 % and 1 GB stay "
            f"free: choose {advice}"
        )


def peak_bytes(config: Config, objective: Objective, num_classes: int, ranks: int) -> int:
    """The peak of a rank in a cycle, not for `training.compile`."""
    # Augmentation may begin after the first cycle.
    probability = max(ends(config.augmentation.probability))
    augmentation = replace(config.augmentation, probability=probability)
    config = replace(config, augmentation=augmentation)
    runtime, n_critic = MetaRuntime(ranks), config.objective.n_critic
    clear_cached_tensors()  # those of an earlier plan would not be counted
    with LiveBytes() as live, meta_device(ranks):
        generator, critic = (n.to(META) for n in planned_networks(config, num_classes))
        state = TrainingState(config, objective, runtime, num_classes, (generator, critic))
        live.add(t for n in (generator, critic, state.ema) for t in (*n.parameters(), *n.buffers()))
        runtime.world_size = ranks
        cycle = Cycle(config, objective, runtime, state)
        # Those of this cycle and of the next.
        batches = [_batch(config, objective, ranks) for _ in range(2 * batches_per_cycle(config))]
        # The first cycle makes the optimizers' states. Two critic steps need as much as more, but
        # where the fakes of all are made together.
        together = makes_fakes_together(config, generator, ranks, META)
        for steps in (1, n_critic if together else min(2, n_critic)):
            state.images_seen = state.steps = 0  # all penalties are due
            cycle.run(batches[: steps + has_own_real_batch(config)], is_logged=True)
    return live.peak


def _batch(config: Config, objective: Objective, ranks: int) -> Batch:
    """What a rank's loader would send to the device."""
    images, size = config.training.global_batch_size // ranks, config.data.size
    values = images * sum(draw.columns for draw in draws_ahead(config, objective))
    return Batch(
        torch.empty(images, *size, config.data.channels, dtype=torch.uint8, device=META),
        labels=torch.empty(images, dtype=torch.int64, device=META),
        slots=torch.empty(images, dtype=torch.int64, device=META),
        draws=torch.empty(values, device=META),
    )
