"""Which checkpoints are kept: the last k, the first at or after each multiple of m images, the
best; and always an undamaged one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganscale.checkpoints.checkpoint import (
    CHECKSUMS,
    checkpoint_folders,
    delete_checkpoint,
    find_damage,
    images_seen_of,
    load_checksums,
    load_state,
)
from ganscale.schema import CheckpointConfig


@dataclass(frozen=True)
class CheckpointInfo:
    """What can be known of a checkpoint without reading its tensors.

    score: (name of the logged value, value) if the run scored it
    score_identity: what the value depends on besides the weights; values of others do not compare
    written_at: seconds since 1970
    damage: what is wrong with its files, or None
    """

    folder: Path
    images_seen: int
    bytes: int
    written_at: float
    score: tuple[str, float] | None
    damage: str | None
    score_identity: str = ""


def inspect_checkpoints(root: Path) -> list[CheckpointInfo]:
    """All checkpoints, oldest first."""
    return [_inspect(folder) for folder in checkpoint_folders(root)]


def score_entry(name: str, value: object, identity: str = "") -> dict[str, Any]:
    """The entry of `state.json` for a checkpoint's score; empty unless it is a finite number."""
    if not name or not isinstance(value, (int, float)) or not math.isfinite(value):
        return {}
    score = {"name": name, "value": value}
    return {"score": score | {"identity": identity} if identity else score}


def best_checkpoint(
    checkpoints: Sequence[CheckpointInfo], config: CheckpointConfig
) -> CheckpointInfo | None:
    """The best of `checkpoints` (oldest first) with a score named `config.best`; of equal ones the
    oldest, since a later one may carry the score of the same evaluation. Only those that compare
    with the newest score count."""
    sign = 1 if config.best_is == "lowest" else -1
    scored = [
        (sign * info.score[1], info)
        for info in checkpoints
        if info.damage is None and info.score and info.score[0] == config.best
    ]
    newest = scored[-1][1].score_identity if scored else ""
    candidates = [each for each in scored if each[1].score_identity == newest]
    return min(candidates, key=lambda candidate: candidate[0], default=(0.0, None))[1]


def first_of_multiples(positions: Sequence[int], every: int) -> set[int]:
    """Of ascending numbers of images, the first at or after each multiple of `every`; none if that
    is 0. Checkpoints are at ends of cycles, which need not be multiples."""
    if every == 0:
        return set()
    first: dict[int, int] = {}
    for position in positions:
        first.setdefault(position // every, position)
    return {position for multiple, position in first.items() if multiple > 0}


def prune(
    root: Path, config: CheckpointConfig, *, verified: Path | None = None, dry_run: bool = False
) -> list[CheckpointInfo]:
    """Deletes the checkpoints that `config` does not keep; returns them.

    Damaged ones stay for inspection, and do not count towards `keep_last`.

    verified: a checkpoint that was just written, which is kept. Without it, prune reads
    checkpoints, first those to keep, until it finds an undamaged one, and keeps that one.
    dry_run: delete nothing
    """
    undamaged = [info for info in inspect_checkpoints(root) if info.damage is None]
    best = best_checkpoint(undamaged, config)
    positions = [info.images_seen for info in undamaged]
    spaced = first_of_multiples(positions, config.keep_every_images)
    expired = [
        info
        for info in undamaged[: -config.keep_last]
        if info is not best and info.images_seen not in spaced and info.folder != verified
    ]
    if verified is None and expired:
        kept = [info for info in undamaged if info not in expired]
        for info in (*reversed(kept), *reversed(expired)):
            if find_damage(info.folder) is None:
                expired = [other for other in expired if other is not info]
                break
        else:
            return []  # all are damaged
    if not dry_run:
        for info in expired:
            delete_checkpoint(info.folder)
    return expired


def _inspect(folder: Path) -> CheckpointInfo:
    total_bytes, written_at, score, identity, damage = 0, 0.0, None, "", None
    try:
        written_at = (folder / CHECKSUMS).stat().st_mtime
        for name, expected in load_checksums(folder).items():
            total_bytes += (size := (folder / name).stat().st_size)
            if size != expected["bytes"]:
                damage = f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if entry := load_state(folder).get("score"):
            score = str(entry["name"]), float(entry["value"])
            identity = str(entry.get("identity", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damage = f"{type(error).__name__}: {error}"
    facts = images_seen_of(folder), total_bytes, written_at, score, damage, identity
    return CheckpointInfo(folder, *facts)
