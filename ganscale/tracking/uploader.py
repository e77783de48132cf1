"""The process that copies a run's record into W&B while the run is training.

W&B is a replica of `metrics.jsonl`, and this process makes it: whatever goes wrong with the server,
the client, its service or its disk goes wrong here, where no step of the training waits for it.

    python -m ganscale.tracking.uploader
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ganscale.errors import EXIT_DONE, EXIT_FAILED, UnavailableError, UserError
from ganscale.tracking.alerts import read_alerts
from ganscale.tracking.record_tail import RecordTail
from ganscale.tracking.uploader_messages import CHECKPOINT_SECONDS, Job, SessionEnd
from ganscale.tracking.wandb_mode import WandbMode, chosen_mode
from ganscale.tracking.wandb_run import WandbRun

_LOOK_SECONDS = 0.5
_MAX_RETRY_SECONDS = 900.0
_ANSWER_SECONDS = 30
_WAIT_SECONDS = 30.0
_LOOKS = 5  # of `retry_seconds`: the server is asked whether the rows have arrived

logger = logging.getLogger("ganscale.tracking.uploader")  # `__name__` is `__main__` here


class Session:
    """A session of training, as its process tells of it: the last line says how it ended.

    Some time after its end this process ends, too, whatever it is waiting for: the next session's
    uploader waits for it.
    """

    def __init__(self, lines: TextIO, finish_seconds: float) -> None:
        self.ending = SessionEnd()
        self._finish_seconds = finish_seconds
        self._lines = lines
        self._has_ended = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._has_ended.is_set()

    def lasts(self, seconds: float) -> bool:
        """Waits, and returns whether the session still goes on."""
        return not self._has_ended.wait(seconds)

    def _listen(self) -> None:
        with contextlib.suppress(ValueError):
            if line := self._lines.readline():
                self.ending = SessionEnd.from_line(line)
        self._has_ended.set()
        time.sleep(self._finish_seconds + CHECKPOINT_SECONDS * len(self.ending.checkpoints) + 5)
        os._exit(EXIT_FAILED)


class Uploader:
    """Sends what is in the record and not in W&B, until the session ends.

    Whatever fails is tried again in growing intervals, with a client that starts afresh and asks
    the server what it has.
    """

    def __init__(self, job: Job, session: Session, tell: Callable[..., None]) -> None:
        self._job = job
        self._folder = Path(job.folder)
        self._session = session
        self._tell = tell
        self._pause, self._has_failed = job.retry_seconds, False

    def run(self) -> None:
        """Raises UserError for a mode that cannot be, UnavailableError where W&B lacks rows in the
        end."""
        mode = chosen_mode(self._job.mode)
        self._tell(mode=mode)
        if mode == "disabled":
            return
        with alone(self._folder, self._session.lasts):
            while True:
                is_last = self._session.has_ended
                try:
                    self._follow(self._connect(mode))
                    return self._note_arrival()
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                _tear_down()
                if is_last:
                    raise UnavailableError(reason)
                if not self._has_failed:
                    logger.warning("W&B gets no rows, metrics.jsonl goes on (%s)", reason)
                self._has_failed = True
                self._session.lasts(self._pause)
                self._pause = min(2 * self._pause, _MAX_RETRY_SECONDS)

    def _connect(self, mode: WandbMode) -> WandbRun:
        wandb_run = WandbRun(
            self._folder,
            self._job.identity,
            mode,
            client_folder=self._folder,
            finish_seconds=self._job.finish_seconds,
            trainer_pid=self._job.trainer_pid,
        )
        self._tell(location=wandb_run.location)
        return wandb_run

    def _note_arrival(self) -> None:
        """A connection alone says little: a server may answer and refuse the rows."""
        if self._has_failed:
            logger.info("W&B is back, and gets what it lacks")
        self._pause, self._has_failed = self._job.retry_seconds, False

    def _follow(self, wandb_run: WandbRun) -> None:
        rows = RecordTail(self._folder / "metrics.jsonl")
        first = sent = wandb_run.next_step
        looked_at = time.monotonic()
        while True:
            # Asked before the rows are read: those that come after the answer are read next time.
            is_last = self._session.has_ended
            wandb_run.send(rows.read(wandb_run.next_step))
            for alert in read_alerts(self._folder):
                wandb_run.alert(alert.kind, alert.title, alert.text)
            if is_last:
                break
            if time.monotonic() > looked_at + _LOOKS * self._job.retry_seconds:
                if not wandb_run.has_arrived(sent, _ANSWER_SECONDS):
                    raise UnavailableError("the server takes no rows")
                if sent > first:
                    self._note_arrival()
                sent, looked_at = wandb_run.next_step, time.monotonic()
            self._session.lasts(_LOOK_SECONDS)
        for checkpoint in self._session.ending.checkpoints:
            try:
                wandb_run.keep_checkpoint(checkpoint)
            except Exception as error:  # the rows are what matters
                logger.warning("%s is not kept in W&B: %s", checkpoint.path, error)
        wandb_run.finish(self._session.ending.summary, self._session.ending.exit_code)


@contextlib.contextmanager
def alone(run_folder: Path, lasts: Callable[[float], bool]) -> Iterator[None]:
    """Keeps other processes from sending rows of this run meanwhile: they would arrive twice.

    Waits for the uploader of a session that was killed, and says so where it takes long. Raises
    UnavailableError where that still sends when `lasts`, which waits some seconds, returns False.
    """
    folder = run_folder / "wandb"
    folder.mkdir(exist_ok=True)
    warns_at = time.monotonic() + _WAIT_SECONDS
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not lasts(_LOOK_SECONDS):
                    raise UnavailableError("an earlier session is still being sent") from None
                if time.monotonic() > warns_at:
                    warns_at = math.inf
                    logger.warning(
                        "W&B gets no rows until the uploader of an earlier session of %s has "
                        "ended; has it been stopped, or is it on another node?",
                        run_folder,
                    )
            except OSError:  # a file system without locks
                break
        yield


def _tear_down() -> None:
    """Or the client refuses to start a run of the same id."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


class _ToTrainer(logging.Handler):
    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(level=record.levelno, text=record.getMessage())


def main() -> None:
    os.nice(10)  # training comes first, also where cores are few
    # Whatever the client prints must not get among the lines for the trainer.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(**content: Any) -> None:
        with contextlib.suppress(OSError):  # a trainer that is gone
            channel.write(json.dumps(content) + "\n")

    root = logging.getLogger("ganscale")
    root.setLevel(logging.INFO)
    root.handlers[:] = [_ToTrainer(tell)]
    job = Job.from_line(sys.stdin.readline())
    try:
        Uploader(job, Session(sys.stdin, job.finish_seconds), tell).run()
    except UserError as error:
        tell(mistake=str(error))
    except Exception as error:
        logger.warning(
            "W&B lacks a part of this run (%s): `ganscale sync %s` sends it", error, job.folder
        )
        os._exit(EXIT_DONE)  # the client would wait, once more, for a server that is away


if __name__ == "__main__":
    main()
