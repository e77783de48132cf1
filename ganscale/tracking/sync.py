"""Sends W&B what it lacks of a run that is not training, from the record."""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ganscale.errors import EXIT_FAILED, UnavailableError, UserError
from ganscale.run_folder import RunFolder
from ganscale.tracking.alerts import read_alerts
from ganscale.tracking.record import RecordTail
from ganscale.tracking.superseded_rows import count_superseded
from ganscale.tracking.uploader import describe_error, exclusive_upload
from ganscale.tracking.uploader_messages import Checkpoint, WandbIdentity
from ganscale.tracking.wandb_mode import resolve_mode
from ganscale.tracking.wandb_run import WandbRun


@dataclass(frozen=True)
class SyncResult:
    """sent: the number of the record's `rows` that W&B lacked
    superseded: the number of rows that W&B keeps as they were before the settings were changed
    """

    rows: int
    sent: int
    superseded: int
    location: str


def synchronize(
    folder: RunFolder,
    identity: WandbIdentity,
    checkpoints: Sequence[Checkpoint] = (),
    timeout_seconds: float = 300.0,
) -> SyncResult:
    """Sends the rows, samples, alerts and checkpoints of a run that its W&B run does not have.

    Raises UserError without an API key, while the run is training, or if its folder cannot be
    written to or holds links to elsewhere; UnavailableError if W&B did not take everything.
    """
    resolve_mode("online")
    folder.check_has_no_links_outside(*(Path(checkpoint.path) for checkpoint in checkpoints))
    deadline = time.monotonic() + 20  # the uploader of a session that was killed ends by then

    def wait(seconds: float) -> bool:
        time.sleep(seconds)
        return time.monotonic() >= deadline

    try:
        with contextlib.closing(folder):
            if not folder.lock():
                raise UserError(f"the run in {folder.path} is training: W&B gets its rows")
            with exclusive_upload(folder, wait):
                try:
                    return _send(folder, identity, checkpoints, timeout_seconds)
                except UserError:
                    raise
                except Exception as error:
                    raise UnavailableError(
                        f"W&B did not take all of {folder.path} ({describe_error(error)})"
                    ) from error
    except OSError as error:  # from the locks, which keep others from sending the same rows
        raise UserError(f"{folder.path} cannot be written to, as `sync` must: {error}") from error


def _send(
    folder: RunFolder,
    identity: WandbIdentity,
    checkpoints: Sequence[Checkpoint],
    timeout_seconds: float,
) -> SyncResult:
    summary = folder.read_summary()
    rows = RecordTail(folder.record)
    # The client keeps a copy of everything it sends; nobody needs it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as client_folder:
        wandb_run = WandbRun(
            folder,
            identity,
            "online",
            client_folder=Path(client_folder),
            finish_seconds=timeout_seconds,
        )
        sent = wandb_run.send(rows.read(wandb_run.next_step))
        wandb_run.send_alerts(read_alerts(folder))
        for checkpoint in checkpoints:
            try:
                wandb_run.upload_checkpoint(checkpoint)
            except ValueError as error:
                raise UserError(f"{checkpoint.path} was not uploaded: {error}") from error
        wandb_run.finish(summary, summary.get("exit_code", EXIT_FAILED))
    positions = ((seen, step) for seen, step, _ in RecordTail(folder.record).lines())
    superseded = count_superseded(folder, wandb_run.location, positions)
    return SyncResult(rows.count, sent, superseded, wandb_run.location)
