"""Whether a run may start or continue in its folder, and from which checkpoint."""

import dataclasses
import logging
import os
import secrets
from pathlib import Path

from ganscale.checkpoints.checkpoint import newest_checkpoint
from ganscale.config import Resolved, curve_changes, load_stored
from ganscale.errors import UnavailableError, UserError
from ganscale.files import write_text
from ganscale.run_folder import RunFolder
from ganscale.schema import Config
from ganscale.supervision.job_history import has_job_history

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 120.0


def open_run(folder: RunFolder, resolved: Resolved, fingerprint: str) -> Path | None:
    """Locks the folder, creating it if need be, and returns the newest whole checkpoint, if any.
    On rank 0 only.

    Raises UserError when another process trains there, or when the stored run differs in a way
    that would break its curve; UnavailableError when the disk fails for now.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        # A requeued job may meet what is left of its last attempt, or its lease on a network disk.
        is_requeued = has_job_history() and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        if not folder.lock(_LOCK_SECONDS if is_requeued else 0.0):
            kind = UnavailableError if is_requeued else UserError
            raise kind(f"another process is training in {folder.path}")
        return _start_or_continue(folder, resolved, fingerprint)
    except OSError as error:
        folder.close()
        # A disk that is full or away may be back when the job is queued again.
        is_mistake = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError))
        kind = UserError if is_mistake else UnavailableError
        raise kind(f"cannot use the run folder {folder.path}: {error}") from None
    except (ValueError, KeyError) as error:
        folder.close()
        raise UserError(f"the run folder {folder.path} cannot be used: {error!r}") from error
    except BaseException:
        folder.close()
        raise


def accept_settings(folder: RunFolder, resolved: Resolved, fingerprint: str) -> list[str]:
    """Stores the settings that the run continues with, once the checkpoint has loaded under them,
    but not `resume.allow`, which has to be given anew each time. On rank 0 only.

    Returns the changed settings that `resume.allow` let through.
    """
    resume = dataclasses.replace(resolved.config.resume, allow=[])
    config = dataclasses.replace(resolved.config, resume=resume)
    changes = _changes(folder, config, fingerprint)
    try:
        write_text(folder.config, dataclasses.replace(resolved, config=config).to_yaml())
        folder.write_identity(folder.read_identity()["id"], fingerprint)
    except PermissionError as error:
        raise UserError(f"cannot write to the run folder {folder.path}: {error}") from None
    except OSError as error:  # a full disk may have room when the job is queued again
        raise UnavailableError(f"cannot write to the run folder {folder.path}: {error}") from None
    return _keys(changes)


def _start_or_continue(folder: RunFolder, resolved: Resolved, fingerprint: str) -> Path | None:
    if not folder.identity.exists():
        # The agent of a W&B sweep has chosen the id already.
        sweep_id = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        folder.write_identity(sweep_id or secrets.token_hex(4), fingerprint)
        return None
    check_settings(folder, resolved.config, fingerprint)
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None and folder.record.exists():
        logger.warning("%s has no whole checkpoint: the run starts again", folder.path)
    return checkpoint


def check_settings(folder: RunFolder, config: Config, fingerprint: str) -> None:
    """Raises UserError when the stored run differs in a way that would break its curve."""
    if changes := _changes(folder, config, fingerprint):
        raise UserError(
            f"{folder.path} holds a run with other settings ({'; '.join(changes)}): choose "
            f"another run.name, or continue it with resume.allow=[{','.join(_keys(changes))}]"
        )


def _changes(folder: RunFolder, config: Config, fingerprint: str) -> list[str]:
    """What breaks the curve and is not in `resume.allow`, each as "key: what has changed"."""
    stored = folder.config.exists()
    changes = curve_changes(load_stored(folder.config), config) if stored else []
    has_other_data = folder.read_identity()["fingerprint"] != fingerprint
    if has_other_data and "data" not in config.resume.allow:
        changes.append("data: the shards have changed since this run was trained")
    return changes


def _keys(changes: list[str]) -> list[str]:
    return [change.split(":")[0] for change in changes]
