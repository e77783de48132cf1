"""`ganscale train CONFIG... key=value...`: starts a run, or continues it."""

import argparse
import os

from ganscale.errors import EXIT_DONE


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="start a run, or continue it with the same command",
        description="Trains with the settings of the config files and overrides. The same command "
        "continues the run from its newest checkpoint.",
    )
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="say whether everything fits, and do not train"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return _dry_run(arguments) if arguments.dry_run else _train(arguments)


def _dry_run(arguments: argparse.Namespace) -> int:
    from ganscale.config import resolve
    from ganscale.run_folder import in_its_folder
    from ganscale.training.start import try_start

    lines = try_start(in_its_folder(resolve(arguments.settings)))
    if os.environ.get("RANK", "0") == "0":
        print("\n".join([*lines, "everything fits; nothing was written"]))
    return EXIT_DONE


def _train(arguments: argparse.Namespace) -> int:
    from ganscale.supervision.signals import StopRequest

    stop = StopRequest.on_signals()  # before torch is imported, which starts threads

    from ganscale.config import resolve, settings_digest
    from ganscale.run_folder import in_its_folder
    from ganscale.runtime import Runtime
    from ganscale.supervision.failure_attribution import Failure
    from ganscale.supervision.health_check import check_health
    from ganscale.supervision.job_history import note_bad_host, note_ended
    from ganscale.supervision.placement import Placement
    from ganscale.supervision.progress import Progress
    from ganscale.supervision.watchdog import Watchdog
    from ganscale.tracking.console import log_users_traceback
    from ganscale.training.trainer import CLOSING_SECONDS, Trainer

    placement, progress = Placement.from_environment(), Progress()
    try:
        config = (resolved := in_its_folder(resolve(arguments.settings))).config
        placement.run = f"{config.run.name:.60} (settings {settings_digest(config)})"
        limit = config.runtime.timeout_seconds
        # These two stages have limits of their own.
        progress.mark("start", config.runtime.join_timeout_seconds - limit)
        with Watchdog(placement, progress, config.runtime, stop):
            # Collectives time out after the watchdog, which can name the rank to blame.
            timeout = 1.5 * limit + config.data.retry_seconds
            runtime = Runtime.start(timeout, CLOSING_SECONDS, tf32=config.training.tf32)
            if (seconds := config.runtime.health_check_seconds) > 0:
                progress.mark("health check", seconds - limit)
                check_health(runtime)
            trainer = Trainer(resolved, runtime, stop, progress)
            exit_code = trainer.run()
            runtime.barrier()
        runtime.close()
    except Exception as error:
        if placement.is_main:
            log_users_traceback(progress.run_folder, error)
            failure = Failure.from_error(error)
            if failure.is_of_device:
                note_bad_host(placement.host)
            note_ended(failure.exit_code, failure.message)
        raise
    if placement.is_main:
        how = "done" if exit_code == EXIT_DONE else "stopped"
        note_ended(exit_code, f"{how} at {trainer.state.images_seen:,} images")
    return exit_code
