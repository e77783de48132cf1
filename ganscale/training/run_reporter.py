"""What rank 0 tells about a run: rows, sample grids, the summary, and where everything lies."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ganscale.checkpoints.checkpoint import newest_name
from ganscale.data.bad_samples import bad_sample_rows, check_bad_sample_limit
from ganscale.data.batch import Batch
from ganscale.errors import EXIT_DONE, NonFiniteError
from ganscale.evaluation.sample_grids import SampleGrids
from ganscale.metrics.performance import Interval, PerformanceMeter
from ganscale.metrics.profiling import section
from ganscale.metrics.rows import metrics_row
from ganscale.run_folder import RunFolder, write_summary
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.tracking.console import Console
from ganscale.tracking.provenance import append_session, session_facts
from ganscale.tracking.tracker import Tracker
from ganscale.tracking.wandb_identity import artifacts_to_upload, wandb_identity
from ganscale.training.device_prefetcher import DevicePrefetcher
from ganscale.training.state import TrainingState

logger = logging.getLogger(__name__)


class RunReporter:
    """What rank 0 tells the world about the run; the other ranks only take part in the sums."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        resumed_at: int | None,
        runtime: Runtime,
        state: TrainingState,
        prefetcher: DevicePrefetcher,
    ) -> None:
        self._config = config
        self._folder = folder
        self._runtime = runtime
        self._state = state
        self._feed = prefetcher
        self.newest_row: dict[str, Any] = {}
        self._tracker: Tracker | None = None
        self._console: Console | None = None
        self._pictures: SampleGrids | None = None
        runtime.run_on_main(lambda: self._open(resumed_at))
        self._speed = PerformanceMeter(config, runtime, state)

    def _open(self, resumed_at: int | None) -> None:
        """On rank 0, whose UserError (online without a key) ends every rank."""
        config, folder = self._config, self._folder
        fingerprint = json.loads(folder.identity.read_text())["fingerprint"]
        facts = session_facts(self._runtime, self._state.images_seen, fingerprint)
        append_session(folder.sessions, facts)
        self._tracker = Tracker(
            folder.path,
            wandb_identity(config, folder),
            config.log.wandb,  # type: ignore[arg-type]
            resumed_at,
            changes=folder.changes,
            alerts=config.log.alerts,
        )
        self._pictures = SampleGrids(config, folder, self._state)
        self._console = Console(config.training.total_images, folder.log)
        if resumed_at is not None:
            self._console.message(f"continues at {resumed_at:,} images")

    @section("logging")
    def metrics(self) -> None:
        """One row of everything since the last one. On every rank: it sums over the ranks.

        Raises NonFiniteError, after logging the row, where a loss is not finite.
        """
        state, prefetcher = self._state, self._feed
        prefetcher.count_bad_samples(state.bad_samples)
        row = metrics_row(state, self._runtime, self._config.training.total_images)
        interval = self._speed.interval(prefetcher.waited_seconds)
        row |= self._speed.row(interval)
        prefetcher.waited_seconds = 0.0
        losses = {name: value for name, value in row.items() if name.startswith("loss/")}
        bad_samples = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad_samples:
            state.health.non_finite_events += 1
            row["audit/non_finite"] += 1
        self.newest_row = row
        self._log(row, interval)
        limit = self._config.data.bad_sample_limit
        check_bad_sample_limit(state.bad_samples, state.images_seen, limit)
        for name in bad_samples:
            raise NonFiniteError(
                f"{name} became {row[name]} within the {interval.images:,} images "
                f"before {state.images_seen:,}, with finite gradients: the newest checkpoint "
                "is the last good state"
            )

    @section("logging")
    def last_row(self, why: str) -> None:
        """Of a run that `why` ends, at the images it will continue from: the updates that were
        held back are in the figures. Without `perf/`, since no cycle ends here. On every rank.
        """
        row = metrics_row(self._state, self._runtime, self._config.training.total_images)
        if self._tracker is not None:
            self._tracker.alert("nan", "not finite", why, self._state.images_seen)
        self._log(row, self._speed.interval(0.0))

    def _log(self, row: dict[str, Any], interval: Interval) -> None:
        state = self._state
        state.seconds += interval.seconds
        if self._tracker is not None and self._console is not None:
            self._tracker.log(row, step=state.steps, images_seen=state.images_seen)
            images_per_second = interval.images / max(interval.seconds, 1e-9)
            self._console.update(state.images_seen, images_per_second, row)

    @section("samples")
    def samples(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """The run's pictures for its fixed latents; given up when stopped, and made at resuming."""
        if self._tracker is None or self._pictures is None:
            return
        try:
            files = self._pictures.make(is_stopped)
        except OSError as error:
            logger.error("no samples could be written: %s", error)
            return
        if files:
            self._log_pictures(files)

    def lacks_samples(self) -> bool:
        """Whether the pictures for the images seen so far are still to be made. On rank 0."""
        return self._pictures is not None and self._pictures.are_missing()

    def real_images(self, batches: Sequence[Batch]) -> None:
        """Keeps the first images that rank 0 trains on as a picture; later it does nothing."""
        if self._pictures is None:
            return
        try:
            path = self._pictures.real(batches)
        except OSError as error:
            logger.error("no picture of real images could be written: %s", error)
            return
        if path is not None:
            self._log_pictures({"samples/real": path})

    def _log_pictures(self, files: dict[str, Path]) -> None:
        assert self._tracker is not None
        self._tracker.log_images(files, step=self._state.steps, images_seen=self._state.images_seen)

    def close(self, exit_code: int, cause: BaseException | None = None) -> None:
        """Writes the summary and ends W&B's part; says where everything lies.

        cause: what ended the session, if something did
        """
        if self._tracker is None or self._console is None:
            return
        state, folder = self._state, self._folder
        summary: dict[str, Any] = {
            "images_seen": state.images_seen,
            "steps": state.steps,
            "training_seconds": round(state.seconds, 3),
            "images_per_second": round(state.images_seen / max(state.seconds, 1e-9), 1),
            "exit_code": exit_code,
            "bad_samples": state.bad_samples.total(),
            "bad_samples_by_shard": bad_sample_rows(state.bad_samples),
            "sessions": state.sessions,
            "last": {k: v for k, v in self.newest_row.items() if not isinstance(v, dict)},
        }
        try:
            write_summary(folder.summary, summary)
        except OSError as error:
            logger.error("no summary could be written: %s", error)
        if isinstance(cause, NonFiniteError):
            self._tracker.alert("nan", "not finite", str(cause), state.images_seen)
        checkpoints = []
        if exit_code == EXIT_DONE:
            done = f"the run is done in {state.seconds / 3600:.1f} hours of training"
            self._tracker.alert("finish", "done", done, state.images_seen)
            checkpoints = artifacts_to_upload(folder.checkpoints, self._config)
        self._tracker.finish(summary, exit_code, checkpoints)
        checkpoint = newest_name(folder.checkpoints)
        self._console.close()
        if state.bad_samples:
            self._console.message(
                f"bad data:   {state.bad_samples.total():,} samples, replaced by others; which: "
                f"{folder.summary}"
            )
        self._console.message(f"samples:    {folder.samples(state.images_seen)}")
        self._console.message(f"checkpoint: {checkpoint}")
        self._console.message(f"W&B record: {self._tracker.location}")
