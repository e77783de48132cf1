"""Saves checkpoints as a run does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ganscale.checkpoints.background_writer import Files, HostMemory
from ganscale.checkpoints.checkpoint import write_checkpoint


def save_checkpoint(root: Path, images_seen: int, files: Files, state: Mapping[str, Any]) -> Path:
    """Copies and writes `files` and `state` as `CheckpointWriter` does; returns the folder."""
    copies, _ = HostMemory().copy(files)
    return write_checkpoint(root, images_seen, copies, json.dumps(state, indent=1))
