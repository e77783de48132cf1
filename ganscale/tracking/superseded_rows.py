"""Rows of W&B that are not those of the record any more, since it cannot change what it has.

A run that is resumed under other settings (`resume.allow`) logs other rows from its checkpoint on.
`wandb/replaced.json` in the run folder keeps from where, and up to where W&B had rows by then.
"""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ganscale.files import write_text


def note_rewind(run_folder: Path, images_seen: int) -> bool:
    """Keeps that the rows after `images_seen` are replaced by others; returns whether W&B may have
    some of them: it was told of the run before."""
    if not (run_folder / "wandb").is_dir():
        return False
    _write(run_folder, [*_read(run_folder), {"after": images_seen, "until": {}}])
    return True


def note_connection(run_folder: Path, location: str, next_step: int) -> None:
    """Keeps what the run at `location` had of the rows that were replaced since the last time: all
    with a step below `next_step`."""
    cuts = _read(run_folder)
    if new := [cut for cut in cuts if location not in cut["until"]]:
        for cut in new:
            cut["until"][location] = next_step
        _write(run_folder, cuts)


def count_superseded(run_folder: Path, location: str, moments: Iterable[tuple[int, int]]) -> int:
    """How many rows of the record, by (images seen, W&B's step), are others than those with their
    steps at `location`."""
    spans = [(cut["after"], cut["until"].get(location, 0)) for cut in _read(run_folder)]
    if not spans:
        return 0
    return sum(
        any(after < images_seen and step < until for after, until in spans)
        for images_seen, step in moments
    )


def _read(run_folder: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_path(run_folder).read_text())
    return []


def _write(run_folder: Path, cuts: list[dict[str, Any]]) -> None:
    with contextlib.suppress(OSError):  # a full disk must not end a training
        write_text(_path(run_folder), json.dumps(cuts))


def _path(run_folder: Path) -> Path:
    return run_folder / "wandb" / "replaced.json"
