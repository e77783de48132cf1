"""The training loop, section by section: data and critic, generator, average, meters, samples,
checkpoint, stop. Time is counted in images that the critic has seen."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from ganscale.checkpoints.writer import CheckpointWriter
from ganscale.config import Resolved
from ganscale.data.dataset import open_data
from ganscale.data.loader import allocate_batch, allocate_pinned_batch
from ganscale.data.loader_process import start_loader
from ganscale.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REQUEUE,
    GanscaleError,
    NonFiniteError,
    UnavailableError,
    UserError,
)
from ganscale.metrics.profiling import profiled, section
from ganscale.objectives.objective import build_objective
from ganscale.run_folder import RunFolder
from ganscale.runtime import Runtime
from ganscale.supervision.job_history import note_started
from ganscale.supervision.progress import Progress
from ganscale.supervision.signals import StopRequest
from ganscale.tracking.console import setup_logging
from ganscale.tracking.uploader_messages import CHECKPOINT_SECONDS
from ganscale.training.cycle import Cycle
from ganscale.training.device_prefetcher import DevicePrefetcher
from ganscale.training.invariance_checks import check_batch_divides
from ganscale.training.network_setup import class_count
from ganscale.training.replica_audit import audit_replicas
from ganscale.training.run_reporter import RunReporter
from ganscale.training.state import TrainingState

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 2 * CHECKPOINT_SECONDS + 30
"""What rank 0 may take to close its records, while the others wait for it."""

_GOES_ON, _STOP_REQUESTED, _CHECKPOINT_FAILED, _DATA_FAILED = range(4)


class Trainer:
    """One session of a run: from its newest checkpoint, or the start, to its end or a stop."""

    def __init__(
        self,
        resolved: Resolved,
        runtime: Runtime,
        stop: StopRequest | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises UserError for whatever can be known to be wrong before the first step."""
        self.config = config = resolved.config
        self.runtime = runtime
        self.stop = stop or StopRequest()
        self.progress = progress or Progress()
        mark, patience = self.progress.mark, config.data.retry_seconds
        mark("looking at the data", patience)
        check_batch_divides(config.training, runtime.world_size)
        self.objective = build_objective(config.objective)
        self.data = open_data(config.data)
        runtime.run_on_main(lambda: self.data.check(runtime.node_share))
        num_classes = class_count(config, self.data)
        mark("building the networks")
        self.state = TrainingState(config, self.objective, runtime, num_classes)

        self.folder = RunFolder(Path(config.run.folder) / config.run.name)
        self.progress.run_folder = self.folder
        setup_logging(self.folder.log, runtime.rank)
        mark("opening the run folder", patience)
        self.run_id, checkpoint = runtime.run_on_main(
            lambda: self.folder.open(resolved, self.data.fingerprint)
        )
        try:
            mark("loading the checkpoint")
            if checkpoint is not None:
                self.state.load(checkpoint)
            runtime.run_on_main(lambda: self.folder.accept(resolved, self.data.fingerprint))
        except BaseException:
            self.folder.close()
            raise
        self.resumed_at = None if checkpoint is None else self.state.images_seen
        self.cycle = Cycle(config, self.objective, runtime, self.state)
        self.writer = CheckpointWriter(  # used on rank 0
            self.folder.checkpoints,
            config.checkpoint,
            companions=[self.folder.record],
            still_writes=lambda: self.progress.mark("checkpoint"),
        )
        self.progress.before_abort = self.writer.wait
        self.newest: dict[str, float] = {}  # of every value that was logged

    def run(self) -> int:
        """Trains to the end or to a request to stop; the exit code says which."""
        # The folder's lock goes last: nobody else may train here while a write is in flight.
        with contextlib.closing(self.folder), contextlib.closing(self.writer):
            if self.state.images_seen >= self.config.training.total_images:
                logger.info("the run in %s is finished already", self.folder.path)
                return EXIT_DONE
            return self._session()

    def _session(self) -> int:
        state, config = self.state, self.config
        state.sessions.append(
            {"images_seen": state.images_seen, "world_size": self.runtime.world_size}
        )
        is_cuda = self.runtime.device.type == "cuda"
        loader = start_loader(
            self.data,
            config.data,
            allocate_pinned_batch if is_cuda else allocate_batch,
            ahead=config.objective.n_critic,
            seed=config.seed,
            global_batch_size=config.training.global_batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            images_seen=state.images_seen,
        )
        prefetcher = DevicePrefetcher(loader, self.runtime, config.objective.n_critic)
        with contextlib.closing(loader):
            reports = RunReporter(
                config, self.folder, self.resumed_at, self.runtime, state, prefetcher
            )
            try:
                cycles = config.profile.cycles if self.runtime.is_main else 0
                profile = profiled(self.folder.path / "profile", cycles)
                with profile as after_cycle:
                    exit_code = self._train(prefetcher, reports, after_cycle)
            except BaseException as error:
                self.progress.mark("end", CLOSING_SECONDS)
                known = isinstance(error, GanscaleError)
                reports.close(error.exit_code if known else EXIT_FAILED, error)
                raise
            self.progress.mark("end", CLOSING_SECONDS)
            reports.close(exit_code)
        return exit_code

    def _train(
        self, prefetcher: DevicePrefetcher, reports: RunReporter, after_cycle: Callable[[], None]
    ) -> int:
        state, cycle, config, stop = self.state, self.cycle, self.config, self.stop
        mark, data_patience = self.progress.mark, config.data.retry_seconds
        if self.runtime.is_main:
            note_started(state.images_seen)
        seen = state.images_seen
        is_due = seen == 0 or _crosses(seen - cycle.images, seen, config.samples.every_images)
        if is_due and reports.lacks_samples():
            reports.samples(self._is_stopped)
        mark("data", data_patience)
        prefetcher.fetch(stop.is_requested)
        ending = self.runtime.start_max(_ending(stop, prefetcher, self.writer))()
        if ending != _GOES_ON:
            return self._stopped(ending, prefetcher)
        while state.images_seen < config.training.total_images:
            before, after = state.images_seen, state.images_seen + cycle.images
            is_last = after >= config.training.total_images
            logs = is_last or _crosses(before, after, config.log.every_images)
            batches = prefetcher.take()
            reports.real_images(batches)
            mark("data", data_patience)
            if not is_last:
                prefetcher.fetch(stop.is_requested)
            votes = [self.runtime.start_max(_ending(stop, prefetcher, self.writer))]

            # Data and critic
            mark("critic")
            cycle.begin(batches, with_panel=logs)
            for step, host_batch in enumerate(batches, 1):
                mark("critic")
                batch = cycle.on_device(host_batch)
                is_last_step = step == len(batches)
                keeps_fakes = is_last_step and config.training.reuse_fakes
                cycle.critic_step(batch, logs and is_last_step, keeps_fakes)

            # Generator and its average; on the CPU, looking at the tripwire waits for nothing. No
            # row of the record may be of images whose updates were held back
            mark("generator")
            cycle.generator_step(batch, with_panel=logs)  # pyright: ignore[reportPossiblyUnboundVariable]
            draws = is_last or _crosses(before, after, config.samples.every_images)
            if logs or draws or self.runtime.device.type == "cpu":
                self._stop_if_not_finite(reports)
            cycle.update_ema()

            # Meters
            if logs:
                mark("meters")
                reports.metrics()
                self.newest |= reports.newest_row

            # Samples
            if draws:
                # The run's last grid is made whatever comes: nobody would make it afterwards
                reports.samples(self._marked if is_last else self._is_stopped)
                # A stop that had them given up has to be this one: they are made at resuming
                votes.append(self.runtime.start_max(_ending(stop, prefetcher, self.writer)))

            # Audit and checkpoint: what is not the same on all ranks is never saved
            mark("vote", data_patience)  # ranks may wait for data
            ending = max(vote() for vote in votes)
            stops = ending != _GOES_ON and not is_last
            saves = is_last or stops or _crosses(before, after, config.checkpoint.every_images)
            if saves or _crosses(before, after, config.audit.every_images):
                mark("audit")
                self._audit(reports)
            if saves:
                mark("checkpoint")
                prefetcher.count_bad_samples(state.bad_samples)
                self._save(must_succeed=is_last or stops)
            after_cycle()

            # Stop
            if stops:
                return self._stopped(ending, prefetcher)
        return EXIT_DONE

    def _is_stopped(self) -> bool:
        """Asked between chunks of sampled images."""
        return self._marked() or self.stop.is_requested()

    def _marked(self) -> bool:
        self.progress.mark("samples")
        return False

    def _stopped(self, ending: int, prefetcher: DevicePrefetcher) -> int:
        """Ends the session on all ranks. Raises what ended the data, if that is why."""
        if ending == _DATA_FAILED:
            raise prefetcher.failure()
        images_seen, failed = self.state.images_seen, ending == _CHECKPOINT_FAILED
        why = "since a checkpoint could not be written" if failed else "on request"
        if self.runtime.is_main:
            logger.warning(
                "stopped %s at %s images; the same command continues", why, f"{images_seen:,}"
            )
        return EXIT_REQUEUE

    @section("audit")
    def _audit(self, reports: RunReporter) -> None:
        self._stop_if_not_finite(reports)  # held back updates must not count as images seen
        audit_replicas(self.state.audited(), self.runtime)
        self.state.health.audits_passed += 1

    def _stop_if_not_finite(self, reports: RunReporter) -> None:
        """Raises NonFiniteError after saving the state that the tripwire has held, and a row that
        shows what came to it: at the images of that state, so that the resumed run keeps it."""
        state = self.state
        if not state.non_finite_guard.has_tripped():
            return
        held_back = int(state.critic_updater.skipped_updates.item())
        failed_at = state.images_seen - held_back * self.config.training.global_batch_size
        state.images_seen = failed_at
        state.steps -= int(state.generator_updater.skipped_updates.item())
        state.health.non_finite_events += 1
        is_good = state.is_finite()
        if is_good:
            kept = "the last good state is saved; continue"
        else:
            kept = "the weights before it were not finite either; continue from an older checkpoint"
        why = (
            f"a gradient became NaN or infinite after {failed_at:,} images: {kept} with a lower "
            "learning rate, say, and resume.allow=[optimizer]"
        )
        # It empties the meters: sums that are not finite would end the resumed run.
        reports.last_row(why)
        if is_good:
            self._save(must_succeed=True)
        raise NonFiniteError(why)

    @section("checkpoint")
    def _save(self, *, must_succeed: bool) -> None:
        """Waits for a copy only, unless it must succeed: then for the disk, too."""
        numbers, images_seen = self.state.numbers(), self.state.images_seen

        def save() -> None:
            score = self.newest.get(self.config.checkpoint.best)
            self.writer.save(images_seen, self.state.files(), numbers, score)
            if must_succeed:
                try:
                    self.writer.finish()
                except OSError as error:
                    message = f"no checkpoint could be written at {images_seen:,} images: {error}"
                    kind = UserError if isinstance(error, PermissionError) else UnavailableError
                    raise kind(message) from error

        self.runtime.run_on_main(save)


def _ending(stop: StopRequest, prefetcher: DevicePrefetcher, writer: CheckpointWriter) -> int:
    """This rank's vote; the largest of all ranks counts."""
    if prefetcher.has_failed:
        return _DATA_FAILED
    if writer.has_failed:
        return _CHECKPOINT_FAILED
    return _STOP_REQUESTED if stop.is_requested() else _GOES_ON


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
