"""Writes checkpoints beside the training: the loop pays for a copy of the tensors only."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganscale.checkpoints.checkpoint import flush, write_checkpoint
from ganscale.checkpoints.retention import prune, scored
from ganscale.schema import CheckpointConfig

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0

Files = Mapping[str, Mapping[str, Tensor]]


class CheckpointWriter:
    """One write in flight, in a thread of its own. On rank 0 only.

    A write that fails is an error in the log at once, leaves the older checkpoints as they were and
    nothing of its own; `finish` raises it, and `has_failed` tells a run that is to stop for it.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        companions: Sequence[Path] = (),
        still_writes: Callable[[], None] = lambda: None,
    ) -> None:
        """companions: files that are flushed before a checkpoint counts: a machine that fails must
        not keep a checkpoint and lose the rows that led to it
        still_writes: called again and again while a caller has to wait and the write makes progress
        """
        self._root = root
        self._config = config
        self._companions = companions
        self._still_writes = still_writes
        self._operations = 0  # of all writes so far
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the newest write
        self._has_told_of_no_score = False
        self.failed_writes = 0  # in this session

    def save(
        self,
        images_seen: int,
        files: Files,
        numbers: Mapping[str, Any],
        score: object = None,
    ) -> None:
        """Copies everything, once the write before is done, and returns: what was given may change.

        score: the newest logged value of `checkpoint.best`; None while there is none
        Raises what is no fault of the disk, also of the write before.
        """
        self.close()
        self._raise_unless_disk()
        state = {**numbers, **scored(self._config.best, score)}
        if self._config.best and "score" not in state and not self._has_told_of_no_score:
            self._has_told_of_no_score = True
            logger.warning(
                "no row so far has a number `%s`, which checkpoint.best names: the checkpoint at "
                "%s images has no score",
                self._config.best,
                f"{images_seen:,}",
            )
        text = json.dumps(state, indent=1)
        copies, wait = self._memory.copy(files)
        self._thread = threading.Thread(
            target=self._write, args=(images_seen, copies, wait, text), name="checkpoint"
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits for the write in flight. Raises OSError if the newest one failed."""
        self.close()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Waits for the write in flight, whatever becomes of it."""
        seen = -1
        while self._thread is not None:
            self._thread.join(_LOOK_SECONDS)
            if not self._thread.is_alive():
                self._thread = None
            elif self._operations != seen:
                seen = self._operations
                self._still_writes()

    def wait(self) -> None:
        """Until the write in flight is done; for a thread beside the one that saves."""
        if (thread := self._thread) is not None:
            thread.join()

    @property
    def has_failed(self) -> bool:
        """Whether the newest write failed and `checkpoint.on_failure` is `stop`; waits for none."""
        return self._failure is not None and self._config.on_failure == "stop"

    def _count(self) -> None:
        self._operations += 1

    def _raise_unless_disk(self) -> None:
        if self._failure is not None and not isinstance(self._failure, OSError):
            raise self._failure

    def _write(self, images_seen: int, files: Files, wait: Callable[[], None], state: str) -> None:
        failure: BaseException | None = None
        try:
            wait()
            for path in self._companions:
                with contextlib.suppress(FileNotFoundError):
                    flush(path)
            folder = write_checkpoint(self._root, images_seen, files, state, self._count)
        except BaseException as error:
            failure = error
            self.failed_writes += 1
            logger.error(
                "no checkpoint could be written at %s images: %s; older ones are untouched",
                f"{images_seen:,}",
                error,
            )
        else:
            try:
                prune(self._root, self._config, verified=folder)
            except OSError as error:
                logger.warning("an old checkpoint could not be deleted: %s", error)
        self._failure = failure


class HostMemory:
    """Copies of tensors in memory that is kept from one checkpoint to the next.

    Fresh pages are what a copy costs: 400 MB took 1.2 s into new memory and 0.03 s into the same
    again. From a GPU the memory is pinned, so that the copy runs while the host goes on.
    """

    def __init__(self) -> None:
        self._copies: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def copy(self, files: Files) -> tuple[Files, Callable[[], None]]:
        """(the same tensors on the host, with strides of their own; what waits for them).

        The next call overwrites them. On a GPU the copies queue up behind the step, and the steps
        after behind them, in the one stream of the training.
        """
        self._copies = {
            file: {name: self._copied(file, name, tensor) for name, tensor in tensors.items()}
            for file, tensors in files.items()
        }
        if not any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values()):
            return self._copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return self._copies, copied.synchronize

    def _copied(self, file: str, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(file, {}).get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)
