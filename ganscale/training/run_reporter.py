"""What rank 0 reports of a run: rows, sample grids, the summary, and where to find them."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ganscale.checkpoints.checkpoint import checkpoint_folders
from ganscale.data.bad_samples import bad_sample_rows, check_bad_sample_limit
from ganscale.data.batch import Batch
from ganscale.errors import EXIT_DONE, NonFiniteError
from ganscale.evaluation.figures import is_figure
from ganscale.evaluation.sample_grids import SampleGrids
from ganscale.metrics.performance import Interval, PerformanceMeter
from ganscale.metrics.profiling import section
from ganscale.objectives.objective import Objective
from ganscale.run_folder import RunFolder, append_json_line
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.tracking.console import Console
from ganscale.tracking.sessions import session_facts
from ganscale.tracking.tracker import Tracker
from ganscale.tracking.wandb_identity import artifacts_to_upload, wandb_identity
from ganscale.training.data_flow import data_position
from ganscale.training.flops import count_cycle_flops
from ganscale.training.metrics_row import metrics_row
from ganscale.training.state import TrainingState

logger = logging.getLogger(__name__)


class RunReporter:
    """Reports a run on rank 0; the other ranks take part in the sums."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        folder: RunFolder,
        fingerprint: str,
        resumed_at: int | None,
        changed_settings: Sequence[str],
        runtime: Runtime,
        state: TrainingState,
    ) -> None:
        self._config, self._folder = config, folder
        self._runtime, self._state = runtime, state
        self._newest_row: dict[str, Any] = {}
        self._tracker: Tracker | None = None
        self._console: Console | None = None
        self._grids: SampleGrids | None = None
        runtime.run_on_main(lambda: self._open(fingerprint, resumed_at, changed_settings))
        flops, networks = None, (state.generator, state.critic)
        if runtime.is_main:
            flops = count_cycle_flops(config, objective, *networks, state.num_classes)
        self._performance = PerformanceMeter(config, runtime, state.images_seen, flops)

    def _open(
        self, fingerprint: str, resumed_at: int | None, changed_settings: Sequence[str]
    ) -> None:
        """On rank 0; its UserError (online without a key) ends every rank."""
        config, folder, state = self._config, self._folder, self._state
        run_id = folder.read_identity()["id"]
        facts = session_facts(self._runtime, run_id, state.images_seen, fingerprint)
        append_json_line(folder.sessions, facts)
        self._tracker = Tracker(
            folder,
            wandb_identity(config, folder),
            config.log.wandb,  # type: ignore[arg-type]
            resumed_at,
            changed_settings=changed_settings,
            alerts=config.log.alerts,
        )
        lacks_real = not self._tracker.has_logged("samples/real")
        networks = state.generator, state.ema
        self._grids = SampleGrids(
            config, folder, *networks, state.num_classes, state.images_seen, lacks_real=lacks_real
        )
        # A run ends with a whole cycle.
        cycle = config.objective.n_critic * config.training.global_batch_size
        cycles = math.ceil((config.training.total_images - state.images_seen) / cycle)
        self._console = Console(state.images_seen + cycles * cycle, folder.log)
        self._console.advance(state.images_seen)

    def show_progress(self) -> None:
        """Shows the images seen between two rows, on rank 0."""
        if self._console is not None:
            self._console.advance(self._state.images_seen)

    @section("logging")
    def log_metrics(
        self,
        logits: dict[str, Tensor],
        data_wait_seconds: float,
        bad_samples: Counter[tuple[str, str]],
    ) -> dict[str, Any]:
        """Logs one row of everything since the last one, and returns it. Collective.

        logits: this rank's in the last critic step
        data_wait_seconds: of this rank; bad_samples: of all ranks; both since the last row

        Raises NonFiniteError where a loss is not finite, and UserError for too many bad samples,
        after logging the row.
        """
        state = self._state
        state.bad_samples.update(bad_samples)
        row = metrics_row(state, self._runtime, self._config.training.total_images, logits)
        interval = self._performance.interval(state.images_seen, data_wait_seconds)
        row |= self._performance.row(interval, state.averaging_seconds())
        losses = [name for name in row if name.startswith("loss/")]
        non_finite = [name for name in losses if not math.isfinite(row[name])]
        if non_finite:
            state.health.non_finite_events += 1
            row["audit/non_finite"] += 1
        self._newest_row = row
        self._log(row, interval)
        limit = self._config.data.max_bad_fraction
        read = data_position(self._config, state.images_seen)
        check_bad_sample_limit(state.bad_samples, read, limit)
        for name in non_finite:
            raise NonFiniteError(
                f"{name} became {row[name]} within the {interval.images:,} images "
                f"before {state.images_seen:,}, with finite gradients: the newest checkpoint "
                "is the last good state"
            )
        return row

    @section("logging")
    def log_last_row(self, reason: str, logits: dict[str, Tensor]) -> None:
        """The row of a run that ends for `reason`, at the images it will continue from, with the
        skipped updates, but without `perf/`, since no cycle ends here. Collective."""
        row = metrics_row(self._state, self._runtime, self._config.training.total_images, logits)
        if self._tracker is not None:
            self._tracker.alert("nan", "not finite", reason, self._state.images_seen)
        self._log(row, self._performance.interval(self._state.images_seen, 0.0))

    def log_evaluation(self, row: dict[str, Any]) -> None:
        """Logs the figures of an evaluation, on rank 0."""
        if self._tracker is None:
            return
        state = self._state
        self._tracker.log(row, step=state.steps, images_seen=state.images_seen)
        figures = [f"{k.removeprefix('eval/')} {row[k]:.4g}" for k in row if is_figure(k)]
        if figures:
            seen, seconds = f"{state.images_seen:,}", row["eval/seconds"]
            logger.info("%s images: %s (%.0f s)", seen, ", ".join(figures), seconds)

    def _log(self, row: dict[str, Any], interval: Interval) -> None:
        state = self._state
        state.seconds += interval.seconds
        if self._tracker is not None and self._console is not None:
            self._tracker.log(row, step=state.steps, images_seen=state.images_seen)
            images_per_second = interval.images / max(interval.seconds, 1e-9)
            self._console.update(state.images_seen, images_per_second, row)

    @section("samples")
    def make_samples(self, is_stopped: Callable[[], bool]) -> None:
        """Makes and logs the sample grids; given up when stopped, and made after the resume."""
        self._log_images("samples", lambda grids: grids.make(self._state.images_seen, is_stopped))

    def lacks_samples(self) -> bool:
        """Whether the record has no row of sample grids at this point of the run. On rank 0."""
        return self._tracker is not None and not self._tracker.has_logged(
            "samples/ema", self._state.images_seen
        )

    def add_real_images(self, batches: Sequence[Batch]) -> None:
        """Makes a grid of the first real images that rank 0 trains on; later it does nothing."""

        def make(grids: SampleGrids) -> dict[str, Path]:
            path = grids.add_real_images(batches)
            return {} if path is None else {"samples/real": path}

        self._log_images("grid of real images", make)

    def _log_images(self, what: str, make: Callable[[SampleGrids], dict[str, Path]]) -> None:
        """Logs the files that `make` returns by name, on rank 0. A full disk is only logged."""
        if self._grids is None or self._tracker is None:
            return
        state = self._state
        try:
            files = make(self._grids)
        except OSError as error:
            logger.error("no %s could be written: %s", what, error)
            return
        if files:
            self._tracker.log(files, step=state.steps, images_seen=state.images_seen)

    def close(self, exit_code: int, cause: BaseException | None = None) -> None:
        """Writes the summary, closes the W&B run, and prints where everything is.

        cause: the error that ended the session, if any
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
            "best_figures": state.best_figures,
            "last": {k: v for k, v in self._newest_row.items() if not isinstance(v, dict)},
        }
        try:
            folder.write_summary(summary)
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
        self._console.close()
        if state.bad_samples:
            logger.info(
                "bad data:   %s bad samples were replaced by others; see %s",
                f"{state.bad_samples.total():,}",
                folder.summary,
            )
        logger.info("samples:    %s", folder.sample_grid(state.images_seen))
        saved = checkpoint_folders(folder.checkpoints)
        logger.info("checkpoint: %s", saved[-1] if saved else None)
        logger.info("W&B record: %s", self._tracker.location)
