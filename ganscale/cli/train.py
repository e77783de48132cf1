"""`ganscale train CONFIG... key=value...`: starts a run, or continues it."""

import argparse
import os
from contextlib import closing

from ganscale.errors import EXIT_DONE


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="start a run, or continue it with the same command",
        description="Trains with the settings of the config files and overrides. The same command "
        "continues the run from its newest checkpoint.",
    )
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ganscale.supervision.signals import StopRequest

    stop = StopRequest.on_signals()  # before torch is imported, which starts threads

    from ganscale.config import resolve
    from ganscale.run_folder import in_its_folder
    from ganscale.runtime import Runtime
    from ganscale.supervision.failure_attribution import Failure
    from ganscale.supervision.job_history import note_ended
    from ganscale.supervision.progress import Progress
    from ganscale.supervision.watchdog import Watchdog
    from ganscale.training.trainer import CLOSING_SECONDS, Trainer

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = (resolved := in_its_folder(resolve(arguments.settings))).config
        limit = config.runtime.timeout_seconds
        progress = Progress()
        # Collectives time out after the watchdog, which can name the rank to blame.
        timeout = 1.5 * limit + config.data.retry_seconds
        with (
            closing(Runtime.start(timeout, CLOSING_SECONDS)) as runtime,
            Watchdog(runtime, progress, limit, stop),
        ):
            trainer = Trainer(resolved, runtime, stop, progress)
            exit_code = trainer.run()
            runtime.barrier()
    except Exception as error:
        if is_main:
            failure = Failure.from_error(error)
            note_ended(failure.exit_code, failure.message)
        raise
    if is_main:
        how = "done" if exit_code == EXIT_DONE else "stopped"
        note_ended(exit_code, f"{how} at {trainer.state.images_seen:,} images")
    return exit_code
