"""Saves checkpoints in processes that are killed (-9), and prints what each leaves behind.

    checkpoint_process.py FOLDER next|again|anywhere

next, again: process n dies at its n-th file operation while it saves the next checkpoint, or
replaces the newest; until a process survives. anywhere: processes save again and again, and die
after a random time. Each printed line is JSON: what is found after a kill, or after the save that
follows it.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from ganscale.checkpoints.background_writer import CheckpointWriter
from ganscale.checkpoints.checkpoint import find_damage, load_state, load_tensors, newest_checkpoint
from ganscale.schema import CheckpointConfig

KEEP = CheckpointConfig(keep_last=2)
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
ELEMENTS = {"next": 100, "again": 100, "anywhere": 500_000}


def save(root: Path, images_seen: int, value: float, elements: int) -> None:
    writer = CheckpointWriter(root, KEEP)
    tensors = {"first": torch.full((elements,), value), "second": torch.full((7,), -value)}
    files = {"generator": tensors, "critic": tensors}
    writer.save(images_seen, files, {"images_seen": images_seen, "value": value})
    writer.finish()


def die_at(operation: int) -> None:
    left = operation

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def in_a_child(work: object, *arguments: object, seconds: float | None = None) -> bool:
    """Whether the child was killed, by itself or after `seconds`."""
    child = os.fork()
    if child == 0:
        work(*arguments)  # type: ignore[operator]
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def report(root: Path, **more: object) -> None:
    """Prints what a resumed run would find, and all values in it."""
    remaining = sorted(path.name for path in root.iterdir())
    newest = newest_checkpoint(root)
    assert newest is not None
    state = load_state(newest)
    files = [load_tensors(newest, name) for name in ("generator", "critic")]
    values = {state["value"]} | {v for f in files for v in f["first"].unique().tolist()}
    values |= {-v for f in files for v in f["second"].unique().tolist()}
    whole = [path.name for path in sorted(root.glob("images-*")) if find_damage(path) is None]
    found = {"newest": newest.name, "values": sorted(values), "whole": whole, "left": remaining}
    print(json.dumps({**more, **found}), flush=True)


def at_every_operation(root: Path, images_seen: int) -> None:
    was_killed, operation = True, 0
    while was_killed:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for images in (64, 128):
            save(root, images, images, ELEMENTS["next"])

        def dying(operation: int = operation) -> None:
            die_at(operation)
            save(root, images_seen, 7.0, ELEMENTS["next"])

        was_killed = in_a_child(dying)
        report(root, was_killed=was_killed)
        in_a_child(save, root, 256, 256.0, ELEMENTS["next"])
        report(root)
        operation += 1


def anywhere(root: Path) -> None:
    root.mkdir()
    save(root, 1, 1.0, ELEMENTS["anywhere"])
    draws = random.Random(0)

    def save_forever(images_seen: int) -> None:
        while True:
            images_seen += 1
            save(root, images_seen, float(images_seen), ELEMENTS["anywhere"])

    for _ in range(25):
        newest = newest_checkpoint(root)
        assert newest is not None
        before = load_state(newest)["images_seen"]
        in_a_child(save_forever, before, seconds=draws.uniform(0, 0.15))
        report(root, before=before)


if __name__ == "__main__":
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "anywhere":
        anywhere(folder)
    else:
        at_every_operation(folder, {"next": 192, "again": 128}[mode])
