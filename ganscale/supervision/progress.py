"""How far this rank has come: marked by its main thread, read by the watchdog."""

from collections.abc import Callable
from dataclasses import dataclass

from ganscale.run_folder import RunFolder


@dataclass(frozen=True)
class ProgressMark:
    count: int = 0  # of the stages that the rank has entered
    stage: str = "start"
    extra_seconds: float = 0.0  # how much longer than the limit (or shorter) this stage may take


class Progress:
    def __init__(self) -> None:
        self.current = ProgressMark()
        self.run_folder: RunFolder | None = None
        self.before_abort: Callable[[], None] = lambda: None
        """Gets some seconds before this rank leaves because another one was lost."""

    def mark(self, stage: str, extra_seconds: float = 0.0) -> None:
        """Enters the next stage."""
        self.current = ProgressMark(self.current.count + 1, stage, extra_seconds)
