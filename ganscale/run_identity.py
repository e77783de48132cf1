"""Which run a folder holds. `run.json` keeps the run's id and where its folder lies, so that a copy
of the folder becomes a run of its own, while the folder may move or be mounted elsewhere.

A folder is recognized by its path, or by its inode number, which `mv` keeps and which is the same
under every mount point and on every node. `mv` to another file system makes a new one, but leaves
nothing at the old place.
"""

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from ganscale.errors import UserError
from ganscale.run_folder import RunFolder

logger = logging.getLogger(__name__)

KEEP_ID = "location"
"""In `resume.allow`, it makes a folder that may be a copy continue as the same run."""


def claim_identity(
    folder: RunFolder, identity: dict[str, Any] | None, fingerprint: str, *, keeps_id: bool = False
) -> None:
    """Writes `run.json` for this folder: with a new id for a new run, for a copy, and if the file
    is missing. Needs the folder's lock.

    identity: what `run.json` holds
    fingerprint: of the data set, for a run that has none yet
    keeps_id: a copy continues as the same run
    Raises UserError for a copy that shares files with its original.
    """
    if identity is None:
        identity = {"id": _new_id()}
        if folder.has_results():
            logger.warning(
                "%s is missing: the run continues as a new one in W&B (%s), which gets all rows",
                folder.identity,
                identity["id"],
            )
    elif not keeps_id and (original := original_of(folder, identity)) is not None:
        identity, sentence = own_identity(folder, identity, original)
        logger.info("%s", sentence)
    folder.write_identity({"fingerprint": fingerprint, **identity, **_place(folder.path)})


def original_of(folder: RunFolder, identity: dict[str, Any]) -> Path | None:
    """Where the original of a copy lies, or lay when it was copied; None for a folder that is not
    a copy."""
    if (original := visible_original(folder, identity)) is not None:
        return original
    place = _place(folder.path)
    location = Path(identity.get("location", folder.path)).resolve()
    if str(location) == place["location"] or identity.get("inode") == place["inode"]:
        return None
    with contextlib.suppress(OSError):
        parent = location.parent.stat()
        is_other_disk = parent.st_dev != folder.path.stat().st_dev
        was_there = parent.st_ino == identity.get("parent_inode")
        if was_there and is_other_disk and not location.exists():  # moved between disks
            return None
    return location


def visible_original(folder: RunFolder, identity: dict[str, Any]) -> Path | None:
    """Where the original of a copy lies, if it can be seen from here."""
    with contextlib.suppress(OSError, ValueError, UserError):
        original = RunFolder(Path(identity.get("location", folder.path)))
        is_other = not original.path.samefile(folder.path)
        if is_other and original.read_identity()["id"] == identity["id"]:
            return original.path
    return None


def own_identity(
    folder: RunFolder, identity: dict[str, Any], original: Path
) -> tuple[dict[str, Any], str]:
    """(a new identity for a copy, a sentence that says so). Its copied alerts are set aside: W&B
    would send them again, and none of its own.

    Raises UserError if it shares files with its original.
    """
    shared = [
        entry.name
        for entry in os.scandir(folder.path)
        if entry.is_symlink() or (entry.is_file() and entry.stat().st_nlink > 1)
    ]
    if shared:
        raise UserError(
            f"{folder.path} is a copy of {original} and shares {', '.join(sorted(shared))} with "
            "it: copy the run with `cp -rL`"
        )
    own = {**identity, "id": _new_id(), **_place(folder.path)}
    with contextlib.suppress(FileNotFoundError):
        folder.alerts.rename(folder.alerts.with_stem(f"alerts-of-{identity['id']}"))
    return own, (
        f"{folder.path} is a copy of {original} and becomes a run of its own, with the id "
        f"{own['id']} in W&B. To continue the original's W&B run instead, write its id, "
        f"{identity['id']}, into {folder.identity}"
    )


def _new_id() -> str:
    # The agent of a W&B sweep has chosen the id already.
    sweep_id = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return sweep_id or secrets.token_hex(4)


def _place(path: Path) -> dict[str, Any]:
    location = path.resolve()
    inode, parent_inode = location.stat().st_ino, location.parent.stat().st_ino
    return {"location": str(location), "inode": inode, "parent_inode": parent_inode}
