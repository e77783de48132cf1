"""How far this rank has come: marked by its main thread, read by the watchdog."""

from collections.abc import Callable
from dataclasses import dataclass

from ganscale.run_folder import RunFolder


@dataclass(frozen=True)
class ProgressMark:
    """count: grows with every stage that a rank enters
    extra_seconds: how much longer than the limit this stage may take
    """

    count: int = 0
    stage: str = "start"
    extra_seconds: float = 0.0


class Progress:
    def __init__(self) -> None:
        self.current = ProgressMark()
        self.run_folder: RunFolder | None = None
        self.before_abort: Callable[[], None] = lambda: None
        """Gets some seconds before this rank leaves because another one was lost."""

    def mark(self, stage: str, extra_seconds: float = 0.0) -> None:
        """Enters the next stage, which may take that much longer than the limit."""
        self.current = ProgressMark(self.current.count + 1, stage, extra_seconds)
