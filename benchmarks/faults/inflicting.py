"""Does a fault to a session, and holds what comes of it against what is promised."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults.disk import Disk
from benchmarks.faults.plan import CHECKPOINT, FULL_FROM_THE_START, Fault
from benchmarks.faults.session import HOST, NotSurvived, Session, wait_until
from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage, images_seen_of
from ganscale.errors import EXIT_RANK_LOST, EXIT_REQUEUE

TIMEOUT_SECONDS = 8.0  # `runtime.timeout_seconds` where that is waited for
_START_SECONDS, _END_SECONDS = 240.0, 60.0  # far more than it takes, as nothing may hang for ever


@dataclass
class Scene:
    """start_seconds: what a session usually takes to its first row
    seconds: from the fault to the end of the session, where it ends by itself
    full: from which to which images the disk was full
    """

    run_folder: Path
    disk: Disk
    start_seconds: float
    seconds: float | None = None
    full: list[tuple[int, int]] = field(default_factory=list)


def inflict(fault: Fault, session: Session, scene: Scene) -> None:
    """Returns when the session is over.

    Raises NotSurvived where something is not as promised, and RunOver where there was no more to
    hit.
    """
    began = newest_whole(scene.run_folder)
    wait_to_begin(session, scene.run_folder, began, fault)
    before = newest_whole(scene.run_folder)
    _KINDS[fault.kind](fault, session, scene)
    session.wait_for_end(_END_SECONDS)
    if fault.kind != "damaged checkpoint" and newest_whole(scene.run_folder) < before:
        raise NotSurvived(f"the checkpoint at {before:,} images is gone or damaged")


def newest_whole(run_folder: Path) -> int:
    """The images seen of the checkpoint from which the run would go on; 0 without one."""
    folders = reversed(checkpoint_folders(run_folder / "checkpoints"))
    return next((images_seen_of(folder) for folder in folders if find_damage(folder) is None), 0)


def wait_to_begin(session: Session, run_folder: Path, began: int, fault: Fault) -> None:
    """Until the session has come to where the fault is to hit it."""
    if fault.after_images == 0:
        return
    session.wait_for_start(
        lambda: (session.images_seen() or 0) >= began + fault.after_images, _START_SECONDS
    )
    time.sleep(0.1 * fault.moment)


def _killed_rank(fault: Fault, session: Session, scene: Scene) -> None:
    victim = _process(session, fault.victim)
    with _timed(scene):
        victim.kill()
        session.expect_end(EXIT_RANK_LOST, _END_SECONDS, victims=[fault.victim])
    _expect_last_word(fault, session, scene, "the process died in `")


def _expect_last_word(fault: Fault, session: Session, scene: Scene, reason: str) -> None:
    """The log's last line has to name the rank, and what the ranks say has to be the same."""
    sentence = f"rank {fault.victim} on {HOST} was lost: {reason}"
    last = (scene.run_folder / "log.txt").read_text().splitlines()[-1]
    if f" ERROR: {sentence}" not in last:
        raise NotSurvived(f"the log ends with {last!r}")
    said = session.expect_end(EXIT_RANK_LOST, _END_SECONDS, victims=[fault.victim])
    if not said.startswith(sentence):
        raise NotSurvived(f"the ranks end with {said!r}")


def _killed_run(fault: Fault, session: Session, scene: Scene) -> None:
    session.kill()


def _killed_loader(fault: Fault, session: Session, scene: Scene) -> None:
    loader = session.rank(fault.victim, loader=True)
    if loader is None:
        raise NotSurvived(f"rank {fault.victim} has no process that reads its data")
    with _timed(scene):
        loader.kill()
        session.expect_end(EXIT_REQUEUE, _END_SECONDS)


def _signal(fault: Fault, session: Session, scene: Scene) -> None:
    if fault.variant == "launcher killed":
        with _timed(scene):
            session.started[0].kill()
            session.wait_for_end(_END_SECONDS)
            session.expect_end(EXIT_REQUEUE, _END_SECONDS)
        return
    number, _, to = fault.variant.split()
    asked = session.all_ranks() if to == "all" else [_process(session, fault.victim)]
    with _timed(scene):
        for process in asked:
            process.send_signal(signal.Signals[f"SIG{number}"])
        session.expect_end(EXIT_REQUEUE, _END_SECONDS)
    images = session.images_seen() or 0
    if (newest := newest_whole(scene.run_folder)) < images:
        raise NotSurvived(f"it stopped at {images:,} images with a checkpoint at {newest:,}")


def _stopped_rank(fault: Fault, session: Session, scene: Scene) -> None:
    victim = _process(session, fault.victim)
    with _timed(scene):
        victim.suspend()
        session.expect_end(EXIT_RANK_LOST, _END_SECONDS, victims=[fault.victim])
    if fault.variant == "killed":  # as srun does with what does not leave
        victim.kill()
    else:  # it finds that the others are gone
        victim.resume()
        session.expect_end(EXIT_RANK_LOST, _END_SECONDS)
    session.wait_for_end(_END_SECONDS)
    _expect_last_word(fault, session, scene, "no sign of life for ")


def _full_disk(fault: Fault, session: Session, scene: Scene) -> None:
    full_from = session.images_seen() or 0
    scene.disk.fill()
    try:
        if fault.variant == FULL_FROM_THE_START:
            session.expect_end(EXIT_REQUEUE, _START_SECONDS)
            return
        session.wait_for_start(
            lambda: "no checkpoint could be written at" in session.said(), _END_SECONDS
        )
        if fault.variant == "asked to stop":
            with _timed(scene):
                _process(session, fault.victim).send_signal(signal.SIGUSR1)
                session.expect_end(EXIT_REQUEUE, _END_SECONDS)
            return
        if fault.variant == "freed":
            written = newest_whole(scene.run_folder)
            scene.disk.free()
            session.wait_for_start(lambda: newest_whole(scene.run_folder) > written, _END_SECONDS)
    finally:
        session.kill()  # if it has not left already
        scene.disk.free()
        scene.full.append((full_from, (session.images_seen() or 0) + CHECKPOINT))


def _damaged_checkpoint(fault: Fault, session: Session, scene: Scene) -> None:
    session.kill()
    whole = [
        f for f in checkpoint_folders(scene.run_folder / "checkpoints") if find_damage(f) is None
    ]
    if not whole:
        raise NotSurvived("there is no whole checkpoint")
    files = sorted(whole[-1].iterdir())
    file = files[int(fault.moment * len(files))]
    content = bytearray(file.read_bytes())
    at = int(fault.moment * 7919 % 1 * len(content))
    if fault.variant == "cut":
        file.write_bytes(content[:at])
    elif fault.variant == "flipped bit":
        content[at] ^= 1 << at % 8
        file.write_bytes(content)
    else:
        file.unlink()
    expected = images_seen_of(whole[-2]) if len(whole) > 1 else 0
    if newest_whole(scene.run_folder) != expected:
        raise NotSurvived(f"{file} is damaged, and nobody sees it")


def _torn_row(fault: Fault, session: Session, scene: Scene) -> None:
    session.kill()
    torn = b'{"loss/critic": 0.1, "progress/im' if fault.variant == "cut" else bytes(1000)
    with (scene.run_folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)


def _start_up(fault: Fault, session: Session, scene: Scene) -> None:
    if fault.variant == "USR1 to all":  # before that, the batch script protects them
        wait_until(
            lambda: session.heeds(signal.SIGUSR1), _START_SECONDS, lambda: "Python did not run"
        )
    elif fault.variant == "killed rank":
        wait_until(lambda: session.rank(fault.victim), _START_SECONDS, lambda: "no rank started")
    time.sleep(fault.moment * scene.start_seconds)
    if fault.variant == "killed run":
        session.kill()
        return
    with _timed(scene):
        if fault.variant == "killed rank":
            _process(session, fault.victim).kill()
            session.wait_for_end(2 * _END_SECONDS)
        else:
            for process in session.all_ranks():
                process.send_signal(signal.SIGUSR1)
            session.expect_end(EXIT_REQUEUE, _START_SECONDS)


_KINDS: dict[str, Callable[[Fault, Session, Scene], None]] = {
    "killed rank": _killed_rank,
    "killed run": _killed_run,
    "killed loader": _killed_loader,
    "signal": _signal,
    "stopped rank": _stopped_rank,
    "full disk": _full_disk,
    "damaged checkpoint": _damaged_checkpoint,
    "torn row": _torn_row,
    "start-up": _start_up,
}


def _process(session: Session, rank: int) -> psutil.Process:
    process = session.rank(rank)
    if process is None:
        raise NotSurvived(f"rank {rank} is gone before its fault: {session.ending()}")
    return process


@contextlib.contextmanager
def _timed(scene: Scene) -> Iterator[None]:
    started = time.monotonic()
    yield
    scene.seconds = time.monotonic() - started
