"""Whether a run may start or continue in its folder, and from which checkpoint."""

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ganscale.checkpoints.checkpoint import newest_checkpoint
from ganscale.config import Resolved, curve_changes, load_stored
from ganscale.errors import UnavailableError, UserError
from ganscale.files import is_users_mistake
from ganscale.run_folder import RunFolder
from ganscale.run_identity import KEEP_ID, claim_identity
from ganscale.schema import Config
from ganscale.secrets import without_secrets
from ganscale.supervision.job_history import has_job_history
from ganscale.tracking.record import newest_images_seen

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 120.0
_SHOWN_CHANGES = 3


class OpenedRun(NamedTuple):
    """checkpoint: the newest whole one, None for a run that starts
    changed_settings: those that `resume.allow` let through
    """

    checkpoint: Path | None
    changed_settings: list[str]


def open_run(folder: RunFolder, resolved: Resolved, fingerprint: str) -> OpenedRun:
    """Locks the folder, creating it if need be, and stores the settings of a new run. On rank 0
    only.

    Raises UserError when another process trains there, when the stored run differs in a way that
    would break its curve, or when something is missing or damaged that would be lost for good;
    UnavailableError when the disk fails for now.
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
        kind = UserError if is_users_mistake(error) else UnavailableError
        raise kind(f"cannot use the run folder {folder.path}: {error}") from None
    except (ValueError, KeyError) as error:
        folder.close()
        raise UserError(f"the run folder {folder.path} cannot be used: {error!r}") from error
    except BaseException:
        folder.close()
        raise


def accept_settings(folder: RunFolder, resolved: Resolved, fingerprint: str) -> None:
    """Stores the settings that the run continues with, but not `resume.allow`, which has to be
    given anew each time. Only once it trains with them: a session that ends before leaves the
    stored ones as they were. On rank 0 only."""
    try:
        folder.write_config(_without_allow(resolved).to_yaml())
        folder.write_identity({**folder.read_identity(), "fingerprint": fingerprint})
    except OSError as error:  # a full disk may have room when the job is queued again
        kind = UserError if is_users_mistake(error) else UnavailableError
        raise kind(f"cannot write to the run folder {folder.path}: {error}") from None


def check_settings(folder: RunFolder, config: Config, fingerprint: str) -> tuple[Config, bool]:
    """(the stored settings, whether the data set has changed). Raises UserError when the stored run
    differs in a way that would break its curve."""
    stored = config
    if folder.config.exists() or folder.has_results():
        stored = _stored_config(folder)
    has_other_data = (_known_fingerprint(folder) or fingerprint) != fingerprint
    if changes := _changes(stored, config, has_other_data):
        raise UserError(_describe(folder, changes))
    return stored, has_other_data


def _start_or_continue(folder: RunFolder, resolved: Resolved, fingerprint: str) -> OpenedRun:
    is_stored = folder.config.exists()
    identity = folder.read_identity() if folder.identity.exists() else None
    stored, has_other_data = check_settings(folder, resolved.config, fingerprint)
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        _start_again(folder, stored)
    elif not folder.record.exists():
        logger.warning("%s is missing: the rows before %s are lost", folder.record, checkpoint.name)
    keeps_id = KEEP_ID in resolved.config.resume.allow
    claim_identity(folder, identity, fingerprint, keeps_id=keeps_id)
    without_allow = _without_allow(resolved)
    if not is_stored:
        folder.write_config(without_allow.to_yaml())
    let_through = _changes(stored, without_allow.config, has_other_data)
    return OpenedRun(checkpoint, _keys(let_through))


def _stored_config(folder: RunFolder) -> Config:
    remedy = f"write it anew with `ganscale config ... > {folder.config}`"
    if not folder.config.exists():
        raise UserError(
            f"{folder.path} holds a run without {folder.config.name}, with which these settings "
            f"must be compared: put it back, or {remedy}"
        )
    try:
        return load_stored(folder.config)
    except UserError as error:
        raise UserError(f"{error}; repair the file, or {remedy}") from None


def _start_again(folder: RunFolder, stored: Config) -> None:
    """Keeps a record that is longer than that of a run which was killed early: the second
    checkpoint waits for the first, so it must have had one, or a disk that was full."""
    if not folder.record.exists():
        return
    logger.warning("%s has no whole checkpoint: the run starts again", folder.path)
    reached = newest_images_seen(folder.record)
    cycle_images = stored.objective.n_critic * stored.training.global_batch_size
    if reached > 2 * (stored.checkpoint.every_images + cycle_images):
        kept = folder.record.with_name(f"metrics-until-{reached:09d}.jsonl")
        if not kept.exists():
            shutil.copyfile(folder.record, kept)
        logger.warning("its rows up to %s images are kept in %s", f"{reached:,}", kept)


def _known_fingerprint(folder: RunFolder) -> str | None:
    """That of the data which the run was trained with, if it is known."""
    if folder.identity.exists():
        return folder.read_identity().get("fingerprint")
    sessions = folder.read_sessions()
    return sessions[-1].get("data_fingerprint") if sessions else None


def _changes(stored: Config, config: Config, has_other_data: bool) -> list[str]:
    """What breaks the curve and is not in `resume.allow`, each as "key: what has changed"."""
    changes = curve_changes(stored, config)
    if has_other_data and "data" not in config.resume.allow:
        changes.append("data: the shards have changed since this run was trained")
    return changes


def _describe(folder: RunFolder, changes: list[str]) -> str:
    """The changes in a sentence; many are another experiment, not a run that continues."""
    shown = without_secrets("; ".join(changes[:_SHOWN_CHANGES]))
    if len(changes) > _SHOWN_CHANGES:
        sections = dict.fromkeys(key.split(".")[0] for key in _keys(changes))
        return (
            f"{folder.path} holds a run with other settings ({shown}; and "
            f"{len(changes) - _SHOWN_CHANGES} more in {', '.join(sections)}): give this one "
            "another run.name"
        )
    return (
        f"{folder.path} holds a run with other settings ({shown}): choose another run.name, or "
        f"continue it with resume.allow=[{','.join(_keys(changes))}]"
    )


def _without_allow(resolved: Resolved) -> Resolved:
    resume = dataclasses.replace(resolved.config.resume, allow=[])
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, resume=resume))


def _keys(changes: list[str]) -> list[str]:
    return [change.split(":")[0] for change in changes]
