"""Giving W&B what it lacks of a run that is not training: the record once more, from its start."""

import contextlib
import fcntl
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganscale.errors import EXIT_FAILED, UnavailableError, UserError
from ganscale.tracking.alerts import read_alerts
from ganscale.tracking.record_tail import RecordTail
from ganscale.tracking.superseded_rows import count_superseded
from ganscale.tracking.uploader import alone
from ganscale.tracking.uploader_messages import Checkpoint, WandbIdentity
from ganscale.tracking.wandb_mode import chosen_mode
from ganscale.tracking.wandb_run import WandbRun

_UPLOADER_SECONDS = 20.0  # that of a session which was killed ends by then


@dataclass(frozen=True)
class Synchronized:
    """sent: of the record's `rows`, those that W&B lacked
    replaced: those in whose place W&B keeps rows of before the settings were changed
    """

    rows: int
    sent: int
    replaced: int
    location: str


def synchronize(
    run_folder: Path,
    identity: WandbIdentity,
    checkpoints: Sequence[Checkpoint] = (),
    timeout_seconds: float = 300.0,
) -> Synchronized:
    """Sends the rows, pictures, alerts and checkpoints of a run that its W&B run does not have.

    What it has is the server's to say, so that a second call finds nothing to send. Raises
    UserError without an API key, while the run is training, or where its folder cannot be written,
    UnavailableError where W&B did not take everything.
    """
    chosen_mode("online")
    deadline = time.monotonic() + _UPLOADER_SECONDS

    def waits(seconds: float) -> bool:
        time.sleep(seconds)
        return time.monotonic() < deadline

    try:
        with _not_training(run_folder), alone(run_folder, waits):
            try:
                return _send(run_folder, identity, checkpoints, timeout_seconds)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                sentence = f"W&B did not take all of {run_folder} ({reason})"
                raise UnavailableError(sentence) from error
    except OSError as error:  # of the locks
        raise UserError(
            f"{run_folder} cannot be written, where `sync` keeps others from sending the same "
            f"rows: {error}"
        ) from error


def _send(
    run_folder: Path,
    identity: WandbIdentity,
    checkpoints: Sequence[Checkpoint],
    timeout_seconds: float,
) -> Synchronized:
    summary = _summary(run_folder / "summary.json")
    rows = RecordTail(run_folder / "metrics.jsonl")
    # The client keeps a copy of all it sends, which nobody needs.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        wandb_run = WandbRun(
            run_folder,
            identity,
            "online",
            client_folder=Path(folder),
            finish_seconds=timeout_seconds,
        )
        sent = wandb_run.send(rows.read(wandb_run.next_step))
        for alert in read_alerts(run_folder):
            wandb_run.alert(alert.kind, alert.title, alert.text)
        for checkpoint in checkpoints:
            wandb_run.keep_checkpoint(checkpoint)
        wandb_run.finish(summary, summary.get("exit_code", EXIT_FAILED))
    moments = ((seen, step) for seen, step, _ in RecordTail(run_folder / "metrics.jsonl").lines())
    replaced = count_superseded(run_folder, wandb_run.location, moments)
    return Synchronized(rows.count, sent, replaced, wandb_run.location)


@contextlib.contextmanager
def _not_training(run_folder: Path) -> Iterator[None]:
    """Holds the lock that a process which trains in the folder holds."""
    with (run_folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"the run in {run_folder} is training: W&B gets its rows") from None
        except OSError:  # a file system without locks
            pass
        yield


def _summary(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}
