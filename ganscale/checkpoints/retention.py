"""Which checkpoints stay: the last k, every m-th, the best; and always one that is whole."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganscale.checkpoints.checkpoint import (
    CHECKSUMS,
    damage,
    delete_checkpoint,
    images_of,
    load_state,
    oldest_first,
)
from ganscale.schema import CheckpointConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it looks without reading its tensors.

    score: (name of the logged value, value) if the run scored it
    written_at: seconds since 1970
    fault: what is seen to be wrong with it, None for nothing
    """

    folder: Path
    images_seen: int
    bytes: int
    written_at: float
    score: tuple[str, float] | None
    fault: str | None


def survey(root: Path) -> list[Saved]:
    """All checkpoints, oldest first."""
    return [_looked_at(folder) for folder in oldest_first(root)]


def scored(name: str, value: object) -> dict[str, Any]:
    """What stands in `state.json` of a checkpoint's score; nothing for what is no finite number."""
    if not name or not isinstance(value, (int, float)) or not math.isfinite(value):
        return {}
    return {"score": {"name": name, "value": value}}


def best_of(saved: Sequence[Saved], keep: CheckpointConfig) -> Saved | None:
    """The best of those that have a score of `keep.best`; of equal ones the oldest, since a later
    one may carry the score of the same evaluation."""
    sign = 1 if keep.best_is == "lowest" else -1
    candidates = [
        (sign * checkpoint.score[1], checkpoint.images_seen, checkpoint)
        for checkpoint in saved
        if checkpoint.fault is None and checkpoint.score and checkpoint.score[0] == keep.best
    ]
    return min(candidates, key=lambda each: each[:2])[2] if candidates else None


def superfluous(saved: Sequence[Saved], keep: CheckpointConfig) -> list[Saved]:
    """Those that may go. Damaged ones count for nothing and are left to be looked at."""
    whole = [checkpoint for checkpoint in saved if checkpoint.fault is None]
    every, best = keep.keep_every_images, best_of(saved, keep)
    return [
        checkpoint
        for checkpoint in whole[: -keep.keep_last]
        if checkpoint is not best and (every == 0 or checkpoint.images_seen % every)
    ]


def prune(
    root: Path,
    keep: CheckpointConfig,
    *,
    verified: Path | None = None,
    is_dry_run: bool = False,
) -> list[Saved]:
    """Deletes what `keep` does not keep; returns what goes, or would.

    verified: a checkpoint that was just written; it stays. Without one, those that stay are read
    until one is found whole, and if none is, the newest whole one among the others stays.
    """
    saved = survey(root)
    going = [checkpoint for checkpoint in superfluous(saved, keep) if checkpoint.folder != verified]
    if verified is None and going:
        staying = [checkpoint for checkpoint in saved if checkpoint not in going]
        for checkpoint in (*reversed(staying), *reversed(going)):
            if checkpoint.fault is None and damage(checkpoint.folder) is None:
                going = [other for other in going if other is not checkpoint]
                break
        else:
            return []  # not one is whole: nothing is known to be superfluous
    if not is_dry_run:
        for checkpoint in going:
            delete_checkpoint(checkpoint.folder)
    return going


def _looked_at(folder: Path) -> Saved:
    size, written_at, score, fault = 0, 0.0, None, None
    try:
        written_at = (folder / CHECKSUMS).stat().st_mtime
        for name, described in json.loads((folder / CHECKSUMS).read_text()).items():
            size += (found := (folder / name).stat().st_size)
            if found != described["bytes"]:
                fault = f"{name} has {found:,} bytes instead of {described['bytes']:,}"
        if given := load_state(folder).get("score"):
            score = str(given["name"]), float(given["value"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
    return Saved(folder, images_of(folder), size, written_at, score, fault)
