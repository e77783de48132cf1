"""`ganscale train CONFIG... key=value...`: starts a run, or continues it."""

import argparse
import os


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="start a run, or continue it by the same command",
        description="Trains as the config files and overrides say. The same command, given again, "
        "continues the run from its newest checkpoint.",
    )
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ganscale.supervision.signals import StopRequest

    stop = StopRequest.listening()  # before torch is imported, which starts threads

    from ganscale.config import resolve
    from ganscale.errors import EXIT_DONE
    from ganscale.runtime import Runtime
    from ganscale.supervision.job_history import note_ended
    from ganscale.supervision.watchdog import Progress, Watchdog, exit_code_of, sentence_of
    from ganscale.training.trainer import CLOSING_SECONDS, Trainer

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = (resolved := resolve(arguments.settings)).config
        limit = config.runtime.timeout_seconds
        # Longer than the watchdog waits: it says which rank is to blame.
        runtime = Runtime.start(1.5 * limit + config.data.retry_seconds, CLOSING_SECONDS)
        try:
            progress = Progress()
            watchdog = Watchdog(runtime, progress, limit, stop)
            try:
                trainer = Trainer(resolved, runtime, stop, progress)
                exit_code = trainer.run()
                runtime.barrier()
            except BaseException as error:
                watchdog.failed(error)
                raise
            watchdog.close()
        finally:
            runtime.close()
    except Exception as error:
        if is_main:
            note_ended(exit_code_of(error), sentence_of(error))
        raise
    if is_main:
        how = "done" if exit_code == EXIT_DONE else "stopped"
        note_ended(exit_code, f"{how} at {trainer.state.images_seen:,} images")
    return exit_code
