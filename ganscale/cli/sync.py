"""`ganscale sync RUN...`: W&B gets what it lacks of runs."""

import argparse
import sys
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
    from ganscale.errors import EXIT_DONE, GanscaleError

    failures: list[int] = []
    for path in arguments.runs:
        try:
            _synchronize(path, arguments.project, arguments.timeout)
        except GanscaleError as error:
            sys.stderr.write(f"error: {error}\n")
            failures.append(error.exit_code)
    # What a second attempt does not mend has a lower code than what it may mend.
    return min(failures, default=EXIT_DONE)


def _synchronize(path: Path, project: str | None, timeout_seconds: float) -> None:
    from ganscale.config import load_stored
    from ganscale.errors import UserError
    from ganscale.run_folder import RunFolder
    from ganscale.tracking.sync import synchronize
    from ganscale.tracking.wandb_identity import artifacts_to_upload, wandb_identity

    folder = RunFolder(path)
    if not folder.config.exists() or not folder.identity.exists():
        raise UserError(f"{path} is not a run folder: it has no {folder.config.name}")
    config = load_stored(folder.config)
    if project:
        config.log.project = project
    try:
        identity = wandb_identity(config, folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.identity} cannot be read ({error!r})") from error
    checkpoints = artifacts_to_upload(folder.checkpoints, config)
    done = synchronize(path, identity, checkpoints, timeout_seconds)
    print(f"{path}: W&B has all {done.rows:,} rows ({done.sent:,} sent now): {done.location}")
    if done.replaced:
        print(
            f"{path}: in place of {done.replaced:,} of them, W&B keeps the rows of before the "
            "settings were changed (resume.allow): it cannot change them. With --project, another "
            "project gets those of the record"
        )
