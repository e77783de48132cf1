"""One Weights & Biases run for one training, whatever happens to the server or the process.

The sole module that knows wandb. Every row goes to the local record first; W&B is a copy that may
fail at any time without the training noticing more than one warning.
"""

import contextlib
import dataclasses
import json
import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from ganscale.errors import UserError
from ganscale.files import write_text
from ganscale.tracking.record import IMAGES_SEEN, End, Record

STEP = "progress/step"

# Left to itself, the client blocks for 102 s at the start of a run when its server is away, and for
# minutes at the end.
_PROBE_SECONDS = 3.0
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 10.0

WandbMode = Literal["online", "offline", "disabled"]
Mode = Literal["auto"] | WandbMode

logger = logging.getLogger(__name__)


class Tracker:
    """Logs rows to `metrics.jsonl` and to W&B; constructed on rank 0 only.

    W&B keeps one row per value of its own step and drops what comes later with the same one, while
    a training step may log meters, an evaluation and a picture. So W&B's step is `images_seen`,
    moved on by one where that is taken; charts use `progress/images_seen`, which is exact.

    A run that is resumed repeats what it did since its checkpoint. The record is cut back to there;
    W&B keeps what it has and is given only what comes after that.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        project: str,
        name: str,
        mode: Mode,
        config: Mapping[str, Any],
        run_id: str,
        resumed_at: int | None,
    ) -> None:
        """`resumed_at`: images seen of the loaded checkpoint, None for a new run.

        `auto` is online where an API key is configured and the server answers, offline otherwise;
        WANDB_MODE, WANDB_BASE_URL, WANDB_API_KEY and netrc are respected.

        Raises UserError for `online` without an API key.
        """
        self.degraded: str | None = None
        """Why W&B was switched off, or None."""
        self.location = str(run_folder / "metrics.jsonl")
        """Where to look at the run: an address, or the folder of an offline run."""

        self._run_folder = run_folder
        self._record = Record(run_folder / "metrics.jsonl")
        self._run: Any = None
        self._given = End()
        self._last_wandb_step = -1

        with self._guarded():
            self._given = self._given_before(run_id)
        resumed_at = -1 if resumed_at is None else resumed_at
        if dropped := self._record.rewind(resumed_at):
            logger.info("metrics.jsonl: %d rows after the checkpoint are logged again", dropped)
        if mode == "disabled" or self.degraded:
            return
        with self._guarded():
            self._start_wandb(mode, project, name, run_id, dict(config))

    def log(self, row: Mapping[str, float], *, step: int, images_seen: int) -> None:
        """Logs one row of `section/name` values; `step` and `images_seen` never decrease."""
        row = {**row, STEP: step, IMAGES_SEEN: images_seen}
        self._record.append(row)
        self._send(row)

    def log_samples(
        self, name: str, image: Path | np.ndarray, *, step: int, images_seen: int
    ) -> None:
        """Logs one picture: a file, or a grid of (height, width, channels) uint8.

        A grid is encoded as JPEG: at 1024 pixels 18 ms of the caller's time, PNG takes 140 ms.
        """
        if isinstance(image, Path):
            described = os.path.relpath(image, self._run_folder)
        else:
            described = f"{image.shape[1]}x{image.shape[0]} pixels"
        position = {STEP: step, IMAGES_SEEN: images_seen}
        self._record.append({name: described, **position})
        if self._run is None:
            return
        with self._guarded():
            import wandb

            if isinstance(image, Path):
                self._send({name: wandb.Image(str(image)), **position})
            else:
                self._send({name: wandb.Image(image, file_type="jpg"), **position})

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Closes the record and the W&B run, whose page then shows `summary`; takes 10 s at most.

        What could not be uploaded by then stays in the run folder, for `wandb sync`.
        """
        self._record.close()
        if self._run is None:
            return
        with self._guarded():
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=exit_code)
        self._run = None

    def _send(self, row: Mapping[str, Any]) -> None:
        if self._run is None or self._was_given(row):
            return
        with self._guarded():
            self._last_wandb_step = max(row[IMAGES_SEEN], self._last_wandb_step + 1)
            # Without `commit`, the client would hold the row back until the next step.
            self._run.log(dict(row), step=self._last_wandb_step, commit=True)

    def _was_given(self, row: Mapping[str, Any]) -> bool:
        """Whether an earlier process gave W&B this row.

        Where that process ended, the names decide: killed during an evaluation, it had logged the
        meters of that step, but not yet the scores.
        """
        if row[IMAGES_SEEN] == self._given.images_seen:
            return self._given.names.issuperset(row)
        return row[IMAGES_SEEN] < self._given.images_seen

    def _given_before(self, run_id: str) -> End:
        """The furthest that W&B was given rows of this run by any earlier process.

        That is the end of the record, if W&B has files of the run: it may have been disabled. But
        the record is about to be cut back, and this process may die before it is there again. So
        the furthest point is kept in a file, before the cut.
        """
        folder = self._run_folder / "wandb"
        if not any(folder.glob(f"*run-*-{run_id}")):
            return End()
        path = folder / f"given-{run_id}.json"
        given = self._record.end()
        if path.exists():
            stored = json.loads(path.read_text())
            stored = End(stored["images_seen"], stored["rows"], frozenset(stored["names"]))
            given = max(given, stored, key=lambda end: (end.images_seen, end.rows))
        content = {**dataclasses.asdict(given), "names": sorted(given.names)}
        write_text(path, json.dumps(content))
        return given

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns any failure within wandb into one warning and no W&B from then on."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._run = None
            self.degraded = f"{type(error).__name__}: {error}"
            logger.warning(
                "W&B is off for the rest of this run, metrics.jsonl goes on (%s)", self.degraded
            )

    def _start_wandb(
        self, mode: Mode, project: str, name: str, run_id: str, config: dict[str, Any]
    ) -> None:
        import wandb  # takes 0.5 s

        wandb_mode = _resolved_mode(wandb, mode)
        if wandb_mode == "disabled":
            return
        settings = wandb.Settings(
            silent=True,
            console="off",  # log.txt has it; a progress bar would be uploaded line by line
            disable_code=True,
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            finish_timeout_raises=True,
            # The default of 15 s is what a killed process loses of an offline run.
            x_transaction_log_flush_interval=1.0,
        )

        def start(mode: WandbMode) -> Any:
            return wandb.init(
                dir=self._run_folder,
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                mode=mode,
                config=config,
                allow_val_change=True,
                settings=settings,
            )

        try:
            run = start(wandb_mode)
        except Exception as error:
            if wandb_mode == "offline":
                raise
            logger.warning("W&B does not start online (%s); this run is offline", error)
            wandb.teardown()  # or the client refuses to start a run of the same id
            wandb_mode = "offline"
            run = start(wandb_mode)
        run.define_metric(IMAGES_SEEN)
        run.define_metric("*", step_metric=IMAGES_SEEN)
        # Zero, unless the server knows the run: then one more than the last step that it has.
        next_step = run.starting_step
        if self._given == End():
            self._given = End(next_step)
        self._last_wandb_step = max(self._given.images_seen + self._given.rows, next_step) - 1
        self._run = run
        self.location = run.url if wandb_mode == "online" else str(Path(run.dir).parent)


def _resolved_mode(wandb: ModuleType, mode: Mode) -> WandbMode:
    """The mode in which W&B can start now, without a prompt and without waiting for long."""
    # Environment, settings files and defaults, as wandb itself reads them.
    settings = wandb.setup().settings
    if mode == "auto":
        preferred = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
        if preferred in ("offline", "disabled"):
            return preferred
    if mode in ("offline", "disabled"):
        return mode
    if not _has_api_key(settings):
        if mode == "online":
            raise UserError(
                "tracking mode 'online' needs an API key of Weights & Biases: set WANDB_API_KEY or "
                "run 'wandb login', or choose the mode 'auto' or 'offline'"
            )
        logger.info("no API key of Weights & Biases: this run is tracked offline")
        return "offline"
    if not _answers(settings.base_url):
        logger.warning("%s does not answer: this run is tracked offline", settings.base_url)
        return "offline"
    return "online"


def _has_api_key(settings: Any) -> bool:
    if settings.api_key or settings.identity_token_file:
        return True
    candidates = [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    if "NETRC" in os.environ:
        candidates = [Path(os.environ["NETRC"]).expanduser()]
    for path in candidates:
        # A file that cannot be read gives the client no key either.
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc):
                return True
    return False


def _answers(url: str) -> bool:
    """Whether `url` gives any answer but a server error within 3 s, name resolution included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
            answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                answered.set()
        except OSError:
            pass

    # In a thread, since the timeout of a request does not cover a name server that is away.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return answered.is_set()
