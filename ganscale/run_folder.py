"""The folder `runs/NAME`: what stands in it, and whether a run may start or continue there."""

import dataclasses
import fcntl
import json
import logging
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganscale.checkpoints.checkpoint import newest_checkpoint
from ganscale.config import Resolved, curve_changes, load_stored
from ganscale.errors import UnavailableError, UserError
from ganscale.files import write_text
from ganscale.supervision.job_history import has_job_history

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 120.0


@dataclass
class RunFolder:
    path: Path
    changes: list[str] = dataclasses.field(default_factory=list)  # of settings, by resume.allow
    _lock: int | None = None  # file descriptor; the lock ends with it, however the process ends

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def identity(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def record(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def sessions(self) -> Path:
        return self.path / "sessions.jsonl"

    def samples(self, images_seen: int) -> Path:
        return self.path / "samples" / f"images-{images_seen:09d}.png"

    def open(self, resolved: Resolved, fingerprint: str) -> tuple[str, Path | None]:
        """Creates the folder or continues in it: (run id, newest whole checkpoint). Rank 0 only.

        Raises UserError when another process trains there, or when the stored run differs in a
        way that would break its curve.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            return self._continue(resolved, fingerprint)
        except OSError as error:
            self.close()
            # A disk that is full or away may be well when the job comes again.
            is_mistake = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError))
            kind = UserError if is_mistake else UnavailableError
            raise kind(f"cannot use the run folder {self.path}: {error}") from None
        except (ValueError, KeyError) as error:
            self.close()
            raise UserError(f"the run folder {self.path} cannot be used: {error!r}") from error
        except BaseException:
            self.close()
            raise

    def _continue(self, resolved: Resolved, fingerprint: str) -> tuple[str, Path | None]:
        if not self.identity.exists():
            # The agent of a W&B sweep has chosen the id already.
            in_sweep = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
            identity = {"id": in_sweep or secrets.token_hex(4), "fingerprint": fingerprint}
            write_text(self.identity, json.dumps(identity))
            return identity["id"], None
        identity = json.loads(self.identity.read_text())
        changes = []
        if self.config.exists():
            changes = curve_changes(load_stored(self.config), resolved.config)
        allowed = resolved.config.resume.allow
        if identity["fingerprint"] != fingerprint and "data" not in allowed:
            changes.append("data: the shards are others than this run was trained on")
        if changes:
            keys = ",".join(change.split(":")[0] for change in changes)
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(changes)}): choose "
                f"another run.name, or continue it with resume.allow=[{keys}]"
            )
        checkpoint = newest_checkpoint(self.checkpoints)
        if checkpoint is None and self.record.exists():
            logger.warning("%s has no whole checkpoint: the run starts again", self.path)
        return identity["id"], checkpoint

    def accept(self, resolved: Resolved, fingerprint: str) -> None:
        """Stores the settings that the run goes on with, once they are known to load. Rank 0 only.

        `resume.allow` is not among them: what may differ is to be named anew each time.
        """
        resume = dataclasses.replace(resolved.config.resume, allow=[])
        config = dataclasses.replace(resolved.config, resume=resume)
        identity = json.loads(self.identity.read_text())
        if self.config.exists():
            others = curve_changes(load_stored(self.config), config)
            self.changes = [change.split(":")[0] for change in others]
        if identity["fingerprint"] != fingerprint:
            self.changes.append("data")
        try:
            write_text(self.config, dataclasses.replace(resolved, config=config).to_yaml())
            write_text(self.identity, json.dumps({**identity, "fingerprint": fingerprint}))
        except PermissionError as error:
            raise UserError(f"cannot write to the run folder {self.path}: {error}") from None
        except OSError as error:  # a disk that is full may have room when the job is queued again
            raise UnavailableError(f"cannot write to the run folder {self.path}: {error}") from None

    def close(self) -> None:
        """Lets other processes train here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        # A job that comes again may meet what is left of its attempt before, or its lease on a
        # network disk.
        comes_again = has_job_history() and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        deadline = time.monotonic() + (_LOCK_SECONDS if comes_again else 0.0)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(1.0)
                    continue
                os.close(descriptor)
                kind = UnavailableError if comes_again else UserError
                raise kind(f"another process is training in {self.path}") from None
            except OSError as error:  # a file system without locks
                logger.warning(
                    "%s cannot be locked (%s): start no second run there", self.path, error
                )
                return descriptor


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    write_text(path, json.dumps(summary, indent=1) + "\n")
