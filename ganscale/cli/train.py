"""`ganscale train CONFIG... key=value...`: starts a run, or continues it."""

import argparse


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
    from ganscale.config import resolve
    from ganscale.errors import UnavailableError
    from ganscale.runtime import Runtime
    from ganscale.training.signals import mark_stopped
    from ganscale.training.trainer import Trainer

    resolved = resolve(arguments.settings)
    runtime = Runtime.start(resolved.config.runtime.timeout_seconds)
    try:
        exit_code = Trainer(resolved, runtime).run()
        runtime.wait_for_all()
        return exit_code
    except UnavailableError as error:
        mark_stopped(str(error))
        raise
    finally:
        runtime.close()
