"""Saves and inspects checkpoint folders; mounts file systems to save them on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ganscale.checkpoints.checkpoint import write_checkpoint
from ganscale.checkpoints.writer import Files, HostMemory


def save_checkpoint(root: Path, images_seen: int, files: Files, state: Mapping[str, Any]) -> Path:
    """Copies and writes `files` and `state` as `CheckpointWriter` does; returns the folder."""
    copies, _ = HostMemory().copy(files)
    return write_checkpoint(root, images_seen, copies, json.dumps(state, indent=1))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
