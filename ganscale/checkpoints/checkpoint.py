"""Checkpoints that are whole or absent: written aside, flushed, read back, described by checksums,
renamed.

A checkpoint is a folder `images-000123456` of safetensors files, `state.json` (plain numbers) and
`checksums.json`. Nothing in it is ever unpickled.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ganscale.files import save_tensors

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
STATE = "state.json"
_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"  # whole, on its way out: its successor is about to take its name


def save_checkpoint(
    root: Path,
    images_seen: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Writes `<name>.safetensors` for each of `files`, and `state`; returns the folder.

    Raises OSError where the disk does not take it; no older checkpoint is touched then.
    """
    # Copies: safetensors knows no tied weights.
    owned = {
        file: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }
    return write_checkpoint(root, images_seen, owned, json.dumps(state, indent=1))


def write_checkpoint(
    root: Path,
    images_seen: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: str,
    moved: Callable[[], None] = lambda: None,
) -> Path:
    """`save_checkpoint` of tensors that lie on the CPU and share no memory, and of JSON text.

    moved: called after each file that was written or read back

    Raises OSError, after putting everything back as it was; also where the folder around `root`
    is gone, since a run without its settings could not continue.
    """
    folder = root / f"images-{images_seen:09d}"
    unfinished = root / f"{_UNFINISHED}{folder.name}"
    replaced = root / f"{_REPLACED}{folder.name}"
    if not root.exists():
        root.mkdir()
        flush(root.parent)
    _sweep(root)
    try:
        unfinished.mkdir()
        for name, tensors in files.items():
            _save_file(unfinished / f"{name}.safetensors", tensors)
            moved()
        _write(unfinished / STATE, state)
        checksums: dict[str, Any] = {}
        for path in sorted(unfinished.iterdir()):
            checksums[path.name] = _described(path)
            moved()
        _write(unfinished / CHECKSUMS, json.dumps(checksums, indent=1))
        flush(unfinished)
        if folder.exists():  # saved at this very image before
            folder.rename(replaced)
        unfinished.rename(folder)
        flush(root)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        _put_back(root)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _sweep(root: Path) -> None:
    """Clears what was left behind by a process that was killed while it wrote or deleted."""
    _put_back(root)
    for pattern in (f"{_UNFINISHED}*", f"{_REPLACED}*"):
        for left_behind in root.glob(pattern):
            shutil.rmtree(left_behind, ignore_errors=True)


def _put_back(root: Path) -> None:
    """Undoes half a replacement, of a process that was killed between its two renames."""
    for replaced in root.glob(f"{_REPLACED}*"):
        folder = root / replaced.name.removeprefix(_REPLACED)
        if not folder.exists():
            replaced.rename(folder)


def delete_checkpoint(folder: Path) -> None:
    """Whole or gone: who is killed meanwhile leaves nothing that looks like a checkpoint."""
    leaving = folder.with_name(f"{_UNFINISHED}deleted-{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def newest_checkpoint(root: Path, *, sets_aside: bool = True) -> Path | None:
    """The newest checkpoint whose files are all as they were written.

    A damaged one is named in the log and, unless the caller only reads, set aside as
    `damaged-images-...`. Raises OSError where one cannot be read at all (see `damage`).
    """
    if sets_aside:
        _put_back(root)
    for folder in reversed(oldest_first(root)):
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
    return next(iter(reversed(oldest_first(root))), None)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Raises OSError where that cannot be seen: a file that one may not read, or on a server that is
    away, is no damaged one.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        if STATE not in checksums:
            return f"{CHECKSUMS} does not list {STATE}"
        for name, described in checksums.items():
            if _described(folder / name) != described:
                return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except OSError as error:
        if error.errno == errno.EIO:  # a part of the disk that cannot be read any more
            return str(error)
        raise
    return None


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU."""
    return load_file(folder / f"{name}.safetensors")


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def images_of(folder: Path) -> int:
    """The images seen that a checkpoint's name says."""
    return int(folder.name.removeprefix("images-"))


def oldest_first(root: Path) -> list[Path]:
    """All folders that are named as checkpoints are."""
    folders = [path for path in root.glob("images-*") if path.name[7:].isdecimal()]
    return sorted(folders, key=images_of)


def _described(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises OSError, also where the file reads back as anything but these bits."""
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}  # no channels-last
    save_tensors(path, packed)
    flush(path)
    written = load_file(path)
    for name, tensor in packed.items():
        if not torch.equal(_bits(written[name]), _bits(tensor)):
            reason = f"reads back other bits of {name} than were written"
            raise OSError(errno.EIO, reason, str(path))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    flush(path)


def flush(path: Path) -> None:
    """Has what was written to a file, or into a folder, survive the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
