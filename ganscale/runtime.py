"""Device, ranks and collectives: the only module that uses Accelerate and torch.distributed."""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ganscale.errors import GanscaleError, UserError, is_out_of_memory

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def get_world_size() -> int:
    """1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_batch(tensor: Tensor) -> Tensor:
    """(batch, ...) of every rank -> (world_size * batch, ...) in slot order, detached."""
    if get_world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def all_reduce_sum_with_grad(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, differentiable, also twice.

    Its backward sums the incoming gradients over the ranks, so the gradient of a loss that is
    averaged over the ranks, as DDP averages gradients, is exact.
    """
    if get_world_size() == 1:
        return tensor
    return _AllReduceSum.apply(tensor)


class _AllReduceSum(torch.autograd.Function):
    """torch's own differentiable all-reduce is deprecated, and its functional collectives have no
    gradient in older versions, without an error."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduceSum.apply(grad)


@dataclass
class Runtime:
    """One rank's view of the run."""

    device: torch.device
    rank: int
    world_size: int
    _accelerator: Any
    _control_group: Any  # gloo, for flags and paths: these never wait for the device

    @classmethod
    def start(
        cls, timeout_seconds: float = 600.0, closing_seconds: float = 0.0, *, tf32: bool = False
    ) -> "Runtime":
        """Joins the launcher's process group, or starts as a single rank.

        timeout_seconds: after which a collective fails
        closing_seconds: how much longer `barrier` and other host collectives may take
        tf32: whether GPUs may compute float32 in TF32

        Raises UserError when the world size is not the one that the launcher set: every process
        would train by itself and exit successfully.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        _refuse_other_parallelism()
        # Torch warns of this for every channels-last weight; the copy into the bucket is cheap.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        accelerator = Accelerator(
            # Meters and statistics are summed in float64, which Apple's GPUs do not have.
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # the config decides, not the launcher: see `autocast`
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))],
        )
        accelerator.ddp_handler = DistributedDataParallelKwargs(  # type: ignore[assignment]
            gradient_as_bucket_view=True
        )
        set_tf32(tf32)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        world_size, promised = accelerator.num_processes, launcher_number("WORLD_SIZE", 1)
        if world_size != promised:
            raise UserError(
                f"the launcher promised {promised} ranks, but this process joined a world of "
                f"{world_size}: use one of the config files in launch/ (on CPU, launch/cpu.yaml)"
            )
        group = None
        if world_size > 1:
            timeout = timedelta(seconds=timeout_seconds + closing_seconds)
            group = dist.new_group(backend="gloo", timeout=timeout)
        return cls(accelerator.device, accelerator.process_index, world_size, accelerator, group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node_share(self) -> float:
        """The share of all ranks that run on this machine."""
        return launcher_number("LOCAL_WORLD_SIZE", 1) / self.world_size

    def prepare(self, module: nn.Module, compression: str = "none") -> nn.Module:
        """Moves `module` to the device and, on several ranks, wraps it in DDP.

        compression: "bfloat16" reduces gradients in bfloat16
        """
        prepared = self._accelerator.prepare_model(module)
        if compression == "bfloat16" and self.world_size > 1:
            prepared.register_comm_hook(None, _average_in_bfloat16)
        self.watch_averaging(prepared, False)
        if isinstance(prepared, DistributedDataParallel):
            # Buffers start equal and stay equal, since every rank computes them from the same
            # numbers: broadcasting them at each forward would be a waste.
            prepared.broadcast_buffers = False
            _settle_buckets(prepared)
        return prepared

    def watch_averaging(self, wrapped: nn.Module, watched: bool) -> None:
        """Turns DDP's timing of backward passes on or off. By default DDP times every hundredth
        one, which waits for the device."""
        if isinstance(wrapped, DistributedDataParallel):
            wrapped._set_ddp_runtime_logging_sample_rate(1 if watched else 1 << 30)

    def averaging_seconds(self, wrapped: nn.Module) -> float:
        """From this rank's own gradients to their average over the ranks, in the last backward, if
        that was timed. Waits for the device."""
        if self.world_size == 1:
            return 0.0
        wrapped.logger.set_runtime_stats_and_log()  # type: ignore[union-attr, operator]
        data = wrapped._get_ddp_logging_data()  # type: ignore[operator]
        nanoseconds = data["backward_comm_time"] - data["backward_compute_comm_overlap_time"]
        return max(nanoseconds, 0) / 1e9

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which backward does not average gradients over the ranks."""
        return self._accelerator.no_sync(wrapped)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a small detached tensor over all ranks."""
        return tensor if self.world_size == 1 else self.all_reduce_sum_(tensor.clone())

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums a detached tensor over all ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum of a small tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor := tensor.clone(), op=dist.ReduceOp.MAX)
        return tensor

    def is_equal_everywhere(self, numbers: Tensor) -> bool:
        """Whether all ranks hold the same int64 `numbers`."""
        if self.world_size == 1:
            return True
        # min(x) and min(~x) over the ranks give the smallest and the largest x.
        bounds = torch.stack([numbers, ~numbers])
        dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
        return bool((bounds[0] == ~bounds[1]).all())

    def start_max(self, flag: int) -> Callable[[], int]:
        """Starts an asynchronous maximum of `flag` over the ranks; the returned function waits for
        it. It runs on the host, so neither it nor the device waits for the other."""
        if self.world_size == 1:
            return lambda: flag
        largest, group = torch.tensor([flag]), self._control_group
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None

        def result() -> int:
            work.wait()
            return int(largest)

        return result

    def run_on_main(self, make: Callable[[], T]) -> T:
        """Returns the result of `make` on rank 0, or raises its GanscaleError, on every rank."""
        if self.world_size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except GanscaleError as error:
                outcome[1] = type(error), str(error)
        dist.broadcast_object_list(outcome, src=0, group=self._control_group)
        if outcome[1] is not None:
            kind, message = outcome[1]
            raise kind(message)
        return outcome[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The small picklable `value` of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control_group)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here. At the end of a run, a rank that exits early with a code
        other than 0 makes the launcher kill rank 0, which is still writing."""
        if self.world_size > 1:
            dist.barrier(group=self._control_group)

    def close(self) -> None:
        """Leaves the process group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_communication_error(error: BaseException) -> bool:
    """Whether a collective raised `error` because another rank is gone or late."""
    # For gloo, torch raises plain RuntimeErrors, without a type or code.
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    has_words = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return has_words or isinstance(error, dist.DistError)


def is_device_error(error: BaseException) -> bool:
    """Whether a GPU failed rather than the program. Out of memory is the program's fault."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def is_of_machine(error: BaseException) -> bool:
    """Whether memory, a device or another rank is to blame rather than the code that ran."""
    return is_out_of_memory(error) or is_device_error(error) or is_communication_error(error)


def _settle_buckets(wrapped: nn.Module) -> None:
    """Makes DDP arrange its buckets now, by a backward of zeros, not after the first real one.

    On three ranks or more, a gradient's place in a bucket decides the order of its sum: the first
    step of a resumed run would differ in its last bits from an uninterrupted run's.
    """
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    wrapped.reducer.prepare_for_backward([])  # type: ignore[union-attr, operator]
    torch.stack([0 * parameter.sum() for parameter in parameters]).sum().backward()
    for parameter in parameters:
        parameter.grad = None


def _average_in_bfloat16(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP communication hook; torch's bf16_compress_hook does not support gloo."""
    gradients = bucket.buffer()
    compressed = (gradients / dist.get_world_size()).to(torch.bfloat16)
    work = dist.all_reduce(compressed, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: gradients.copy_(summed.value()[0]))


def launcher_number(name: str, default: int) -> int:
    """A number that the launcher has set in the environment. Raises UserError for anything else,
    and for a world without ranks."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, which is not a whole number")
    if name.endswith("WORLD_SIZE") and int(text) == 0:
        raise UserError(f"{name} is 0, but there is at least one rank")
    return int(text)


def set_tf32(is_allowed: bool) -> None:
    """Whether NVIDIA GPUs may compute float32 in TF32. By default, torch lets convolutions do so,
    and some containers let matrix products do so."""
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed


def keep_freed_memory() -> None:
    """Makes the C library reuse large blocks instead of returning each to the system: page faults
    took a tenth of a float32 step on a CPU, and a tenth of decoding a batch."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        library = ctypes.CDLL(None)
        for parameter, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1)):
            library.mallopt(parameter, value)


def _refuse_other_parallelism() -> None:
    """Raises UserError if the launcher asks for anything but data parallelism."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{name} is not supported: a gradient penalty needs double backward through whole "
                "parameters; launch with plain data parallelism (launch/one_machine.yaml)"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise UserError(
            "the launcher asks for torch.compile, which cannot differentiate a gradient penalty: "
            "launch with --dynamo_backend no and set training.compile=true, which compiles the rest"
        )


def has_cheap_launches(device: torch.device) -> bool:
    """Whether starting an operator takes little time next to computing it. On a GPU, it is what
    small networks wait for."""
    return device.type == "cpu"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The config's mixed precision for the enclosed forward.

    Accelerate would set it for a whole wrapped step, but its penalty has to stay in float32, and
    the unwrapped networks need it, too.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def has_slow_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes bfloat16 in software, as x86 CPUs without AVX-512 do."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # torch without oneDNN, as on Apple's processors
        return False


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For operators that are called below `torch.nn.functional`: which of them autocast casts
    differs between CPUs and GPUs."""
    return torch.autocast(device.type, enabled=False) if _is_autocast(device) else nullcontext()


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a layer with this weight computes, under autocast if that is enabled."""
    if not _is_autocast(weight.device) or weight.dtype == torch.float64:
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)


def _is_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def weights_dtype(precision: str) -> torch.dtype:
    """The dtype of weights and images under a precision of the config."""
    return torch.float64 if precision == "float64" else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is if it is float64."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
