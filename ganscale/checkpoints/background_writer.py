"""Writes checkpoints in the background: training waits only for a copy of the tensors."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganscale.checkpoints.checkpoint import write_checkpoint
from ganscale.checkpoints.retention import prune, score_entry
from ganscale.files import fsync
from ganscale.schema import CheckpointConfig

logger = logging.getLogger(__name__)

Files = Mapping[str, Mapping[str, Tensor]]


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread. On rank 0 only.

    A failed write is logged as an error at once and leaves older checkpoints untouched; `finish`
    raises it, and `should_stop` ends the run if the settings ask for that.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        flush_first: Sequence[Path] = (),
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """flush_first: files to flush before each checkpoint: a machine that fails must not keep a
        checkpoint and lose the rows that led to it
        on_progress: called repeatedly while a caller waits for a write that makes progress
        """
        self._root = root
        self._config = config
        self._flush_first = flush_first
        self._on_progress = on_progress
        self._has_progressed = threading.Event()
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the newest write
        self._has_warned_of_no_score = False

    def save(
        self,
        images_seen: int,
        files: Files,
        state: Mapping[str, Any],
        score: object = None,
        score_identity: str = "",
    ) -> None:
        """Waits for the previous write, copies everything, and starts to write the copy.

        score: the newest logged value of `checkpoint.best`, None if there is none yet
        score_identity: what it depends on besides the weights
        Raises what the previous write raised unless it was an OSError.
        """
        self.close()
        if self._failure is not None and not isinstance(self._failure, OSError):
            raise self._failure
        state = {**state, **score_entry(self._config.best, score, score_identity)}
        if self._config.best and "score" not in state and not self._has_warned_of_no_score:
            self._has_warned_of_no_score = True
            logger.warning(
                "no row so far has a number `%s`, which checkpoint.best names: the checkpoint at "
                "%s images has no score",
                self._config.best,
                f"{images_seen:,}",
            )
        text = json.dumps(state, indent=1)
        copies, wait_for_copies = self._memory.copy(files)
        self._thread = threading.Thread(
            target=self._write, args=(images_seen, copies, wait_for_copies, text), name="checkpoint"
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits for the write in flight. Raises OSError if the newest one failed."""
        self.close()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits for the write in flight, even if it fails."""
        self._has_progressed.set()
        while self._thread is not None:
            self._thread.join(1.0)
            if not self._thread.is_alive():
                self._thread = None
            elif self._has_progressed.is_set():
                self._has_progressed.clear()
                self._on_progress()

    def wait(self) -> None:
        """Waits for the write in flight, in another thread than the one that saves."""
        if (thread := self._thread) is not None:
            thread.join()

    @property
    def should_stop(self) -> bool:
        """Whether the newest write failed and `checkpoint.on_failure` is `stop`. Does not wait."""
        return self._failure is not None and self._config.on_failure == "stop"

    def _write(
        self, images_seen: int, files: Files, wait_for_copies: Callable[[], None], state: str
    ) -> None:
        try:
            wait_for_copies()
            for path in self._flush_first:
                with contextlib.suppress(FileNotFoundError):
                    fsync(path)
            folder = write_checkpoint(
                self._root, images_seen, files, state, self._has_progressed.set
            )
        except BaseException as error:
            self._failure = error
            logger.error(
                "no checkpoint could be written at %s images: %s; older ones are untouched",
                f"{images_seen:,}",
                error,
            )
            return
        self._failure = None
        try:
            prune(self._root, self._config, verified=folder)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)


class HostMemory:
    """Copies of tensors in host memory that is reused for the next checkpoint: 400 MB took 1.2 s
    into new memory, 0.03 s into reused memory. Copies from a GPU are pinned and asynchronous."""

    def __init__(self) -> None:
        self._copies: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def copy(self, files: Files) -> tuple[Files, Callable[[], None]]:
        """(copies on the host that share no memory, a function that waits for them).

        The next call overwrites the copies. On a GPU they queue in the training's stream: after the
        steps before this call, before those after it.
        """
        self._copies = {
            file: {name: self._copy_tensor(file, name, tensor) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        if not any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values()):
            return self._copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return self._copies, copied.synchronize

    def _copy_tensor(self, file: str, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(file, {}).get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)
