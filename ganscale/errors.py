"""Exit codes, for the shell and the batch script, and the errors that end a command."""

import sys

from ganscale.terminal import printable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run is fine, start it again
EXIT_RANK_LOST = 76  # a rank died or hung: the same command continues from the newest checkpoint
EXIT_INTERRUPTED = 130  # as shells report Ctrl-C


class GanscaleError(Exception):
    """Ends a command; only its message is printed, without a traceback."""

    exit_code = EXIT_FAILED

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(GanscaleError):
    """The user made a mistake."""

    exit_code = EXIT_USER_ERROR


class UserCodeError(UserError):
    """The user's own code, such as a network, raised an exception: this error's cause."""


class UnavailableError(GanscaleError):
    """A disk or network failed for longer than the config allows: the same command continues."""

    exit_code = EXIT_REQUEUE


class DeviceError(GanscaleError):
    """A GPU or its machine is to blame: the same command continues, best on another machine."""

    exit_code = EXIT_RANK_LOST


class ReplicaError(GanscaleError):
    """The weights of two ranks differ; nothing was saved."""


class OutOfMemoryError(GanscaleError):
    """A device or the host has too little memory: other settings would need less."""


class NonFiniteError(GanscaleError):
    """A loss or gradient became NaN or infinite; the last good state is in a checkpoint."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # not imported here, since that takes seconds
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # Only torch's allocator of devices has a type of its own.
    words = (
        "DefaultCPUAllocator",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "MPS backend out of memory",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
