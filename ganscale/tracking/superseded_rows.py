"""Rows that W&B keeps and the record no longer has, since a run that resumes under other settings
(`resume.allow`) logs other rows from its checkpoint on. `wandb/superseded.json` keeps where each
such stretch begins, and up to which step W&B had rows by then.
"""

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from ganscale.files import write_text
from ganscale.run_folder import RunFolder


def note_rewind(folder: RunFolder, images_seen: int) -> bool:
    """Notes that other rows follow after `images_seen`; returns whether W&B may have old ones."""
    if not folder.wandb.is_dir():
        return False
    _write(folder, [*_read(folder), {"after": images_seen, "until": {}}])
    return True


def note_connection(folder: RunFolder, location: str, next_step: int) -> None:
    """Notes that the W&B run at `location` has, of the rows superseded since its last connection,
    those with a step below `next_step`."""
    rewinds = _read(folder)
    for rewind in rewinds:
        rewind["until"].setdefault(location, next_step)
    if rewinds:
        _write(folder, rewinds)


def count_superseded(folder: RunFolder, location: str, positions: Iterable[tuple[int, int]]) -> int:
    """How many rows at `location` differ from the record's rows with the same steps.

    positions: (images seen, W&B's step) of each row of the record
    """
    spans = [(rewind["after"], rewind["until"].get(location, 0)) for rewind in _read(folder)]
    if not spans:
        return 0
    return sum(
        any(after < images_seen and step < until for after, until in spans)
        for images_seen, step in positions
    )


def _read(folder: RunFolder) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(folder.superseded_rows.read_text())
    return []


def _write(folder: RunFolder, rewinds: list[dict[str, Any]]) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end a training
        write_text(folder.superseded_rows, json.dumps(rewinds))
