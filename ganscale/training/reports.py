"""What rank 0 tells about a run: rows, sample grids, the summary, and where everything lies."""

import logging
import math
import time
from typing import Any

import torch
from omegaconf import OmegaConf

from ganscale.data.broken import broken_rows, check_broken_limit
from ganscale.data.contact_sheet import image_grid, to_picture
from ganscale.errors import NonFiniteError
from ganscale.evaluation.sampling import generate_array, sample_labels, sample_latents
from ganscale.runtime import Runtime
from ganscale.schema import Config
from ganscale.tracking.console import Console
from ganscale.tracking.tracker import Tracker
from ganscale.training.checkpoint import newest_name
from ganscale.training.feed import Feed
from ganscale.training.profiling import section
from ganscale.training.run_folder import RunFolder, write_summary
from ganscale.training.state import TrainingState

logger = logging.getLogger(__name__)


class Reports:
    """What rank 0 tells the world about the run; the other ranks only take part in the sums."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        run_id: str,
        resumed_at: int | None,
        runtime: Runtime,
        state: TrainingState,
        feed: Feed,
    ) -> None:
        self._config = config
        self._folder = folder
        self._runtime = runtime
        self._state = state
        self._feed = feed
        self._last_row: dict[str, float] = {}
        self._tracker: Tracker | None = None
        self._console: Console | None = None
        runtime.from_main(lambda: self._open(run_id, resumed_at))
        self._since = (time.perf_counter(), state.images_seen)

    def _open(self, run_id: str, resumed_at: int | None) -> None:
        """On rank 0, whose UserError (online without a key) ends every rank."""
        config, folder = self._config, self._folder
        self._tracker = Tracker(
            folder.path,
            project=config.log.project,
            name=config.run.name,
            mode=config.log.wandb,  # type: ignore[arg-type]
            config=OmegaConf.to_container(OmegaConf.structured(config)),  # type: ignore[arg-type]
            run_id=run_id,
            resumed_at=resumed_at,
        )
        self._console = Console(config.training.total_images, folder.log)
        if resumed_at is not None:
            self._console.message(f"continues at {resumed_at:,} images")

    @section("logging")
    def metrics(self) -> None:
        """One row of everything since the last one. On every rank: it sums over the ranks."""
        state = self._state
        now, (then, images_then) = time.perf_counter(), self._since
        row = state.meters.read()
        self._feed.count_broken(state.broken)
        waited = torch.tensor(self._feed.waited_seconds, device=self._runtime.device)
        waited_seconds = self._runtime.sum(waited).item() / self._runtime.world_size
        row |= {
            "logits/wasserstein": row["logits/real_mean"] - row["logits/fake_mean"],
            "optim/critic_learning_rate": state.critic_player.learning_rate(state.images_seen),
            "optim/generator_learning_rate": state.generator_player.learning_rate(
                state.images_seen
            ),
            "data/broken_samples": float(state.broken.total()),
            "perf/images_per_second": (state.images_seen - images_then) / (now - then),
            "perf/data_wait_share": waited_seconds / (now - then),
        }
        for (_, reason), count in state.broken.items():
            name = f"data/broken_{reason.replace(' ', '_')}"
            row[name] = row.get(name, 0.0) + count
        state.seconds += now - then
        self._since, self._feed.waited_seconds, self._last_row = (now, state.images_seen), 0.0, row
        if self._tracker is not None and self._console is not None:
            self._tracker.log(row, step=state.steps, images_seen=state.images_seen)
            self._console.update(state.images_seen, row["perf/images_per_second"], row)
        limit = self._config.data.broken_limit
        worst = state.broken.most_common(3)
        check_broken_limit(state.broken.total(), state.images_seen, limit, worst)
        for name, value in row.items():
            if name.startswith("loss/") and not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} became {value} within the {state.images_seen - images_then:,} images "
                    f"before {state.images_seen:,}, with finite gradients: the newest checkpoint "
                    "is the last good state"
                )

    @section("samples")
    def samples(self) -> None:
        """The grid of the averaged generator for the run's fixed latents."""
        if self._tracker is None:
            return
        config, count = self._config, self._config.samples.count
        latents = sample_latents(config.seed, 0, count, config.generator.latent_dim)
        labels = sample_labels(0, count, self._state.num_classes)
        images = generate_array(self._state.average, latents, labels)
        grid = image_grid(images, columns=max(1, round(math.sqrt(count))))
        path = self._folder.samples(self._state.images_seen)
        try:
            path.parent.mkdir(exist_ok=True)
            to_picture(grid).save(path)
        except OSError as error:
            logger.error("no samples could be written at %s: %s", path, error)
        self._tracker.log_samples(
            "samples/average", grid, step=self._state.steps, images_seen=self._state.images_seen
        )

    def close(self, exit_code: int) -> None:
        """Writes the summary and ends W&B's part; says where everything lies."""
        if self._tracker is None or self._console is None:
            return
        state, folder = self._state, self._folder
        summary: dict[str, Any] = {
            "images_seen": state.images_seen,
            "steps": state.steps,
            "training_seconds": round(state.seconds, 3),
            "images_per_second": round(state.images_seen / max(state.seconds, 1e-9), 1),
            "exit_code": exit_code,
            "broken_samples": state.broken.total(),
            "broken": broken_rows(state.broken),
            "sessions": state.sessions,
            "last": self._last_row,
        }
        try:
            write_summary(folder.summary, summary)
        except OSError as error:
            logger.error("no summary could be written: %s", error)
        self._tracker.finish(summary, exit_code)
        checkpoint = newest_name(folder.checkpoints)
        self._console.close()
        if state.broken:
            self._console.message(
                f"broken:     {state.broken.total():,} samples, replaced by others; which: "
                f"{folder.summary}"
            )
        self._console.message(f"samples:    {folder.samples(state.images_seen)}")
        self._console.message(f"checkpoint: {checkpoint}")
        self._console.message(f"W&B record: {self._tracker.location}")
