"""What a run is in W&B, read from its folder: id, name, config, data, checkpoints to upload."""

import re
from collections import defaultdict
from pathlib import Path

from ganscale.checkpoints.retention import best_checkpoint, inspect_checkpoints
from ganscale.config_schedules import plain
from ganscale.run_folder import RunFolder
from ganscale.schema import Config
from ganscale.secrets import without_secrets
from ganscale.tracking.uploader_messages import Checkpoint, WandbIdentity

_SHOWN_SESSIONS = 20  # a run that is requeued for weeks has hundreds


def wandb_identity(config: Config, folder: RunFolder) -> WandbIdentity:
    """The run's id, place and name in W&B, and its config there: the settings and the newest
    sessions (the last one also under `session`, whose entries W&B can show as columns), all without
    passwords and signatures."""
    sessions = folder.read_sessions()[-_SHOWN_SESSIONS:]
    history = {"session": sessions[-1] if sessions else {}, "sessions": sessions}
    identity, log = folder.read_identity(), config.log
    path, fingerprint = without_secrets(config.data.path), identity.get("fingerprint")
    dataset = {"name": _dataset_name(path), "fingerprint": fingerprint, "path": path}
    return WandbIdentity(
        run_id=identity["id"],
        name=config.run.name,
        config=without_secrets(plain(config) | history),
        destination={
            "project": log.project,
            "entity": log.entity,
            "group": log.group,
            "job_type": log.job_type,
            "tags": log.tags,
            "notes": log.notes,
        },
        dataset=dataset if fingerprint else {},
    )


def _dataset_name(path: str) -> str:
    """The last part of a path or URL that names the data and not its shards, as W&B allows it."""
    words = (re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII).strip("-") for part in path.split("/"))
    names = [word for word in words if word.strip(".") and not re.search(r"\.tar|^pipe", word)]
    return names[-1][-100:] if names else "data"


def artifacts_to_upload(root: Path, config: Config) -> list[Checkpoint]:
    """The checkpoints that `log.artifacts` asks for, with their aliases in W&B."""
    policy = config.log.artifacts
    saved = [] if policy == "none" else [c for c in inspect_checkpoints(root) if c.damage is None]
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    if saved and policy != "best":
        aliases[str(saved[-1].folder)].append("last")
    if policy != "last" and (best := best_checkpoint(saved, config.checkpoint)) is not None:
        aliases[str(best.folder)].append("best")
    return [Checkpoint(folder, names) for folder, names in aliases.items()]
