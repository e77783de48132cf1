"""`ganscale sync RUN...`: W&B gets what it lacks of runs."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sync",
        help="send W&B what it lacks of a run",
        description="Sends Weights & Biases the rows, pictures and alerts of a run that it does "
        "not have: those of an offline run, or of one whose process or server died. A second time, "
        "there is nothing to send.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--project", help="another project than the run's own (log.project)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="for uploads that do not end (default: %(default)g)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ganscale.config import load_stored
    from ganscale.errors import EXIT_DONE, UserError
    from ganscale.tracking.sync import synchronize
    from ganscale.training.in_wandb import identity_of, kept_in_wandb
    from ganscale.training.run_folder import RunFolder

    for path in arguments.runs:
        folder = RunFolder(path)
        if not folder.config.exists() or not folder.identity.exists():
            raise UserError(f"{path} is not a run folder: it has no {folder.config.name}")
        config = load_stored(folder.config)
        if arguments.project:
            config.log.project = arguments.project
        done = synchronize(
            path,
            identity_of(config, folder),
            kept_in_wandb(folder.checkpoints, config),
            arguments.timeout,
        )
        print(f"{path}: W&B has all {done.rows:,} rows ({done.sent:,} sent now): {done.location}")
    return EXIT_DONE
