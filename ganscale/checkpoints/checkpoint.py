"""Checkpoints: folders `images-000123456` of safetensors files, `state.json` (plain numbers) and
`checksums.json`; written under another name, flushed, read back, then renamed; never unpickled.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ganscale.files import UNFINISHED, atomic_folder, fsync, sha256, write_text

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
STATE = "state.json"
_REPLACED = ".replaced-"  # a complete checkpoint while another takes its name


def write_checkpoint(
    root: Path,
    images_seen: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: str,
    on_progress: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `<name>.safetensors` for each of `files`, and `state`; returns the folder.

    files: CPU tensors that share no memory
    state: JSON
    on_progress: called after each file that was written or read back

    Raises OSError, also if the folder around `root` is gone; older checkpoints stay as they were.
    """
    folder = root / f"images-{images_seen:09d}"
    replaced = root / f"{_REPLACED}{folder.name}"
    if not root.exists():
        root.mkdir()
        fsync(root.parent)
    # Left by a process that was killed while it wrote or deleted a checkpoint.
    _restore_replaced(root)
    for leftover in (*root.glob(f"{UNFINISHED}*"), *root.glob(f"{_REPLACED}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with atomic_folder(folder) as unfinished:
            for name, tensors in files.items():
                _save_file(unfinished / f"{name}.safetensors", tensors)
                on_progress()
            write_text(unfinished / STATE, state)
            checksums = {}
            for path in sorted(unfinished.iterdir()):
                checksums[path.name] = _size_and_checksum(path)
                on_progress()
            write_text(unfinished / CHECKSUMS, json.dumps(checksums, indent=1))
            fsync(unfinished)
            if folder.exists():  # from an earlier save at the same image
                folder.rename(replaced)
        fsync(root)
    except BaseException:
        _restore_replaced(root)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _restore_replaced(root: Path) -> None:
    """Undoes a replacement that ended between its two renames."""
    for replaced in root.glob(f"{_REPLACED}*"):
        folder = root / replaced.name.removeprefix(_REPLACED)
        if not folder.exists():
            replaced.rename(folder)


def delete_checkpoint(folder: Path) -> None:
    """Renames before it deletes: a process killed meanwhile leaves no half-deleted checkpoint."""
    doomed = folder.with_name(f"{UNFINISHED}deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def newest_checkpoint(root: Path, *, set_damaged_aside: bool = True) -> Path | None:
    """The newest checkpoint that is not damaged.

    Logs each damaged one, and renames it to `damaged-images-...` if `set_damaged_aside`. Raises
    OSError if a checkpoint cannot be read at all (see `find_damage`).
    """
    if set_damaged_aside:
        _restore_replaced(root)
    for folder in reversed(checkpoint_folders(root)):
        if (damage := find_damage(folder)) is None:
            return folder
        if not set_damaged_aside:
            logger.warning("checkpoint %s is damaged (%s)", folder, damage)
            continue
        attempts = (f"damaged-{f'{n}-' if n > 1 else ''}{folder.name}" for n in count(1))
        aside = next(path for path in map(folder.with_name, attempts) if not path.exists())
        folder.rename(aside)
        logger.warning("checkpoint %s is damaged (%s): set aside as %s", folder, damage, aside.name)
    return None


def find_damage(folder: Path) -> str | None:
    """Reads a checkpoint; returns what is wrong with it, or None.

    Raises OSError if that cannot be known: lacking permission or an unreachable file server is not
    damage.
    """
    try:
        checksums = load_checksums(folder)
        if STATE not in checksums:
            return f"{CHECKSUMS} does not list {STATE}"
        for name, expected in checksums.items():
            if _size_and_checksum(folder / name) != expected:
                return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        return str(error)
    except OSError as error:
        if error.errno == errno.EIO:  # the disk can no longer read it
            return str(error)
        raise
    return None


def load_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of every file of a checkpoint, by its name.

    Raises ValueError for something else than that, or a name that leads out of the folder.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CHECKSUMS} is not JSON: {error}") from None
    entries = checksums.values() if isinstance(checksums, dict) else [None]
    if not all(isinstance(entry, dict) and {*entry} == {"bytes", "sha256"} for entry in entries):
        raise ValueError(f"{CHECKSUMS} does not hold the size and checksum of each file")
    if foreign := [name for name in checksums if Path(name).name != name]:
        raise ValueError(f"{CHECKSUMS} lists {foreign[0]}, which is not a file of the checkpoint")
    return checksums


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes contiguous CPU tensors that share no memory into a new safetensors file.

    Raises OSError with the system's error number.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by one that only its owner may read
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(str(error)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def images_seen_of(folder: Path) -> int:
    """The images seen at a checkpoint, from its name."""
    return int(folder.name.removeprefix("images-"))


def checkpoint_folders(root: Path) -> list[Path]:
    """All folders named like checkpoints, oldest first."""
    folders = [path for path in root.glob("images-*") if path.name[7:].isdecimal()]
    return sorted(folders, key=images_seen_of)


def _size_and_checksum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises OSError, also if the file reads back differently."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(path, contiguous)
    fsync(path)
    read_back = load_file(path)
    for name, tensor in contiguous.items():
        if not torch.equal(_bits(read_back[name]), _bits(tensor)):
            reason = f"reads back other bits of {name} than were written"
            raise OSError(errno.EIO, reason, str(path))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
