"""A training that is hit by one fault after another, and the same training undisturbed."""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.disk import Disk
from benchmarks.faults.inflicting import (
    TIMEOUT_SECONDS,
    Scene,
    inflict,
    newest_whole,
)
from benchmarks.faults.judging import Judgement, judged
from benchmarks.faults.plan import (
    CHECKPOINT,
    CYCLE,
    FULL_FROM_THE_START,
    KEEP_LAST,
    KEPT,
    ROW,
    SAMPLES,
    Fault,
    images_needed,
)
from benchmarks.faults.session import REPOSITORY, NotSurvived, RunOver, Session
from ganscale.run_folder import RunFolder

_RUN_SECONDS = 900.0  # far more than an undisturbed session needs
_NETWORKS = "benchmarks.tiny_networks"
_N_CRITIC = 2


@dataclass(frozen=True)
class World:
    """The cluster sizes of a run's sessions, and the tolerances of its results.

    ranks: of a session, one of these; undisturbed: ranks of the undisturbed run
    weights, rows: relative tolerances; 0 means the same bits
    """

    name: str
    ranks: tuple[int, ...]
    undisturbed: int
    settings: tuple[str, ...]
    weights: float
    rows: float


WORLDS = (
    # A checkpoint between two rows sums the meters over the ranks and continues from the sum, so
    # float64 sums have another order. At this learning rate, training amplifies a difference in
    # weights 1e10 times within 19,200 images, so none stays hidden.
    World("on 2 ranks", (2,), 2, (), 0.0, 1e-12),
    # On another number of ranks, sums over images have another order. At this learning rate it
    # hardly matters: 5e-15 after 19,200 images and 4e-11 after 35,200; each cycle changes weights
    # by 5e-4.
    World(
        "on 1 or 2 ranks",
        (1, 2),
        1,
        (
            "training.precision=float64",
            "optimizer.critic.learning_rate=5e-5",
            "optimizer.generator.learning_rate=5e-5",
        ),
        1e-9,
        1e-8,
    ),
)


@dataclass
class Result:
    """The result of a campaign.

    wrong: a sentence for each fault that was not survived
    lost: images that were trained again after each fault
    seconds: by kind, from the fault to the end of the session
    """

    world: World
    total_images: int
    judgement: Judgement
    wrong: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        return self.judgement.weight_difference <= self.world.weights


class Campaign:
    """A run with faults, and the same run undisturbed."""

    def __init__(
        self, folder: Path, disk: Disk, data: Path, world: World, faults: Sequence[Fault]
    ) -> None:
        """folder: for the output of sessions; disk: for the run folder"""
        self.world = world
        self.faults = faults
        self.total_images = images_needed(faults)
        self._folder = folder
        self._disk = disk
        self._run = disk.path / "run"
        self._undisturbed = folder / "undisturbed"
        self._data = data
        self._sessions = 0

    def run(self) -> Result:
        start_seconds = self._train_undisturbed()
        scene = Scene(self._run, self._disk, start_seconds)
        result = Result(self.world, self.total_images, Judgement(float("inf"), "it did not finish"))
        for fault in self.faults:
            if not self._inject(fault, scene, result):
                break
        try:
            self._finish(result)
            result.judgement = judged(self._run, self._undisturbed, self.world.rows, scene.full)
        except NotSurvived as problem:
            result.judgement.where = f"the last session: {problem}"
        if result.wrong or result.judgement.losses or not result.is_equal:
            shutil.copytree(self._run, self._folder / "run")  # for inspection
        shutil.rmtree(self._run, ignore_errors=True)
        return result

    def _session(self, run: Path, ranks: int, is_launched: bool = False, *settings: str) -> Session:
        self._sessions += 1
        networks = [
            f"generator={{target: '{_NETWORKS}:TinyGenerator', latent_dim: 6, options: {{}}}}",
            f"critic={{target: '{_NETWORKS}:TinyCritic', options: {{}}}}",
        ]
        arguments = [
            str(REPOSITORY / "configs" / "demo.yaml"),
            *networks,
            f"run.folder={run.parent}",
            f"run.name={run.name}",
            f"data.path={self._data}",
            "data.resolution=8",
            f"objective.n_critic={_N_CRITIC}",
            f"training.global_batch_size={CYCLE // _N_CRITIC}",
            f"training.total_images={self.total_images}",
            f"log.every_images={ROW}",
            f"checkpoint.every_images={CHECKPOINT}",
            f"checkpoint.keep_last={KEEP_LAST}",
            f"checkpoint.keep_every_images={KEPT}",
            f"samples.every_images={SAMPLES}",
            "samples.count=4",
            f"evaluation.every_images={SAMPLES}",
            "evaluation.samples=1000",
            "evaluation.metrics=[fd,kid,precision,coverage]",
            f"evaluation.network={_NETWORKS}:TinyFeatures",
            f"data.cache={self._folder}/cache",
            "checkpoint.best=''",
            "log.wandb=disabled",
            *self.world.settings,
            *settings,
        ]
        folder = self._folder / f"session-{self._sessions:03d}"
        return Session(folder, arguments, ranks, is_launched)

    def _train_undisturbed(self) -> float:
        """Trains undisturbed; returns the seconds from the start to the first row."""
        session = self._session(self._undisturbed, self.world.undisturbed)
        started = time.monotonic()
        try:
            session.wait_for_start(lambda: session.images_seen() is not None, _RUN_SECONDS)
            start_seconds = time.monotonic() - started
            session.wait_for_end(_RUN_SECONDS)
            session.expect_end(0, _RUN_SECONDS)
        finally:
            session.kill()
        return start_seconds

    def _inject(self, fault: Fault, scene: Scene, result: Result) -> bool:
        """Injects the fault and adds the outcome to `result`; False if the run was already over."""
        began, sessions_before = newest_whole(self._run), self._session_starts()
        if fault.variant == FULL_FROM_THE_START:
            self._disk.fill()
        # The timeout also sets how often a rank checks that its launcher is alive.
        waits_for_timeout = fault.kind == "stopped rank" or fault.variant == "launcher killed"
        settings = [f"runtime.timeout_seconds={TIMEOUT_SECONDS}"] if waits_for_timeout else []
        session = self._session(self._run, fault.ranks, fault.is_launched, *settings)
        scene.seconds = None
        wrong = ""
        try:
            inflict(fault, session, scene)
            self._expect_start(began, sessions_before)
        except NotSurvived as problem:
            wrong = str(problem)
        except RunOver:
            return False
        finally:
            session.kill()
            self._disk.free()
        reached = max(session.images_seen() or began, newest_whole(self._run))
        result.lost.append(reached - newest_whole(self._run))
        if wrong:
            result.wrong.append(f"{session.folder.name}: {fault.name}: {wrong}")
        elif scene.seconds is not None:
            kind = fault.kind if fault.kind != "start-up" else f"{fault.kind}, {fault.variant}"
            result.seconds.setdefault(kind, []).append(scene.seconds)
        print(
            f"{session.folder.name}, {reached:,} of {self.total_images:,} images: {fault.name}: "
            f"{wrong or 'survived'}",
            file=sys.stderr,
            flush=True,
        )
        return True

    def _finish(self, result: Result) -> None:
        """Trains the rest of the run. Raises NotSurvived."""
        began, sessions_before = newest_whole(self._run), self._session_starts()
        session = self._session(self._run, self.world.ranks[-1])
        try:
            session.wait_for_end(_RUN_SECONDS)
            session.expect_end(0, _RUN_SECONDS)
        finally:
            session.kill()
        self._expect_start(began, sessions_before)

    def _session_starts(self) -> list[int]:
        """The images seen at the start of each session, from its record."""
        return [facts["images_seen"] for facts in RunFolder(self._run).read_sessions()]

    def _expect_start(self, images: int, before: list[int]) -> None:
        """Of a session that got far enough to record it."""
        new = self._session_starts()[len(before) :]
        if new not in ([], [images]):
            raise NotSurvived(f"it continued at {new} images instead of {images:,}")
