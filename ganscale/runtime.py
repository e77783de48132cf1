"""Where the run is: device, ranks and collectives. The sole place that knows Accelerate and
torch.distributed; everything else asks this module, and reads the same on one rank and on many.
"""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ganscale.errors import UnavailableError, UserError

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def get_world_size() -> int:
    """The number of ranks of this run; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """This process's number among the ranks."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_batch(tensor: Tensor) -> Tensor:
    """(batch, ...) of every rank -> (world_size * batch, ...) in slot order, without gradient."""
    if get_world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def all_reduce_sum_with_grad(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, differentiable (twice, too).

    Its backward sums the incoming gradients over the ranks, so a loss that is averaged over the
    ranks, as DDP averages gradients, is differentiated exactly.
    """
    if get_world_size() == 1:
        return tensor
    return funcol.all_reduce(tensor, "sum", dist.group.WORLD)  # type: ignore[arg-type]


@dataclass
class Runtime:
    """One rank's view of the run."""

    device: torch.device
    rank: int
    world_size: int
    _accelerator: Any
    _control_group: Any  # gloo: flags and paths travel beside the gradients, never on the device

    @classmethod
    def start(cls, timeout_seconds: float = 600.0, closing_seconds: float = 0.0) -> "Runtime":
        """Joins the process group that the launcher announced, or starts alone.

        timeout_seconds: after which a collective fails
        closing_seconds: how much longer `barrier` and its like may take

        Raises UserError when the world is not the one the launcher promised: then every process
        would train alone and exit successfully.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        @dataclass
        class DDPSettings(DistributedDataParallelKwargs):
            """With a setting that torch has and Accelerate does not name."""

            forward_sync_buffers: bool = True

        _refuse_other_parallelism()
        # A hint about speed for every channels-last weight; its copy into DDP's bucket is cheap.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        accelerator = Accelerator(
            # Apple's devices have no float64, in which meters and statistics are summed.
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # the config's, not the launcher's: see `autocast`
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))],
        )
        # Made equal once, buffers stay equal, because every rank computes them from the same
        # numbers: broadcasting them at each forward would only cost.
        accelerator.ddp_handler = DDPSettings(  # type: ignore[assignment]
            gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        promised = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes != promised:
            raise UserError(
                f"the launcher promised {promised} ranks, but this process joined a world of "
                f"{accelerator.num_processes}: use one of the config files in launch/ "
                "(on CPU, launch/cpu.yaml)"
            )
        group = None
        if accelerator.num_processes > 1:
            timeout = timedelta(seconds=timeout_seconds + closing_seconds)
            group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            _accelerator=accelerator,
            _control_group=group,
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node_share(self) -> float:
        """The share of all ranks that this machine has."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / self.world_size

    def prepare(self, module: nn.Module, compression: str = "none") -> nn.Module:
        """Moves `module` to the device and, on several ranks, wraps it in DDP.

        compression: "bfloat16" has gradients travel in it
        """
        prepared = self._accelerator.prepare_model(module)
        if compression == "bfloat16" and self.world_size > 1:
            prepared.register_comm_hook(None, _average_in_bfloat16)
        self.watch_averaging(prepared, False)
        if self.world_size > 1:
            _settle_buckets(prepared)
        return prepared

    def watch_averaging(self, wrapped: nn.Module, watched: bool) -> None:
        """Whether DDP notes the times of its next backward passes, which by itself it does at every
        hundredth, waiting for the device."""
        if isinstance(wrapped, DistributedDataParallel):
            wrapped._set_ddp_runtime_logging_sample_rate(1 if watched else 1 << 30)

    def seconds_of_averaging(self, wrapped: nn.Module) -> float:
        """From the end of this rank's own gradients to the end of their averaging over the ranks,
        in the last backward, if it was watched. Waits for the device."""
        if self.world_size == 1:
            return 0.0
        wrapped.logger.set_runtime_stats_and_log()  # type: ignore[union-attr, operator]
        data = wrapped._get_ddp_logging_data()  # type: ignore[operator]
        nanoseconds = data["backward_comm_time"] - data["backward_compute_comm_overlap_time"]
        return max(nanoseconds, 0) / 1e9

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Inside, backward leaves this rank's gradients unsynchronized (accumulation)."""
        return self._accelerator.no_sync(wrapped)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a small detached tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor := tensor.clone())
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The largest of each element of a small tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor := tensor.clone(), op=dist.ReduceOp.MAX)
        return tensor

    def is_equal_everywhere(self, numbers: Tensor) -> bool:
        """Whether all ranks hold the same int64 `numbers`."""
        if self.world_size == 1:
            return True
        # The smallest of x and of ~x over the ranks are the smallest and the largest x.
        bounds = torch.stack([numbers, ~numbers])
        dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
        return bool((bounds[0] == ~bounds[1]).all())

    def start_max(self, flag: int) -> Callable[[], int]:
        """Begins to agree on the largest `flag` of any rank; the returned function waits for it.

        It runs on the host beside the step, so it neither waits for the device nor holds it up.
        """
        if self.world_size == 1:
            return lambda: flag
        vote = torch.tensor([flag])
        work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._control_group, async_op=True)

        assert work is not None

        def result() -> int:
            work.wait()
            return int(vote)

        return result

    def run_on_main(self, make: Callable[[], T]) -> T:
        """What `make()` returns on rank 0, on every rank; its UserError or
        UnavailableError is raised on every rank."""
        if self.world_size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except (UserError, UnavailableError) as error:
                outcome[1] = type(error), str(error)
        dist.broadcast_object_list(outcome, src=0, group=self._control_group)
        if outcome[1] is not None:
            kind, message = outcome[1]
            raise kind(message)
        return outcome[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's small `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control_group)
        return values

    def barrier(self) -> None:
        """Until every rank is here: a launcher ends the others once one of them has left with a
        code that is not 0, and rank 0 has most to write at the end."""
        if self.world_size > 1:
            dist.barrier(group=self._control_group)

    def close(self) -> None:
        """Leaves the process group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_communication_error(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when another rank is gone or late."""
    # For gloo, torch raises plain RuntimeErrors: without a type or code, only the words are left.
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def is_device_error(error: BaseException) -> bool:
    """Whether a GPU, and not the program, seems to be at fault; out of memory is the program's."""
    return isinstance(error, torch.AcceleratorError)


def _settle_buckets(wrapped: nn.Module) -> None:
    """Has DDP arrange its buckets now, by a backward of zeros, and not after the first real one.

    In which order a gradient is summed over more than two ranks depends on its place in a bucket:
    the first step of a resumed run would differ in its last bits from that of the undisturbed one.
    """
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    wrapped.reducer.prepare_for_backward([])  # type: ignore[union-attr, operator]
    torch.stack([0 * parameter.sum() for parameter in parameters]).sum().backward()
    for parameter in parameters:
        parameter.grad = None


def _average_in_bfloat16(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP hook. Ours, because torch's takes no gloo."""
    gradients = bucket.buffer()
    compressed = (gradients / dist.get_world_size()).to(torch.bfloat16)
    work = dist.all_reduce(compressed, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: gradients.copy_(summed.value()[0]))


def keep_freed_memory() -> None:
    """Has the C library reuse large blocks instead of returning each to the system.

    Else every large tensor is made of fresh pages, whose faults were a tenth of a float32 step on a
    CPU, and of decoding a batch.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        library = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1)):
            library.mallopt(parameter, value)


def _refuse_other_parallelism() -> None:
    """Raises UserError for what the launcher's environment asks for beside data parallelism."""
    asked = [
        name
        for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes")
    ]
    if asked:
        raise UserError(
            f"{asked[0]} is not supported: a gradient penalty needs double backward through whole "
            "parameters; launch with plain data parallelism (launch/one_machine.yaml)"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise UserError(
            "the launcher asks for torch.compile, which cannot differentiate a gradient penalty: "
            "launch with --dynamo_backend no and set training.compile=true, which leaves it out"
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The mixed precision of the config for the enclosed forward.

    Ours rather than Accelerate's, because it patches `forward` from outside: the penalty, inside,
    has to stay in float32, and the unwrapped networks have to run in the same precision.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def weights_dtype(precision: str) -> torch.dtype:
    """What weights and images are stored in under a precision of the config."""
    return torch.float64 if precision == "float64" else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
