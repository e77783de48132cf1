"""How rank 0 logs a run: to the local record, which a process copies to W&B meanwhile."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ganscale.errors import UserError
from ganscale.run_folder import RunFolder
from ganscale.tracking.alerts import Alerts
from ganscale.tracking.record import IMAGES_SEEN, Record, Value
from ganscale.tracking.superseded_rows import note_rewind
from ganscale.tracking.uploader_messages import (
    CHECKPOINT_SECONDS,
    Checkpoint,
    SessionEnd,
    UploadJob,
    WandbIdentity,
    to_line,
)
from ganscale.tracking.wandb_mode import RequestedMode

STEP = "progress/step"

# Not `-m`, with which a user's random.py in the current folder would be imported.
_UPLOADER = """
import sys
sys.path[:] = sys.argv[1:]  # where this package was found
from ganscale.tracking.uploader import main
main()
"""

logger = logging.getLogger(__name__)


class Tracker:
    """Logs rows to `metrics.jsonl`, from where they go to W&B; constructed on rank 0 only.

    A resumed run repeats the rows after its checkpoint. The record is cut back to there; W&B keeps
    the rows it has and gets only later ones.
    """

    def __init__(
        self,
        folder: RunFolder,
        identity: WandbIdentity,
        mode: RequestedMode,
        resumed_at: int | None,
        *,
        changed_settings: Sequence[str] = (),
        alerts: bool = True,
        retry_seconds: float = 60.0,
        finish_seconds: float = 10.0,
    ) -> None:
        """`resumed_at`: images seen of the loaded checkpoint, None for a new run.
        `changed_settings`: since that checkpoint; they make the repeated rows differ.

        A server that does not answer is tried again, first after `retry_seconds`. Raises UserError
        for the mode `online` without an API key.
        """
        self.location = str(folder.record)
        """Where the run can be viewed: an address, or the folder of an offline run."""

        self._folder = folder
        self._record = Record(folder.record)
        self._finish_seconds = finish_seconds
        self._uploader: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._has_started = False
        self._user_error = ""
        self._alerts = Alerts(folder, identity.name) if alerts else None
        self._rewind(-1 if resumed_at is None else resumed_at, changed_settings)
        if mode != "disabled":
            self._start_uploader(
                UploadJob(
                    folder=str(folder.path),
                    mode=mode,
                    identity=identity,
                    trainer_pid=os.getpid(),
                    retry_seconds=retry_seconds,
                    finish_seconds=max(finish_seconds - 3, 1.0),
                )
            )
        if mode == "online":  # the answer takes about one second
            self._read_messages_until(lambda: self._has_started, 30.0)
            if self._user_error:
                raise UserError(self._user_error)

    def log(self, values: Mapping[str, Value | Path], *, step: int, images_seen: int) -> None:
        """Logs one row of `section/name` values; `images_seen` never decreases. Files of the run
        folder have names that begin with `samples/`."""
        root = self._folder.path
        row = {k: str(v.relative_to(root)) if isinstance(v, Path) else v for k, v in values.items()}
        self._record.append({**row, STEP: step, IMAGES_SEEN: images_seen})
        if self._alerts is not None:
            self._alerts.check_row(row, images_seen)
        self._read_messages()

    def has_logged(self, name: str, images_seen: int | None = None) -> bool:
        """Whether the record has a value with this name, at `images_seen` if given."""
        return self._record.has(name, images_seen)

    def alert(self, kind: str, title: str, text: str, images_seen: int) -> None:
        """Sends an alert, once per run and kind, if alerts are on."""
        if self._alerts is not None:
            self._alerts.send(kind, title, text, images_seen)

    def finish(
        self, summary: Mapping[str, Any], exit_code: int, checkpoints: Sequence[Checkpoint] = ()
    ) -> None:
        """Closes the record, uploads `checkpoints`, and closes the W&B run, whose page then shows
        `summary`. Takes at most `finish_seconds`, plus five minutes for each checkpoint."""
        self._record.close()
        if self._uploader is None:
            return
        end = SessionEnd(exit_code, dict(summary), list(checkpoints))
        with contextlib.suppress(OSError):  # the process has died
            assert self._uploader.stdin is not None
            self._uploader.stdin.write(to_line(end))
            self._uploader.stdin.close()
        limit = self._finish_seconds + CHECKPOINT_SECONDS * len(checkpoints)
        self._read_messages_until(lambda: False, limit)
        if (uploader := self._uploader) is not None:
            uploader.kill()
            self._reap(uploader)
            logger.warning(
                "W&B did not take everything within %.0f s: `ganscale sync %s` sends the rest",
                limit,
                self._folder.path,
            )

    def _rewind(self, images_seen: int, changed_settings: Sequence[str]) -> None:
        dropped = self._record.rewind(images_seen)
        if dropped:
            logger.info("metrics.jsonl: %d rows after the checkpoint are logged again", dropped)
        if dropped and changed_settings and note_rewind(self._folder, images_seen):
            logger.warning(
                "the %d rows after the checkpoint are logged again with other settings (%s), but "
                "W&B cannot change the rows it has and keeps the old ones",
                dropped,
                ", ".join(changed_settings),
            )

    def _start_uploader(self, job: UploadJob) -> None:
        try:
            uploader = subprocess.Popen(
                [sys.executable, "-c", _UPLOADER, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C on the terminal does not reach it
            )
            assert uploader.stdin is not None
            assert uploader.stdout is not None
            uploader.stdin.write(to_line(job))
            uploader.stdin.flush()
            os.set_blocking(uploader.stdout.fileno(), False)
        except OSError as error:
            logger.warning("W&B is off in this session, metrics.jsonl continues (%s)", error)
            return
        self._uploader = uploader

    def _read_messages_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Or until the uploader ends."""
        deadline = time.monotonic() + seconds
        while self._uploader is not None and not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
            self._read_messages()

    def _read_messages(self) -> None:
        """Handles the uploader's new messages, without waiting for any."""
        if self._uploader is None:
            return
        assert self._uploader.stdout is not None
        chunk: bytes | None = None
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._uploader.stdout.fileno(), 65536):
                self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:  # printed by something else, such as a sitecustomize
                continue
            if not isinstance(message, dict):
                continue
            self.location = message.get("location", self.location)
            self._has_started |= "mode" in message
            self._user_error = message.get("user_error", self._user_error)
            if "text" in message:
                logger.log(message["level"], "%s", message["text"])
        if chunk == b"" and (code := self._reap(self._uploader)):
            logger.warning(
                "W&B is off in this session, metrics.jsonl continues (the uploader ended with "
                "code %d); `ganscale sync %s` sends the missing rows",
                code,
                self._folder.path,
            )

    def _reap(self, uploader: subprocess.Popen[bytes]) -> int:
        """The exit code of an uploader that has ended, or is about to."""
        self._uploader = None
        with contextlib.suppress(OSError), uploader:  # closes the pipes
            pass
        return uploader.wait()
