"""The W&B run of a training: what it has, and what it is given."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ganscale.errors import EXIT_RANK_LOST, EXIT_REQUEUE, UnavailableError
from ganscale.tracking.record import IMAGES_SEEN
from ganscale.tracking.superseded_rows import note_connection
from ganscale.tracking.uploader_messages import CHECKPOINT_SECONDS, Checkpoint, WandbIdentity
from ganscale.tracking.wandb_mode import WandbMode, answers, client_settings
from ganscale.tracking.wandb_values import WandbValues

_INIT_SECONDS = 30.0
_ARRIVAL_SECONDS = 2
_ROWS_AT_ONCE = 100


class WandbRun:
    """The only class that calls the client, with `WandbValues`. A call may raise anything, or hang.

    Attributes:
        next_step: W&B has every row of the run with a step below it
        location: an address, or the folder of an offline run
    """

    def __init__(
        self,
        run_folder: Path,
        identity: WandbIdentity,
        mode: WandbMode,
        *,
        client_folder: Path,
        finish_seconds: float,
        trainer_pid: int | None = None,
    ) -> None:
        """client_folder: where the client keeps files of its own, in a folder `wandb`
        trainer_pid: the process whose CPU, memory and GPUs are recorded

        Raises UnavailableError when the server does not answer.
        """
        import wandb

        self._values = WandbValues(run_folder)
        self._alerts: set[str] = set()
        self._checkpoints = f"checkpoint-{identity.run_id}"
        if mode == "online" and not answers(url := client_settings().base_url):
            raise UnavailableError(f"{url} does not answer")
        settings = wandb.Settings(
            silent=True,
            console="off",  # log.txt has it; a progress bar would be uploaded line by line
            disable_code=True,
            init_timeout=_INIT_SECONDS,
            finish_timeout=finish_seconds,
            finish_timeout_raises=True,
            # The default of 15 s is what a killed process loses of an offline run.
            x_transaction_log_flush_interval=1.0,
            x_disable_stats=trainer_pid is None,
        )
        if trainer_pid is not None:
            settings.x_stats_pid = trainer_pid
        # As it is kept of the session: without secrets.
        command = identity.config.get("session", {}).get("command", [])
        settings.program = command[0] if command else None
        with _as_command(command):
            self._run = wandb.init(
                dir=client_folder,
                project=identity.project,
                name=identity.name,
                id=identity.run_id,
                resume="allow",
                mode=mode,
                config=identity.config,
                allow_val_change=True,
                settings=settings,
            )
        self._run.define_metric(IMAGES_SEEN)
        self._run.define_metric("*", step_metric=IMAGES_SEEN)
        self._given: Path | None = None
        if mode == "online":
            # Zero, unless the server knows the run: then one more than the last step that it has.
            self.next_step = self._starting_step = self._run.starting_step
            self.location = str(self._run.url)
            note_connection(run_folder, self.location, self.next_step)
            _mark_synchronized(run_folder, identity.run_id)
        else:
            self._given = run_folder / "wandb" / f"given-{identity.run_id}.json"
            self.next_step = _given_before(self._given)
            self._starting_step = sys.maxsize  # there is no server to ask
            self.location = str(Path(self._run.dir).parent)

    def send(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> int:
        """Sends those of (step, row) that W&B lacks, in order; returns how many that were."""
        missing = ((step, row) for step, row in rows if step >= self.next_step)
        sent = 0
        while part := [*islice(missing, _ROWS_AT_ONCE)]:
            if self._given is not None:
                self._given.write_text(json.dumps({"step": part[-1][0]}))
            for step, row in part:
                # Without `commit`, the client would hold the row back until the next step.
                self._run.log(self._values.of(row), step=step, commit=True)
                self.next_step = step + 1
            sent += len(part)
        return sent

    def alert(self, kind: str, title: str, text: str) -> None:
        """Has W&B tell the user, unless it did so before: it keeps that in the run's summary."""
        name = f"alerts/{kind}"
        if name in self._alerts:
            return
        self._alerts.add(name)
        if self._run.summary.get(name) is None:
            self._run.alert(title, text, level="INFO" if kind == "finish" else "WARN")
            self._run.summary[name] = text

    def keep_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Uploads a folder as an artifact. One that W&B has already becomes no new version.

        Raises an error of the client's where it takes longer than five minutes.
        """
        import wandb

        path = Path(checkpoint.path)
        artifact = wandb.Artifact(self._checkpoints, type="model", metadata={"folder": path.name})
        # Else every file would first be copied, twice.
        artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        logged = self._run.log_artifact(artifact, aliases=checkpoint.aliases)
        if self._given is None:  # online: what has not arrived by the end of the run is given up
            logged.wait(timeout=int(CHECKPOINT_SECONDS))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Ends the session of the W&B run.

        Raises TimeoutError where uploads take too long, UnavailableError where W&B has not got all
        the rows that it was sent.
        """
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
        """Whether W&B has the row before `next_step`, by what the server says.

        The client says nothing when the server refuses rows (403) and it gives them up.
        """
        if next_step <= self._starting_step:
            return True
        import wandb

        api = wandb.Api(timeout=answer_seconds)
        return api.run(self._run.path).lastHistoryStep >= next_step - 1


@contextlib.contextmanager
def _as_command(command: list[str]) -> Iterator[None]:
    """Has the client take `command`, that of the training, for the one that runs here."""
    own, sys.argv = sys.argv, command or sys.argv
    try:
        yield
    finally:
        sys.argv = own


def _given_before(path: Path) -> int:
    """One more than the last step that any offline session wrote into its files.

    A run that is resumed repeats what came after its checkpoint. Its offline files share no step,
    since `wandb sync` of two that do would show the rows of both.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads(path.read_text())["step"]) + 1
    return 0


def _mark_synchronized(run_folder: Path, run_id: str) -> None:
    """Keeps `wandb sync` from sending the rows of offline sessions a second time: from here on,
    W&B gets all rows from the record."""
    for path in (run_folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"):
        with contextlib.suppress(OSError):
            path.with_name(f"{path.name}.synced").touch()
