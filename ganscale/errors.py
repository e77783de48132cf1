"""The ways a run ends, and what its exit code tells the shell and the batch script."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, start it again
EXIT_RANK_LOST = 76  # a rank died or hangs: the same command continues from the newest checkpoint
EXIT_INTERRUPTED = 130  # as shells say it of Ctrl-C


class GanscaleError(Exception):
    """Ends a command: its message is shown as one sentence, without a traceback."""

    exit_code = EXIT_FAILED


class UserError(GanscaleError):
    """A mistake of the user's."""

    exit_code = EXIT_USER_ERROR


class UnavailableError(GanscaleError):
    """A disk or network kept failing for longer than the config bears: the run itself is well, and
    the same command continues it."""

    exit_code = EXIT_REQUEUE


class ReplicaError(GanscaleError):
    """The weights of two ranks are not the same bits; nothing was saved."""


class NonFiniteError(GanscaleError):
    """A loss or gradient became NaN or infinite; the last good state is in a checkpoint."""
