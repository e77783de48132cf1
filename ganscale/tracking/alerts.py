"""What a user wants to be told of at once: the first value that is no number, a collapse, the end.

Each kind once per run, also when the run is resumed to before it: `alerts.jsonl` in the run folder
keeps what was told. W&B is told by the process that reads it there.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ganscale.tracking.record import Value

logger = logging.getLogger(__name__)

COLLAPSED = "collapse/alarm"
"""A row's name: 1 when the generator has collapsed."""

_FINITE = ("loss/", "logits/", "penalty/", "optim/")


@dataclass(frozen=True)
class Alert:
    kind: str
    title: str
    text: str
    images_seen: int


class Alerts:
    """Tells of each kind of event once per run; constructed on rank 0 only."""

    def __init__(self, run_folder: Path, name: str) -> None:
        """name: of the run, for the titles"""
        self._path = run_folder / "alerts.jsonl"
        self._name = name
        self._told = {alert.kind for alert in read_alerts(run_folder)}

    def look(self, row: Mapping[str, Value], images_seen: int) -> None:
        """Tells of what a row shows."""
        for name, value in sorted(row.items()):
            if name.startswith(_FINITE) and isinstance(value, float) and not math.isfinite(value):
                self.tell("nan", "not finite", f"{name} is {value}", images_seen)
        if row.get(COLLAPSED):
            text = "the generator has collapsed: its images are nearly all the same few"
            self.tell("collapse", "collapse", text, images_seen)

    def tell(self, kind: str, title: str, text: str, images_seen: int) -> None:
        """Warns of `text`, and keeps it for W&B, unless this run had an alert of this kind."""
        if kind in self._told:
            return
        self._told.add(kind)
        text = f"{text} (at {images_seen:,} images)"
        if kind != "finish":
            logger.warning("%s", text)
        line = json.dumps(asdict(Alert(kind, f"{self._name[:40]}: {title}", text, images_seen)))
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_alerts(run_folder: Path) -> Iterator[Alert]:
    """The alerts of a run so far; a line that is damaged is passed over."""
    with contextlib.suppress(OSError):
        for line in (run_folder / "alerts.jsonl").read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                yield Alert(**json.loads(line))
