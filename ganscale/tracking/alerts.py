"""Events that a user wants to hear of at once: the first non-finite value, a collapse, the end.

`alerts.jsonl` in the run folder keeps what was sent, for W&B and for a run that resumes.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from ganscale.run_folder import RunFolder, append_json_line, read_json_lines
from ganscale.tracking.record import Value

logger = logging.getLogger(__name__)

COLLAPSED = "collapse/alarm"  # 1 in a row when the generator has collapsed
_FINITE = ("loss/", "logits/", "penalty/", "optim/")


@dataclass(frozen=True)
class Alert:
    kind: str
    title: str
    text: str
    images_seen: int


class Alerts:
    """Sends each kind of alert once per run; constructed on rank 0 only."""

    def __init__(self, folder: RunFolder, run_name: str) -> None:
        self._path = folder.alerts
        self._run_name = run_name
        self._sent_kinds = {alert.kind for alert in read_alerts(folder)}

    def check_row(self, row: Mapping[str, Value], images_seen: int) -> None:
        """Sends an alert for a non-finite value or a collapse in `row`."""
        for name, value in sorted(row.items()):
            if isinstance(value, float) and name.startswith(_FINITE) and not math.isfinite(value):
                self.send("nan", "not finite", f"{name} is {value}", images_seen)
        if row.get(COLLAPSED):
            text = "the generator has collapsed: its images are nearly all the same few"
            self.send("collapse", "collapse", text, images_seen)

    def send(self, kind: str, title: str, text: str, images_seen: int) -> None:
        """Logs `text` as a warning and keeps it for W&B, unless this kind was sent before."""
        if kind in self._sent_kinds:
            return
        self._sent_kinds.add(kind)
        text = f"{text} (at {images_seen:,} images)"
        if kind != "finish":
            logger.warning("%s", text)
        alert = Alert(kind, f"{self._run_name[:40]}: {title}", text, images_seen)
        append_json_line(self._path, asdict(alert))


def read_alerts(folder: RunFolder) -> Iterator[Alert]:
    """The alerts of a run so far; damaged lines are skipped."""
    names = {*Alert.__dataclass_fields__}
    return (Alert(**line) for line in read_json_lines(folder.alerts) if line.keys() == names)
