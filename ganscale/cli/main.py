"""`ganscale COMMAND`: parses the command line, and turns errors into one line each."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# Set before torch is loaded, so that waiting threads soon sleep. By default they spin so long that
# on cores shared with other processes the demo falls from 1,600 to 57 images/s; with this, to 810.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from ganscale import __version__
from ganscale.cli import (
    checkpoint,
    config,
    evaluate,
    plan,
    ready,
    report,
    sample,
    shards,
    sync,
    train,
)
from ganscale.cli.arguments import CommandParser
from ganscale.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    GanscaleError,
    OutOfMemoryError,
    UserError,
    is_out_of_memory,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, one of those in `ganscale.errors`."""
    parser = CommandParser(prog="ganscale", description="Train GANs on clusters.")
    parser.add_argument("--version", action="version", version=f"ganscale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (train, sample, evaluate, report, sync, checkpoint, shards, plan, config, ready):
        module.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        _refuse_other_torch()
        return parsed.run(parsed) or EXIT_DONE
    except GanscaleError as error:
        _print_error(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `ganscale ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        _print_error(f"error: {error}")
        return EXIT_FAILED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"allocate ([\d.]+ [KMGTP]?i?[Bb]\w*)", str(error))
        size = f" (no {asked[1]} are free)" if asked else ""
        _print_error(
            f"error: out of memory{size}: this machine or GPU has too little for "
            "networks and files of this size"
        )
        return OutOfMemoryError.exit_code


def _refuse_other_torch() -> None:
    """pip refuses it, too, but not with --no-deps, and not if torch is replaced afterwards."""
    with contextlib.suppress(PackageNotFoundError):
        installed = version("torch")
        (needed,) = [r for r in map(Requirement, requires("ganscale") or ()) if r.name == "torch"]
        if not needed.specifier.contains(installed, prereleases=True):
            raise UserError(f"torch {installed} is installed, but ganscale needs {needed}")


def _print_error(message: str) -> None:
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    prefix = "" if rank is None else f"rank {rank}: "
    sys.stderr.write(f"{prefix}{message}\n")  # one write: other ranks write there too
    sys.stderr.flush()


def _open_closed_streams() -> None:
    """`ganscale ... >&-`: else a file of the run would get the number of the stream that is closed,
    and whatever is printed there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def entry_point() -> None:
    """The console command."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may not fit into its encoding
    sys.exit(main())
