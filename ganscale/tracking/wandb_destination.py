"""Where a run belongs in W&B, and its name, group and tags there: what the settings say, else what
the run's first session found in W&B's environment variables and in the folder of `wandb init`.
`wandb/destination-ID.json` keeps that, so that all sessions and `ganscale sync` go to one W&B run.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ganscale.files import write_text
from ganscale.run_folder import RunFolder
from ganscale.tracking.uploader_messages import WandbIdentity
from ganscale.tracking.wandb_mode import client_settings

_DEFAULT_PROJECT = "ganscale"


def destination_of(folder: RunFolder, identity: WandbIdentity) -> dict[str, Any]:
    """`project`, `entity`, `name`, `group`, `job_type`, `tags` and `notes`, as arguments of
    `wandb.init`; None for what W&B decides."""
    path = folder.wandb_destination(identity.run_id)
    settings = client_settings()
    asked = {key: value for key, value in identity.destination.items() if value}
    destination = {
        "project": settings.project or _DEFAULT_PROJECT,
        "entity": settings.entity,
        "name": settings.run_name or identity.name,
        "group": settings.run_group,
        "job_type": settings.run_job_type,
        "tags": settings.run_tags,
        "notes": settings.run_notes,
        **asked,
    }
    with contextlib.suppress(OSError, ValueError, AttributeError):
        remembered = json.loads(path.read_text())
        return {key: asked.get(key) or remembered.get(key) for key in destination}
    with contextlib.suppress(OSError):  # a full disk must not end a session
        write_text(path, json.dumps(destination))
    return destination


def client_folder_of(folder: RunFolder) -> Path:
    """Where the client keeps its own files: WANDB_DIR, if it can be made, or the run folder."""
    with contextlib.suppress(OSError):
        if chosen := os.environ.get("WANDB_DIR"):
            path = Path(chosen)
            path.mkdir(parents=True, exist_ok=True)
            return path
    return folder.path
