"""A training's run in W&B, through the client."""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from ganscale.checkpoints.checkpoint import CHECKSUMS, load_checksums
from ganscale.errors import EXIT_RANK_LOST, EXIT_REQUEUE, UnavailableError
from ganscale.files import file_within
from ganscale.run_folder import RunFolder
from ganscale.tracking.alerts import Alert
from ganscale.tracking.record import IMAGES_SEEN
from ganscale.tracking.superseded_rows import note_connection
from ganscale.tracking.uploader_messages import CHECKPOINT_SECONDS, Checkpoint, WandbIdentity
from ganscale.tracking.wandb_destination import client_folder_of, destination_of
from ganscale.tracking.wandb_mode import WandbMode, client_settings, is_reachable

_DATASET = "data/artifact"  # the summary's entry for the data that was declared
_SAMPLES = "samples/"  # begins names whose values are the paths of images in the run folder
_ARRIVAL_SECONDS = 2
_DECLARATION_SECONDS = 4
_BATCH_ROWS = 100
_MAX_SIDE = 2048  # pixels; a browser shows no more, and JPEG ends at 65,535

logger = logging.getLogger(__name__)


class WandbRun:
    """A training's run in W&B. Its calls of the client may raise anything, or hang.

    Attributes:
        next_step: W&B has every row with a lower step
        location: an address, or the folder of an offline run
    """

    def __init__(
        self,
        folder: RunFolder,
        identity: WandbIdentity,
        mode: WandbMode,
        *,
        client_folder: Path,
        finish_seconds: float,
        trainer_pid: int | None = None,
    ) -> None:
        """client_folder: where the client keeps its own files, in a folder `wandb`
        trainer_pid: the process whose CPU, memory and GPUs are recorded

        Raises UnavailableError if the server does not answer.
        """
        import wandb

        self._values = WandbValues(folder)
        self._sent_alerts: set[str] = set()
        self._identity = identity
        if mode == "online" and not is_reachable(url := client_settings().base_url):
            raise UnavailableError(f"{url} does not answer")
        # The client records the session's command, without secrets, and not this process's.
        command = identity.config.get("session", {}).get("command", [])
        settings = _settings(command, finish_seconds, trainer_pid)
        with _replaced(sys, "argv", command or sys.argv):
            self._run = wandb.init(
                **destination_of(folder, identity),
                dir=client_folder,
                id=identity.run_id,
                resume="allow",
                mode=mode,
                config=identity.config,
                allow_val_change=True,
                settings=settings,
            )
        self._run.define_metric(IMAGES_SEEN)
        self._run.define_metric("*", step_metric=IMAGES_SEEN)
        self._offline_progress: Path | None = None
        if mode == "online":
            # One more than the last step that the server has; zero if it does not know the run.
            self.next_step = self._starting_step = self._run.starting_step
            self.location = str(self._run.url)
            note_connection(folder, self.location, self.next_step)
            # W&B gets all rows from the record now, so `wandb sync` must not send them again.
            for path in {folder.path, client_folder_of(folder)}:
                _mark_as_sent(path / "wandb", identity.run_id)
        else:
            self._offline_progress = folder.offline_progress(identity.run_id)
            self.next_step = _next_offline_step(self._offline_progress)
            self._starting_step = sys.maxsize  # there is no server to ask
            self.location = str(Path(self._run.dir).parent)

    def send(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> int:
        """Sends, in order, the (step, row) pairs that W&B lacks; returns their number."""
        missing = ((step, row) for step, row in rows if step >= self.next_step)
        sent = 0
        while batch := [*islice(missing, _BATCH_ROWS)]:
            if self._offline_progress is not None:
                self._offline_progress.write_text(json.dumps({"step": batch[-1][0]}))
            for step, row in batch:
                # Without `commit`, the client would hold the row back until the next step.
                self._run.log(self._values.convert(row), step=step, commit=True)
                self.next_step = step + 1
            sent += len(batch)
        return sent

    def send_alerts(self, alerts: Iterable[Alert]) -> None:
        """Sends the kinds that W&B has not sent before: the run's summary keeps which it has."""
        for alert in alerts:
            name = f"alerts/{alert.kind}"
            if name not in self._sent_alerts and self._run.summary.get(name) is None:
                level = "INFO" if alert.kind == "finish" else "WARN"
                self._run.alert(alert.title, alert.text, level=level)
                self._run.summary[name] = alert.text
            self._sent_alerts.add(name)

    def _declare_dataset(self) -> None:
        """Makes the data the run's input: a small artifact, the same for all runs with the same
        data. Its content is their fingerprint; the data stay where they are."""
        import wandb

        dataset = self._identity.dataset
        is_offline = self._offline_progress is not None  # the client cannot declare inputs then
        if not dataset or is_offline:
            return
        try:
            if self._run.summary.get(_DATASET) == dataset["fingerprint"]:
                return
            artifact = wandb.Artifact(dataset["name"], type="dataset", metadata=dataset)
            with artifact.new_file("fingerprint.txt") as file:
                file.write(dataset["fingerprint"] + "\n")
            self._run.use_artifact(artifact)
            self._run.summary[_DATASET] = dataset["fingerprint"]
        except Exception as error:
            logger.warning("W&B does not show which data the run used: %s", error)

    def upload_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Uploads the files that a checkpoint lists as an artifact. One that W&B has already does
        not get a new version.

        Raises ValueError for a file that lies elsewhere, and an error of the client's if it takes
        longer than five minutes.
        """
        import wandb

        path = Path(checkpoint.path)
        name = f"checkpoint-{self._identity.run_id}"
        artifact = wandb.Artifact(name, type="model", metadata={"folder": path.name})
        for file in (CHECKSUMS, *load_checksums(path)):
            checked = file_within(path, file)
            # The defaults copy every file twice first.
            artifact.add_file(str(checked), policy="immutable", skip_cache=True)
        logged = self._run.log_artifact(artifact, aliases=checkpoint.aliases)
        if self._offline_progress is None:  # online: `finish` drops what has not arrived by then
            logged.wait(timeout=int(CHECKPOINT_SECONDS))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Ends the session of the W&B run.

        Raises TimeoutError if uploads take too long, UnavailableError if not all rows have arrived.
        """
        # In a thread, since the client waits for the server without a limit.
        declaration = threading.Thread(target=self._declare_dataset, daemon=True)
        declaration.start()
        declaration.join(_DECLARATION_SECONDS)
        # W&B has the last row's values under their own names.
        self._run.summary.update({k: v for k, v in summary.items() if k != "last"})
        if exit_code in (EXIT_REQUEUE, EXIT_RANK_LOST):  # W&B would call it failed
            with contextlib.suppress(Exception):
                self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)
        deadline = time.monotonic() + _ARRIVAL_SECONDS
        while not self.has_arrived(self.next_step, _ARRIVAL_SECONDS):
            if time.monotonic() > deadline:
                raise UnavailableError("the server has not taken all rows")
            time.sleep(0.2)

    def has_arrived(self, next_step: int, answer_seconds: int) -> bool:
        """Asks the server whether it has the row before `next_step`.

        The client reports nothing when the server refuses rows (403), and drops them.
        """
        if next_step <= self._starting_step:
            return True
        import wandb

        api = wandb.Api(timeout=answer_seconds)
        return api.run(self._run.path).lastHistoryStep >= next_step - 1


def _settings(command: list[str], finish_seconds: float, trainer_pid: int | None) -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",  # log.txt has it; a progress bar would be uploaded line by line
        disable_code=True,
        init_timeout=30.0,
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
        # A killed process loses this much of an offline run; the default is 15 s.
        x_transaction_log_flush_interval=1.0,
        x_disable_stats=trainer_pid is None,
        x_stats_pid=trainer_pid or os.getpid(),
        program=command[0] if command else None,
    )


class WandbValues:
    """Converts rows to the client's types. A value that W&B cannot take is left out, with a warning
    for the first, so that it does not hold up later rows."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._has_warned = False

    def convert(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, value in row.items():
            try:
                values[name] = self._convert_value(name, value)
            except Exception as error:
                if not self._has_warned:
                    reason = f"{type(error).__name__}: {error}"
                    logger.warning(
                        "W&B cannot take %s (%s); it gets the rows without such values",
                        name,
                        reason,
                    )
                self._has_warned = True
        return values

    def _convert_value(self, name: str, value: Any) -> Any:
        import wandb
        from PIL import Image

        if isinstance(value, dict):
            return wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
        if not isinstance(value, str) or not name.startswith(_SAMPLES):
            return value
        path = file_within(self._folder.samples, value.removeprefix("samples/"))
        # Pillow refuses large grids as decompression bombs, but these images are the run's own.
        with _replaced(Image, "MAX_IMAGE_PIXELS", None), Image.open(path) as image:
            is_large = max(image.size) > _MAX_SIDE
            if path.suffix == ".jpg" and not is_large:
                return wandb.Image(str(path))
            if is_large:
                image.thumbnail((_MAX_SIDE, _MAX_SIDE))
            return wandb.Image(image.convert("RGB"), file_type="jpg")


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Sets a module's variable for the length of the block."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _mark_as_sent(client_files: Path, run_id: str) -> None:
    for path in client_files.glob(f"offline-run-*/run-{run_id}.wandb"):
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}.synced").touch()


def _next_offline_step(path: Path) -> int:
    """One more than the last step in the files of any offline session: `wandb sync` of two files
    that share a step would show the rows of both."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads(path.read_text())["step"]) + 1
    return 0
