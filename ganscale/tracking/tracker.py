"""What rank 0 tells about a run: rows into the local record, and a process that copies it to W&B.

The record is the truth, and writing it is all that training waits for.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ganscale.errors import UserError
from ganscale.tracking.alerts import Alerts
from ganscale.tracking.record import IMAGES_SEEN, Record, Value
from ganscale.tracking.superseded_rows import note_rewind
from ganscale.tracking.uploader_messages import (
    CHECKPOINT_SECONDS,
    Checkpoint,
    Job,
    SessionEnd,
    WandbIdentity,
)
from ganscale.tracking.wandb_mode import Mode

STEP = "progress/step"

_START_SECONDS = 30.0  # only `online` waits, for an answer that takes about one

logger = logging.getLogger(__name__)


class Tracker:
    """Logs rows to `metrics.jsonl`, from where they go to W&B; constructed on rank 0 only.

    A run that is resumed repeats what it did since its checkpoint. The record is cut back to there;
    W&B keeps what it has and is given only what comes after that.
    """

    def __init__(
        self,
        run_folder: Path,
        identity: WandbIdentity,
        mode: Mode,
        resumed_at: int | None,
        *,
        changes: Sequence[str] = (),
        alerts: bool = True,
        retry_seconds: float = 60.0,
        finish_seconds: float = 10.0,
    ) -> None:
        """`resumed_at`: images seen of the loaded checkpoint, None for a new run. `changes`: the
        settings that are others since then; so are the rows that are logged again.

        `auto` is online where an API key is configured, offline otherwise; WANDB_MODE,
        WANDB_BASE_URL, WANDB_API_KEY and netrc are respected. A server that does not answer is
        asked again, first after `retry_seconds`.

        Raises UserError for `online` without an API key.
        """
        self.location = str(run_folder / "metrics.jsonl")
        """Where to look at the run: an address, or the folder of an offline run."""

        self._run_folder = run_folder
        self._record = Record(run_folder / "metrics.jsonl")
        self._finish_seconds = finish_seconds
        self._uploader: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._alerts = Alerts(run_folder, identity.name) if alerts else None
        kept_until = -1 if resumed_at is None else resumed_at
        if dropped := self._record.rewind(kept_until):
            logger.info("metrics.jsonl: %d rows after the checkpoint are logged again", dropped)
        if dropped and changes and note_rewind(run_folder, kept_until):
            logger.warning(
                "of the %d rows after the checkpoint, which come again with other settings (%s), "
                "W&B keeps those that it has: it cannot change them",
                dropped,
                ", ".join(changes),
            )
        self._has_started, self._mistake = False, ""
        if mode != "disabled":
            self._start_uploader(
                Job(
                    folder=str(run_folder),
                    mode=mode,
                    identity=identity,
                    trainer_pid=os.getpid(),
                    retry_seconds=retry_seconds,
                    finish_seconds=max(finish_seconds - 3, 1.0),
                )
            )
        if mode == "online":
            self._wait_until_started()

    def log(self, row: Mapping[str, Value], *, step: int, images_seen: int) -> None:
        """Logs one row of `section/name` values; `images_seen` never decreases."""
        self._record.append({**row, STEP: step, IMAGES_SEEN: images_seen})
        if self._alerts is not None:
            self._alerts.look(row, images_seen)
        self._listen()

    def alert(self, kind: str, title: str, text: str, images_seen: int) -> None:
        """Tells the user of an event, once per run and kind, if alerts are wanted."""
        if self._alerts is not None:
            self._alerts.tell(kind, title, text, images_seen)

    def log_images(self, pictures: Mapping[str, Path], *, step: int, images_seen: int) -> None:
        """Logs files of the run folder, under names that begin with `samples/`."""
        paths = {name: str(path.relative_to(self._run_folder)) for name, path in pictures.items()}
        self.log(paths, step=step, images_seen=images_seen)

    def finish(
        self, summary: Mapping[str, Any], exit_code: int, checkpoints: Sequence[Checkpoint] = ()
    ) -> None:
        """Closes the record, and the W&B run, whose page then shows `summary`.

        Takes `finish_seconds` at most, and five minutes more for each of `checkpoints`, which are
        uploaded.
        """
        self._record.close()
        if self._uploader is None:
            return
        ending = SessionEnd(exit_code, dict(summary), list(checkpoints))
        with contextlib.suppress(OSError):  # a process that is gone
            assert self._uploader.stdin is not None
            self._uploader.stdin.write(ending.to_line().encode())
            self._uploader.stdin.close()
        limit = self._finish_seconds + CHECKPOINT_SECONDS * len(checkpoints)
        deadline = time.monotonic() + limit
        while self._uploader is not None and time.monotonic() < deadline:
            time.sleep(0.02)
            self._listen()
        if (uploader := self._uploader) is not None:
            uploader.kill()
            self._let_go(uploader)
            logger.warning(
                "W&B did not take everything within %.0f s: `ganscale sync %s` sends the rest",
                limit,
                self._run_folder,
            )

    def _start_uploader(self, job: Job) -> None:
        """In a session of its own, where Ctrl-C on the terminal does not reach it."""
        command = [sys.executable, "-m", "ganscale.tracking.uploader"]
        try:
            uploader = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert uploader.stdin is not None
            assert uploader.stdout is not None
            uploader.stdin.write(job.to_line().encode())
            uploader.stdin.flush()
            os.set_blocking(uploader.stdout.fileno(), False)
        except OSError as error:
            logger.warning("W&B is off in this session, metrics.jsonl goes on (%s)", error)
            return
        self._uploader = uploader

    def _wait_until_started(self) -> None:
        """Raises UserError for a mode that cannot be."""
        deadline = time.monotonic() + _START_SECONDS
        while self._uploader is not None and not self._has_started and time.monotonic() < deadline:
            time.sleep(0.02)
            self._listen()
        if self._mistake:
            raise UserError(self._mistake)

    def _listen(self) -> None:
        """Logs what the uploader has said since the last time, without waiting for it."""
        if self._uploader is None:
            return
        assert self._uploader.stdout is not None
        heard: bytes | None = None
        with contextlib.suppress(BlockingIOError):
            while heard := os.read(self._uploader.stdout.fileno(), 65536):
                self._heard += heard
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.location = message.get("location", self.location)
            self._has_started |= "mode" in message
            self._mistake = message.get("mistake", self._mistake)
            if "text" in message:
                logger.log(message["level"], "%s", message["text"])
        if heard == b"" and (code := self._let_go(self._uploader)):
            logger.warning(
                "W&B is off in this session, metrics.jsonl goes on (the uploader ended with %d); "
                "`ganscale sync %s` sends what it lacks",
                code,
                self._run_folder,
            )

    def _let_go(self, uploader: subprocess.Popen[bytes]) -> int:
        """The exit code of an uploader that has ended, or is about to."""
        self._uploader = None
        for pipe in (uploader.stdin, uploader.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        return uploader.wait()
