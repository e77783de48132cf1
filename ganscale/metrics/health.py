"""Counters of a run over all its sessions, kept in its checkpoints."""

from dataclasses import dataclass

_LOW, _HIGH, _ROWS = 0.1, 0.2, 3
_EARLY_IMAGES, _EARLY_FRACTION = 50_000, 0.25


@dataclass
class Health:
    """audits_passed: replica audits that found all ranks equal
    non_finite_events: stops because of a NaN or infinite gradient or loss
    failed_evaluations: evaluations that could not be made
    low_rows: consecutive rows with a low `collapse/nearest`, up to the newest
    """

    audits_passed: int = 0
    non_finite_events: int = 0
    failed_evaluations: int = 0
    has_been_diverse: bool = False
    low_rows: int = 0

    def update_collapse(self, nearest: float, images_seen: int, total_images: int) -> bool:
        """Takes a new row's `collapse/nearest`; returns whether the generator has collapsed.

        It has if the value is below 0.1 in three consecutive rows, and either was above 0.2 before,
        or 50,000 images and a quarter of the run are over: the images of a generator that has not
        learned anything yet are alike, too.
        """
        self.has_been_diverse |= nearest > _HIGH
        self.low_rows = self.low_rows + 1 if nearest < _LOW else 0
        is_early = images_seen < max(_EARLY_IMAGES, _EARLY_FRACTION * total_images)
        return self.low_rows >= _ROWS and (self.has_been_diverse or not is_early)
