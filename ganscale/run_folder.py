"""The layout of a run's folder `runs/NAME`, and its lock. Every file name in it is decided here."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ganscale.config import Resolved
from ganscale.errors import UserError
from ganscale.files import FileLock, write_text
from ganscale.schema import RunConfig

logger = logging.getLogger(__name__)

_EMA_PREFIX = "images"  # of the file names of the EMA generator's grids
_RUN_ID = re.compile(r"[\w.-]{1,128}")  # a part of file names
_SAMPLES = re.compile(r"(?P<kind>.+?)(?:-(?P<images_seen>\d{1,15}))?\.(?:png|jpe?g|webp)", re.I)


class RunFolder:
    """The paths within one run's folder; constructing it neither reads nor creates anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # every setting, resolved
        self.identity = path / "run.json"  # the run's id, its place, its data set's fingerprint
        self.sessions = path / "sessions.jsonl"  # one line for each start
        self.record = path / "metrics.jsonl"
        self.alerts = path / "alerts.jsonl"
        self.log = path / "log.txt"
        self.summary = path / "summary.json"  # written at the end of each session
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.real_samples = self.samples / "real.jpg"
        self.profile = path / "profile"
        self.report = path / "report.html"
        self.wandb = path / "wandb"  # the client's own files, and four of ours:
        self.upload_lock = self.wandb / ".lock"
        self.superseded_rows = self.wandb / "superseded.json"
        self._lock: FileLock | None = None

    def offline_progress(self, run_id: str) -> Path:
        """The file that holds the last step which an offline session gave to the W&B client."""
        return self.wandb / f"offline-progress-{run_id}.json"

    def wandb_destination(self, run_id: str) -> Path:
        """The file that holds where in W&B the run belongs."""
        return self.wandb / f"destination-{run_id}.json"

    def sample_grid(self, images_seen: int, kind: str = "ema") -> Path:
        """The file of one grid of samples: a PNG for the EMA generator, a JPEG for other kinds."""
        prefix, extension = (_EMA_PREFIX, "png") if kind == "ema" else (kind, "jpg")
        return self.samples / f"{prefix}-{images_seen:09d}.{extension}"

    def sample_files(self) -> Iterator[tuple[str, int | None, Path]]:
        """(kind, images seen or None, path) of every image file in `samples`, by name."""
        if self.samples.is_dir():
            for path in sorted(self.samples.iterdir()):
                if (match := _SAMPLES.fullmatch(path.name)) is not None and path.is_file():
                    kind, images_seen = match["kind"].lower(), match["images_seen"]
                    kind = "ema" if kind == _EMA_PREFIX else kind
                    yield kind, None if images_seen is None else int(images_seen), path

    def stack(self, rank: int) -> Path:
        """The file of the Python stacks of a rank that hangs."""
        return self.path / "stacks" / f"rank-{rank:04d}.txt"

    def check_exists(self) -> None:
        """Raises UserError unless a run was started here."""
        if not self.path.is_dir():
            raise UserError(f"there is no run folder {self.path}")
        if not self.config.exists():
            raise UserError(f"{self.path} is not a run folder: it has no {self.config.name}")

    def check_has_no_links_outside(self, *others: Path) -> None:
        """Raises UserError if what is sent or shown of a run, or one of `others`, lies elsewhere:
        someone else's run must not make us publish files of our own."""
        files = [self.config, self.sessions, self.record, self.alerts, self.summary, self.log]
        here = os.path.realpath(self.path)
        for path in (*files, self.samples, *others):
            target = Path(os.path.realpath(path))  # `resolve` fails for a link to itself
            if not target.is_relative_to(here):
                raise UserError(
                    f"{path} is a link to {target}: only what lies in the run folder is sent or "
                    "shown"
                )

    def lock(self, timeout_seconds: float = 0.0) -> bool:
        """Keeps other processes from training here until `close` or the end of this process; False
        if one still trains after `timeout_seconds`. Raises OSError if it cannot write here."""
        self._lock = FileLock(self.path / ".lock")
        try:
            is_free = self._lock.acquire(timeout_seconds, poll_seconds=1.0)
        except OSError as error:  # a file system without locks
            logger.warning(
                "%s cannot be locked (%s): use it with one process at a time", self.path, error
            )
            return True
        if not is_free:
            self.close()
        return is_free

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def has_results(self) -> bool:
        """Whether something here was made by training: rows, checkpoints or samples."""
        folders = self.checkpoints, self.samples
        has_rows = self.record.is_file() and self.record.stat().st_size > 0
        return has_rows or any(folder.is_dir() and any(folder.iterdir()) for folder in folders)

    def read_identity(self) -> dict[str, Any]:
        """`run.json`: "id", the run's id here and in W&B; "fingerprint", that of its data set; and
        what `ganscale.run_identity` keeps. If it is damaged, the last session's id and data.

        Raises UserError if there is none.
        """
        if not self.identity.exists():
            raise UserError(f"{self.path} has no {self.identity.name}: `ganscale train` makes one")
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            identity = json.loads(self.identity.read_text(encoding="utf-8"))
            texts = [identity.get(key, "") for key in ("id", "fingerprint", "location")]
            if all(isinstance(text, str) for text in texts) and _RUN_ID.fullmatch(texts[0]):
                return identity
        for session in reversed(self.read_sessions()):
            if isinstance(run_id := session.get("run_id"), str):
                logger.warning("%s is damaged: its id is known from earlier", self.identity)
                return {"id": run_id, "fingerprint": session.get("data_fingerprint", "")}
        raise UserError(
            f"{self.identity} is damaged: delete it, and the run continues as a new one in W&B"
        )

    def write_identity(self, identity: dict[str, Any]) -> None:
        write_text(self.identity, json.dumps(identity))

    def write_config(self, text: str) -> None:
        """Stores the settings, which may hold passwords, so that only their owner can read them."""
        write_text(self.config, text, is_private=True)

    def read_sessions(self) -> list[dict[str, Any]]:
        """The entries of all sessions in order, without damaged lines."""
        entries = read_json_lines(self.sessions)
        return [entry for entry in entries if isinstance(entry.get("images_seen"), int)]

    def read_summary(self) -> dict[str, Any]:
        """The summary of the last session that ended; {} if there is none or it is damaged."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            summary = json.loads(self.summary.read_text(encoding="utf-8", errors="replace"))
            return summary if isinstance(summary, dict) else {}
        return {}

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.summary, json.dumps(summary, indent=1) + "\n")


def in_its_folder(resolved: Resolved) -> Resolved:
    """The run; where its name comes from the stored config of a run folder, the run that this
    folder holds, wherever it was moved or copied to."""
    source = resolved.origin.get("run.name", "")
    folder = RunFolder(Path(source).parent)
    is_stored = Path(source).name == folder.config.name
    if not is_stored or not (folder.identity.exists() or folder.sessions.exists()):
        return resolved
    run = located(resolved.config.run, folder)
    if resolved.origin.get("run.folder") != source:
        run = replace(run, folder=resolved.config.run.folder)
    return replace(resolved, config=replace(resolved.config, run=run))


def located(run: RunConfig, folder: RunFolder) -> RunConfig:
    """`run` with the name and the folder of this run folder, unless they lead there already."""
    with contextlib.suppress(FileNotFoundError):
        if folder.path.samefile(Path(run.folder) / run.name):
            return run
    path = folder.path if folder.path.name not in ("", "..") else folder.path.resolve()
    return replace(run, name=path.name, folder=str(path.parent))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of one JSON object a line, without damaged lines; it may be missing."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Appends one object to a file for `read_json_lines`; a full disk must not end a run."""
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
