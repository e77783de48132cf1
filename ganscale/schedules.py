"""A number of a config that may change over a run: a plain number, or a schedule of images seen."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ganscale.setting import choice, setting


@dataclass(frozen=True)
class Schedule:
    """A *float or schedule* is a plain number, as in `learning_rate: 2e-4`, or moves from one value
    to another, as in `learning_rate: {from: 2e-4, to: 0, shape: linear}`. The value of a step
    depends only on the images seen before it. On the command line, `KEY.to=0` changes the end of a
    schedule, or makes a plain number the start of one; `KEY=1e-4` makes it a plain number again."""

    from_: float = setting("The value at the start, after any warm-up.")
    to: float = setting("The value at the end, and from then on.")
    over_images: int | None = setting(
        "Images over which it moves from `from` to `to`; by default, all of training.total_images "
        "after the warm-up.",
        None,
        unit="images",
        at_least=1,
    )
    shape: str = choice(
        "The shape of the curve between them.",
        cosine="half a cosine: slow at both ends",
        linear="a straight line",
    )
    warmup_images: int = setting(
        "Images before that, over which the value rises linearly from 0 to `from`.",
        0,
        unit="images",
        at_least=0,
    )

    def at(self, images_seen: int) -> float:
        """The value for a step that begins at `images_seen`."""
        if images_seen < self.warmup_images:
            return self.from_ * (images_seen / self.warmup_images)
        assert self.over_images is not None  # the config fills it in
        progress = min(1.0, (images_seen - self.warmup_images) / self.over_images)
        remaining = 1 - progress
        if self.shape == "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        return self.from_ * remaining + self.to * (1 - remaining)

    def milestones(self) -> tuple[int, ...]:
        """The images seen at which a printed config shows its value: start, end of the warm-up,
        middle, end."""
        assert self.over_images is not None
        start, length = self.warmup_images, self.over_images
        return (*dict.fromkeys((0, start, start + length // 2, start + length)),)

    def __str__(self) -> str:
        """As it is written in a config."""
        warmup = f", warmup_images: {self.warmup_images}" if self.warmup_images else ""
        ends = f"from: {self.from_}, to: {self.to}"
        return f"{{{ends}, over_images: {self.over_images}, shape: {self.shape}{warmup}}}"


if TYPE_CHECKING:
    FloatOrSchedule = float | Schedule
    IntOrSchedule = int | Schedule
else:  # OmegaConf has no union with a dataclass; ganscale.config_schedules checks these values
    FloatOrSchedule = Annotated[Any, float, Schedule]
    IntOrSchedule = Annotated[Any, int, Schedule]


def value_at(number: float | Schedule, images_seen: int) -> float:
    """The number, or the schedule's value for a step that begins at `images_seen`."""
    return number.at(images_seen) if isinstance(number, Schedule) else number


def ends(number: float | Schedule) -> tuple[float, ...]:
    """All values that bound the number over the run, without the zero of a warm-up."""
    return (number.from_, number.to) if isinstance(number, Schedule) else (number,)
