"""The ways a run ends, and what its exit code tells the shell and the batch script."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells say it of Ctrl-C
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, start it again


class UserError(Exception):
    """A mistake of the user's: shown as one sentence without a traceback, exit code 2."""


class UnavailableError(Exception):
    """A disk or network kept failing for longer than the config bears: the run itself is well, and
    the same command continues it (EXIT_REQUEUE)."""


class ReplicaError(Exception):
    """The weights of two ranks are not the same bits; nothing was saved."""


class NonFiniteError(Exception):
    """A loss or gradient became NaN or infinite; the last good state is in a checkpoint."""
