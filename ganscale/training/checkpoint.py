"""Checkpoints that are whole or absent: written aside, flushed, described by checksums, renamed.

A checkpoint is a folder `images-000123456` of safetensors files, `state.json` (plain numbers) and
`checksums.json`. Nothing in it is ever unpickled.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"
_STATE = "state.json"
_UNFINISHED = ".unfinished-"


def save_checkpoint(
    root: Path,
    images_seen: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Writes `<name>.safetensors` for each of `files`, and `state`; returns the folder.

    Raises OSError where the disk does not take it; no older checkpoint is touched then.
    """
    folder = root / f"images-{images_seen:09d}"
    unfinished = root / f"{_UNFINISHED}{folder.name}"
    for left_behind in root.glob(f"{_UNFINISHED}*"):  # by a process that was killed while saving
        shutil.rmtree(left_behind, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            # Contiguous copies: safetensors knows neither channels-last strides nor tied weights.
            owned = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
            _write(unfinished / f"{name}.safetensors", lambda path, t=owned: _save_file(t, path))
        _write_json(unfinished / _STATE, state)
        checksums = {path.name: _described(path) for path in sorted(unfinished.iterdir())}
        _write_json(unfinished / _CHECKSUMS, checksums)
        _flush(unfinished)
        replaced = root / f"{_UNFINISHED}replaced-{folder.name}"
        if folder.exists():  # saved at this very image before
            folder.rename(replaced)
        unfinished.rename(folder)
        _flush(root)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def newest_checkpoint(root: Path, *, sets_aside: bool = True) -> Path | None:
    """The newest checkpoint whose files are all as they were written.

    A damaged one is named in the log and, unless the caller only reads, set aside as
    `damaged-images-...`.
    """
    for folder in reversed(_oldest_first(root)):
        if (reason := damage(folder)) is None:
            return folder
        if not sets_aside:
            logger.warning("checkpoint %s is damaged (%s)", folder, reason)
            continue
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        logger.warning("checkpoint %s is damaged (%s): set aside as %s", folder, reason, aside.name)
    return None


def newest_name(root: Path) -> Path | None:
    """The newest checkpoint by name, unverified: to tell people about it."""
    return next(iter(reversed(_oldest_first(root))), None)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text())
        if _STATE not in checksums:
            return f"{_CHECKSUMS} does not list {_STATE}"
        for name, described in checksums.items():
            if _described(folder / name) != described:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU."""
    return load_file(folder / f"{name}.safetensors")


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _STATE).read_text())


def prune_checkpoints(root: Path, keep_last: int, keep_every_images: int) -> None:
    """Deletes all but the newest `keep_last` and those at multiples of `keep_every_images`."""
    for folder in _oldest_first(root)[:-keep_last]:
        if keep_every_images == 0 or _images_seen(folder) % keep_every_images:
            shutil.rmtree(folder, ignore_errors=True)


def _images_seen(folder: Path) -> int:
    return int(folder.name.removeprefix("images-"))


def _oldest_first(root: Path) -> list[Path]:
    folders = [path for path in root.glob("images-*") if path.name[7:].isdecimal()]
    return sorted(folders, key=_images_seen)


def _described(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(str(error)) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, lambda target: target.write_text(json.dumps(content, indent=1)))


def _write(path: Path, write: Any) -> None:
    write(path)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
