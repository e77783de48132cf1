"""The process that copies a run's record into W&B while the run is training: whatever fails in the
server, the client, its service or its disk fails here, where no training step waits for it.
"""

import contextlib
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
from ganscale.files import FileLock
from ganscale.processes import resume_when_parent_dies
from ganscale.run_folder import RunFolder
from ganscale.tracking.alerts import read_alerts
from ganscale.tracking.record import RecordTail
from ganscale.tracking.uploader_messages import CHECKPOINT_SECONDS, SessionEnd, UploadJob
from ganscale.tracking.wandb_destination import client_folder_of
from ganscale.tracking.wandb_mode import WandbMode, resolve_mode
from ganscale.tracking.wandb_run import WandbRun

_POLL_SECONDS = 0.5
_MAX_RETRY_SECONDS = 900.0
_ANSWER_SECONDS = 30
_LOCK_WARNING_SECONDS = 30.0
_ARRIVAL_CHECK_RETRIES = 5  # the server is asked for the rows it has every 5 `retry_seconds`

logger = logging.getLogger(__name__)


class SessionWatcher:
    """Waits for the last line of a training process, which says how its session ended.

    Ends this process some time later, whatever it is waiting for: the next session's uploader waits
    for this one.
    """

    def __init__(self, pipe: TextIO, finish_seconds: float) -> None:
        self.end = SessionEnd()
        self._has_ended = threading.Event()
        threading.Thread(target=self._watch, args=(pipe, finish_seconds), daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits for the end of the session, and returns whether it has come."""
        return self._has_ended.wait(seconds)

    def _watch(self, pipe: TextIO, finish_seconds: float) -> None:
        with contextlib.suppress(ValueError):
            if line := pipe.readline():
                self.end = SessionEnd.from_line(line)
        self._has_ended.set()
        time.sleep(finish_seconds + CHECKPOINT_SECONDS * len(self.end.checkpoints) + 5)
        os._exit(EXIT_FAILED)


class Uploader:
    """Sends the rows that the record has and W&B lacks, until the session ends.

    After a failure it tries again at growing intervals, with a new client that asks the server
    which rows it has.
    """

    def __init__(
        self, job: UploadJob, session: SessionWatcher, send_message: Callable[..., None]
    ) -> None:
        """send_message: sends its keyword arguments to the training process"""
        self._job = job
        self._folder = RunFolder(Path(job.folder))
        self._session = session
        self._send_message = send_message
        self._retry_seconds, self._has_failed = job.retry_seconds, False

    def run(self) -> None:
        """Raises UserError for an impossible mode, UnavailableError if W&B lacks rows finally."""
        mode = resolve_mode(self._job.mode)
        self._send_message(mode=mode)
        if mode == "disabled":
            return
        with exclusive_upload(self._folder, self._session.wait):
            while True:
                is_last = self._session.wait(0)
                try:
                    self._follow(mode)
                    return self._reset_retries()
                except Exception as error:
                    reason = describe_error(error)
                _tear_down_client()
                if is_last:
                    raise UnavailableError(reason)
                if not self._has_failed:
                    logger.warning("W&B gets no rows, metrics.jsonl continues (%s)", reason)
                self._has_failed = True
                self._session.wait(self._retry_seconds)
                self._retry_seconds = min(2 * self._retry_seconds, _MAX_RETRY_SECONDS)

    def _reset_retries(self) -> None:
        """Called once rows have arrived: a server may accept a connection and refuse the rows."""
        if self._has_failed:
            logger.info("W&B is back, and gets the missing rows")
        self._retry_seconds, self._has_failed = self._job.retry_seconds, False

    def _follow(self, mode: WandbMode) -> None:
        wandb_run = WandbRun(
            self._folder,
            self._job.identity,
            mode,
            client_folder=client_folder_of(self._folder),
            finish_seconds=self._job.finish_seconds,
            trainer_pid=self._job.trainer_pid,
        )
        self._send_message(location=wandb_run.location)
        rows = RecordTail(self._folder.record)
        first_step = sent_step = wandb_run.next_step
        checked_at = time.monotonic()
        while True:
            # Asked before the rows are read: rows written after the answer are read next time.
            is_last = self._session.wait(0)
            wandb_run.send(rows.read(wandb_run.next_step))
            wandb_run.send_alerts(read_alerts(self._folder))
            if is_last:
                break
            if time.monotonic() > checked_at + _ARRIVAL_CHECK_RETRIES * self._job.retry_seconds:
                if not wandb_run.has_arrived(sent_step, _ANSWER_SECONDS):
                    raise UnavailableError("the server takes no rows")
                if sent_step > first_step:
                    self._reset_retries()
                sent_step, checked_at = wandb_run.next_step, time.monotonic()
            self._session.wait(_POLL_SECONDS)
        for checkpoint in self._session.end.checkpoints:
            try:
                wandb_run.upload_checkpoint(checkpoint)
            except Exception as error:  # the rows matter more
                logger.warning("%s was not uploaded to W&B: %s", checkpoint.path, error)
        wandb_run.finish(self._session.end.summary, self._session.end.exit_code)


@contextlib.contextmanager
def exclusive_upload(folder: RunFolder, wait: Callable[[float], bool]) -> Iterator[None]:
    """Keeps other processes from sending rows of this run meanwhile: they would arrive twice.

    Waits for the uploader of a session that was killed. `wait` waits some seconds and returns
    whether to give up, with UnavailableError.
    """
    folder.wandb.mkdir(exist_ok=True)
    warning_at = time.monotonic() + _LOCK_WARNING_SECONDS
    with FileLock(folder.upload_lock) as lock:
        # OSError: a file system without locks
        with contextlib.suppress(OSError):
            while not lock.acquire():
                if wait(_POLL_SECONDS):
                    raise UnavailableError("an earlier session is still being sent")
                if time.monotonic() > warning_at:
                    warning_at = math.inf
                    logger.warning(
                        "W&B gets no rows until the uploader of an earlier session of %s ends; is "
                        "it suspended, or on another node?",
                        folder.path,
                    )
        yield


def describe_error(error: Exception) -> str:
    """The error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _tear_down_client() -> None:
    """Without this, the client refuses to start a second run with the same id."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def main() -> None:
    resume_when_parent_dies()
    os.nice(10)  # training comes first, also when cores are few
    # The client's own output must not mix with the messages to the trainer.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send_message(**content: Any) -> None:
        with contextlib.suppress(OSError):  # the trainer has died
            channel.write(json.dumps(content) + "\n")

    class TrainerLogHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send_message(level=record.levelno, text=record.getMessage())

    root = logging.getLogger("ganscale")
    root.setLevel(logging.INFO)
    root.handlers[:] = [TrainerLogHandler()]
    job = UploadJob.from_line(sys.stdin.readline())
    try:
        Uploader(job, SessionWatcher(sys.stdin, job.finish_seconds), send_message).run()
    except Exception as error:
        if isinstance(error, UserError) and job.mode == "online":  # the trainer waits for it
            send_message(user_error=str(error))
            return
        logger.warning(
            "W&B lacks a part of this run (%s): `ganscale sync %s` sends it", error, job.folder
        )
        os._exit(EXIT_DONE)  # the client would again wait for a server that does not answer
