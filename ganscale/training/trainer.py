"""The training loop, section by section. Time is counted in images that the critic has seen."""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ganscale.checkpoints.background_writer import CheckpointWriter
from ganscale.config import Resolved
from ganscale.data.batch import allocate_batch
from ganscale.data.dataset import open_data
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
from ganscale.evaluation.figures import IDENTITY, is_figure
from ganscale.files import is_users_mistake
from ganscale.metrics.profiling import profile_cycles, section
from ganscale.objectives.objective import build_objective
from ganscale.run_folder import RunFolder
from ganscale.runtime import Runtime
from ganscale.supervision.job_history import note_started
from ganscale.supervision.progress import Progress
from ganscale.supervision.signals import StopRequest
from ganscale.tracking.console import setup_logging
from ganscale.tracking.record import Record
from ganscale.tracking.uploader_messages import CHECKPOINT_SECONDS
from ganscale.training.augmentation import check_augmentation
from ganscale.training.cycle import Cycle
from ganscale.training.data_flow import batches_per_cycle, check_data_flow, data_position
from ganscale.training.device_batch import draws_ahead
from ganscale.training.device_prefetcher import DevicePrefetcher
from ganscale.training.evaluations import EVALUATED, Evaluation, Evaluations
from ganscale.training.invariance_checks import check_batch_divides
from ganscale.training.memory_shortage import memory_shortage_explained
from ganscale.training.network_setup import class_count
from ganscale.training.replica_audit import audit_replicas
from ganscale.training.resume import accept_settings, open_run
from ganscale.training.run_reporter import RunReporter
from ganscale.training.start import describe_start
from ganscale.training.state import TrainingState

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 2 * CHECKPOINT_SECONDS + 30
"""How long rank 0 may take to close its records while the other ranks wait for it."""

_CONTINUE, _STOP_REQUESTED, _CHECKPOINT_FAILED, _DATA_FAILED = range(4)


class Trainer:
    """One session of a run: from its newest checkpoint, or the start, to its end or a stop."""

    def __init__(
        self,
        resolved: Resolved,
        runtime: Runtime,
        stop: StopRequest | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises UserError for every mistake that can be found before the first step."""
        self.config = config = resolved.config
        self.runtime = runtime
        self.stop = stop or StopRequest()
        self.progress = progress or Progress()
        mark, retry_seconds = self.progress.mark, config.data.retry_seconds
        mark("looking at the data", retry_seconds)
        check_batch_divides(config.training, runtime.world_size)
        self.objective = build_objective(config.objective)
        check_augmentation(config, self.objective)
        check_data_flow(config, self.objective)
        self.data = open_data(config.data)
        runtime.run_on_main(lambda: self.data.check(runtime.node_share))
        num_classes = class_count(config, self.data)
        self.folder = RunFolder(Path(config.run.folder) / config.run.name)
        self.progress.run_folder = self.folder
        mark("building the networks")
        with self._memory_explained():
            self.state = TrainingState(config, self.objective, runtime, num_classes)

        mark("loading the feature network", retry_seconds)
        with self._memory_explained():
            self.evaluations = Evaluations(config, self.data, runtime, self.state)
        self.cycle = Cycle(config, self.objective, runtime, self.state)

        setup_logging(self.folder.log, runtime.rank)
        mark("opening the run folder", retry_seconds)
        self._run = self.folder, resolved, self.data.fingerprint
        opened = runtime.run_on_main(lambda: open_run(*self._run))
        checkpoint, self.changed_settings = opened
        try:
            mark("loading the checkpoint")
            if checkpoint is not None:
                self.state.load(checkpoint)
        except BaseException:
            self.folder.close()
            raise
        self.resumed_at = None if checkpoint is None else self.state.images_seen
        networks, ranks = (self.state.generator, self.state.critic), runtime.world_size
        where = config, self.data, *networks, runtime.device, ranks, self.resumed_at
        for line in describe_start(*where):
            logger.info(line)
        self.writer = CheckpointWriter(  # used on rank 0
            self.folder.checkpoints,
            config.checkpoint,
            flush_first=[self.folder.record],
            on_progress=lambda: self.progress.mark("checkpoint"),
        )
        self.progress.before_abort = self.writer.wait
        self.newest_metrics: dict[str, Any] = {}  # the newest value of every name

    def run(self) -> int:
        """Trains to the end or to a request to stop; the exit code says which."""
        # The folder's lock is released last: nobody else may train here during a write.
        with contextlib.closing(self.folder), contextlib.closing(self.writer):
            is_over = self.state.images_seen >= self.config.training.total_images
            if is_over and not self._lacks_evaluation():
                logger.info("the run in %s is finished already", self.folder.path)
                return EXIT_DONE
            return self._session()

    def _session(self) -> int:
        state, config = self.state, self.config
        rank, world_size = self.runtime.rank, self.runtime.world_size
        state.sessions.append({"images_seen": state.images_seen, "world_size": world_size})
        batches = batches_per_cycle(config)
        is_cuda = self.runtime.device.type == "cuda"
        loader = start_loader(
            self.data,
            partial(allocate_batch, is_pinned=is_cuda),
            batches_ahead=batches,
            draws=draws_ahead(config, self.objective),
            seed=config.seed,
            global_batch_size=config.training.global_batch_size,
            rank=rank,
            world_size=world_size,
            position=data_position(config, state.images_seen),
        )
        prefetcher = DevicePrefetcher(loader, self.runtime, batches)
        with contextlib.closing(loader):
            fingerprint = self.data.fingerprint
            history = self.folder, fingerprint, self.resumed_at, self.changed_settings
            reporter = RunReporter(config, self.objective, *history, self.runtime, state)
            try:
                cycles = config.profile.cycles if self.runtime.is_main else 0
                profiled = profile_cycles(self.folder.profile, cycles)
                with self._memory_explained(state.group_size), profiled as after_cycle:
                    exit_code = self._train(prefetcher, reporter, after_cycle)
            except BaseException as error:
                self.progress.mark("end", CLOSING_SECONDS)
                is_ours = isinstance(error, GanscaleError)
                reporter.close(error.exit_code if is_ours else EXIT_FAILED, error)
                raise
            self.progress.mark("end", CLOSING_SECONDS)
            reporter.close(exit_code)
        return exit_code

    def _train(
        self, prefetcher: DevicePrefetcher, reporter: RunReporter, after_cycle: Callable[[], None]
    ) -> int:
        """The loop. One function of more than sixty lines, so that it reads in order."""
        state, cycle, config = self.state, self.cycle, self.config
        mark, retry_seconds = self.progress.mark, config.data.retry_seconds
        ending = self._begin(prefetcher, reporter)
        if ending != _CONTINUE:
            return self._stopped(ending, prefetcher)
        self.runtime.run_on_main(lambda: accept_settings(*self._run))
        while state.images_seen < config.training.total_images:
            before, after = state.images_seen, state.images_seen + cycle.images
            is_last = after >= config.training.total_images
            is_logged = is_last or _crosses(before, after, config.log.every_images)
            is_sampled = is_last or _crosses(before, after, config.samples.every_images)
            is_evaluated = self.evaluations.is_due(before, after)

            # Data: this cycle's batches, and those of the next
            batches = prefetcher.take()
            reporter.add_real_images(batches)
            mark("data", retry_seconds)
            if not is_last:
                prefetcher.prefetch(self.stop.is_requested)
            votes = [self._start_vote(prefetcher)]

            # Critic, generator and EMA. Rows, samples and figures must not count skipped updates as
            # training; on a CPU, checking for them waits for nothing
            checks = is_logged or is_sampled or is_evaluated or self.runtime.device.type == "cpu"
            logits = cycle.run(
                batches,
                is_logged=is_logged,
                on_phase=mark,
                before_ema=partial(self._check_finite, reporter, is_due=checks),
            )
            reporter.show_progress()

            # Metrics
            if is_logged:
                mark("metrics")
                bad_samples = prefetcher.pop_bad_samples()
                wait_seconds = prefetcher.pop_wait_seconds()
                self.newest_metrics |= reporter.log_metrics(logits, wait_seconds, bad_samples)

            # Samples: a stop gives up all but the last grid of a run, which nobody would make
            # later; it then takes effect in this cycle
            if is_sampled:
                mark("samples")
                reporter.make_samples(partial(self._is_stopped, is_last=is_last))
                votes.append(self._start_vote(prefetcher))

            # Evaluation: a stop gives it up, and it is made after the resume
            evaluation = None
            if is_evaluated:
                evaluation = self._evaluate(reporter)
                votes.append(self._start_vote(prefetcher))

            # Audit and checkpoint: only what is the same on all ranks is saved
            mark("vote", retry_seconds)  # ranks may wait for data
            ending = max(vote() for vote in votes)
            is_done = is_last and (not is_evaluated or evaluation is not None)
            stops = ending != _CONTINUE and not is_done
            is_new_best = evaluation is not None and evaluation.is_new_best
            is_due = _crosses(before, after, config.checkpoint.every_images)
            saves = is_last or stops or is_due or is_new_best
            if saves or _crosses(before, after, config.audit.every_images):
                mark("audit")
                self._audit(reporter)
            if saves:
                mark("checkpoint")
                state.bad_samples.update(prefetcher.pop_bad_samples())
                self._save(must_succeed=is_last or stops)
            after_cycle()

            # Stop
            if stops:
                return self._stopped(ending, prefetcher)
        return EXIT_DONE

    def _begin(self, prefetcher: DevicePrefetcher, reporter: RunReporter) -> int:
        """Makes the samples and the evaluation that an interrupted session left out, and fetches
        the first batches."""
        if self.runtime.is_main:
            note_started(self.state.images_seen)
        seen, every = self.state.images_seen, self.config.samples.every_images
        had_samples = seen == 0 or _crosses(seen - self.cycle.images, seen, every)
        if had_samples and reporter.lacks_samples():
            self.progress.mark("samples")
            reporter.make_samples(self._is_stopped)
        if self._lacks_evaluation():
            evaluation = self._evaluate(reporter)
            if evaluation is not None:  # its row is not made again, so neither are its best figures
                self._save(must_succeed=False)
        self.progress.mark("data", self.config.data.retry_seconds)
        prefetcher.prefetch(self.stop.is_requested)
        return self._start_vote(prefetcher)()

    def _lacks_evaluation(self) -> bool:
        """Whether one was due after the newest cycle and has not been made. Collective."""
        seen = self.state.images_seen
        if not seen or not self.evaluations.is_due(seen - self.cycle.images, seen):
            return False
        record = Record(self.folder.record)
        return not self.runtime.run_on_main(lambda: record.has(EVALUATED, seen))

    @section("evaluation")
    def _evaluate(self, reporter: RunReporter) -> Evaluation | None:
        """Evaluates and logs the figures; None when stopped meanwhile. Collective."""
        mark, seconds = self.progress.mark, self.config.data.retry_seconds
        on_round = lambda *_: mark("evaluation", seconds)  # noqa: E731
        evaluation = self.evaluations.make(self.stop.is_requested, on_round)
        if evaluation is not None:
            reporter.log_evaluation(evaluation.row)
            self.newest_metrics |= evaluation.row
        return evaluation

    def _start_vote(self, prefetcher: DevicePrefetcher) -> Callable[[], int]:
        """Begins to agree on whether and why to stop; the largest vote of any rank counts."""
        vote = _CONTINUE
        if prefetcher.has_failed:
            vote = _DATA_FAILED
        elif self.writer.should_stop:
            vote = _CHECKPOINT_FAILED
        elif self.stop.is_requested():
            vote = _STOP_REQUESTED
        return self.runtime.start_max(vote)

    def _is_stopped(self, *, is_last: bool = False) -> bool:
        """Asked between chunks of sampled images; the last grid of a run is made in any case."""
        self.progress.mark("samples")
        return self.stop.is_requested() and not is_last

    def _stopped(self, ending: int, prefetcher: DevicePrefetcher) -> int:
        """Ends the session on all ranks. Raises the error that ended the data, if one did."""
        if ending == _DATA_FAILED:
            raise prefetcher.failure()
        level, reason = logging.INFO, "on request"  # which is not a fault
        if ending == _CHECKPOINT_FAILED:
            level, reason = logging.WARNING, "since a checkpoint could not be written"
        if self.runtime.is_main:
            seen = f"{self.state.images_seen:,}"
            logger.log(level, "stopped %s at %s images; the same command continues", reason, seen)
        return EXIT_REQUEUE

    def _memory_explained(self, group_size: int = 1) -> AbstractContextManager[None]:
        shared = self.config.training, self.runtime, self.progress
        return memory_shortage_explained(*shared, group_size)

    @section("audit")
    def _audit(self, reporter: RunReporter) -> None:
        self._check_finite(reporter, {})  # skipped updates must not count as images seen
        audit_replicas(self.state.audited(), self.runtime)
        self.state.health.audits_passed += 1

    def _check_finite(
        self, reporter: RunReporter, logits: dict[str, Tensor], is_due: bool = True
    ) -> None:
        """Raises NonFiniteError once a gradient was not finite: after saving the state before it,
        which the guard has kept, and, at the images of that state, a row that shows what led to it.
        """
        state = self.state
        if not is_due or not state.non_finite_guard.has_tripped():
            return
        skipped = int(state.critic_updater.optimizer.skipped_steps.item())
        failed_at = state.images_seen - skipped * self.config.training.global_batch_size
        state.images_seen = failed_at
        state.steps -= int(state.generator_updater.optimizer.skipped_steps.item())
        state.health.non_finite_events += 1
        kept = "the weights before it were not finite either; continue from an older checkpoint"
        if is_good := state.is_finite():
            kept = "the last good state is saved; continue"
        reason = (
            f"a gradient became NaN or infinite after {failed_at:,} images: {kept} with a lower "
            "learning rate, say, and resume.allow=[optimizer]"
        )
        # It empties the meters: sums that are not finite would end the resumed run.
        reporter.log_last_row(reason, logits)
        if is_good:
            self._save(must_succeed=True)
        raise NonFiniteError(reason)

    @section("checkpoint")
    def _save(self, *, must_succeed: bool) -> None:
        """Waits for a copy in memory only; for the disk, too, if it must succeed."""
        numbers, images_seen = self.state.numbers(), self.state.images_seen

        def save() -> None:
            best = self.config.checkpoint.best
            score = self.newest_metrics.get(best)
            identity = self.newest_metrics.get(IDENTITY, "") if is_figure(best) else ""
            state = {**numbers, "fingerprints": self.state.fingerprints()}
            self.writer.save(images_seen, self.state.files(), state, score, identity)
            if not must_succeed:
                return
            try:
                self.writer.finish()
            except OSError as error:
                message = f"no checkpoint could be written at {images_seen:,} images: {error}"
                kind = UserError if is_users_mistake(error) else UnavailableError
                raise kind(message) from error

        self.runtime.run_on_main(save)


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
