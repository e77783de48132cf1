"""What has happened to a run so far, over all its sessions: kept in its checkpoints."""

from dataclasses import dataclass

_LOW, _HIGH, _ROWS = 0.1, 0.2, 3
_EARLY_IMAGES, _EARLY_SHARE = 50_000, 0.25


@dataclass
class Health:
    """audits_passed: comparisons of the ranks' replicas that found them equal
    non_finite_events: stops on a gradient that was NaN or infinite
    """

    audits_passed: int = 0
    non_finite_events: int = 0
    has_been_diverse: bool = False
    low_rows: int = 0  # running, up to the last one

    def is_collapsed(self, nearest: float, images_seen: int, total_images: int) -> bool:
        """Whether the generator has collapsed. To be asked once for every row, in order.

        It has if `collapse/nearest` is below 0.1 in the third row running, and either has been
        above 0.2 before, or 50,000 images and a quarter of the run are over: before it has learned
        anything a generator's images are alike, too.
        """
        self.has_been_diverse |= nearest > _HIGH
        self.low_rows = self.low_rows + 1 if nearest < _LOW else 0
        is_early = images_seen < max(_EARLY_IMAGES, _EARLY_SHARE * total_images)
        return self.low_rows >= _ROWS and (self.has_been_diverse or not is_early)
