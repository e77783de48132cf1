"""`ganscale sync RUN...`: sends W&B what it lacks of runs."""

import argparse
import sys
from contextlib import closing
from pathlib import Path

from ganscale.cli.arguments import finite_float
from ganscale.errors import EXIT_DONE, GanscaleError, UserError
from ganscale.run_folder import RunFolder, located
from ganscale.run_identity import own_identity, visible_original


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sync",
        help="send W&B what it lacks of a run",
        description="Sends Weights & Biases the rows, samples and alerts of a run that it does not "
        "have: of an offline run, or one whose process or server died.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    add("--project", help="send to this project instead of the run's (log.project)")
    add(
        "--timeout",
        type=finite_float,
        default=300,
        metavar="SECONDS",
        help="of uploads (default: 300)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    failures: list[int] = []
    for path in arguments.runs:
        try:
            _synchronize(path, arguments.project, arguments.timeout)
        except GanscaleError as error:
            sys.stderr.write(f"error: {error}\n")
            failures.append(error.exit_code)
    # Failures that a second attempt cannot fix have lower codes than those it may fix.
    return min(failures, default=EXIT_DONE)


def _synchronize(path: Path, project: str | None, timeout_seconds: float) -> None:
    from ganscale.config import load_stored
    from ganscale.tracking.sync import synchronize
    from ganscale.tracking.wandb_identity import artifacts_to_upload, wandb_identity

    folder = RunFolder(path)
    folder.check_exists()
    config = load_stored(folder.config)
    config.run = located(config.run, folder)
    _give_copy_own_id(folder)
    if project:
        config.log.project = project
    identity = wandb_identity(config, folder)
    checkpoints = artifacts_to_upload(folder.checkpoints, config)
    result = synchronize(folder, identity, checkpoints, timeout_seconds)
    print(f"{path}: W&B has all {result.rows:,} rows ({result.sent:,} sent now): {result.location}")
    if result.superseded:
        print(
            f"{path}: for {result.superseded:,} of them, W&B keeps the rows from before the "
            "settings were changed (resume.allow). With --project, another project gets the rows "
            "of the record"
        )


def _give_copy_own_id(folder: RunFolder) -> None:
    """Only if the original can be seen from here: a copy may also have been made to be sent."""
    identity = folder.read_identity()
    if (original := visible_original(folder, identity)) is None:
        return
    with closing(folder):
        if not folder.lock():
            raise UserError(f"the run in {folder.path} is training: W&B gets its rows")
        own, sentence = own_identity(folder, identity, original)
        folder.write_identity(own)
        print(sentence)
