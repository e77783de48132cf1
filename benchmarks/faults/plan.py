"""The faults of a campaign, which follow from the seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CYCLE = 32  # images
ROW, CHECKPOINT, SAMPLES, KEPT = 2 * CYCLE, 11 * CYCLE, 22 * CYCLE, 44 * CYCLE
"""Images between rows, and so on; checkpoints at multiples of KEPT are kept."""

KEEP_LAST = 3

FULL_FROM_THE_START = "from the start"

# Each kind and its variants, which take turns.
KINDS = {
    "killed rank": ("",),
    "killed run": ("",),
    "killed loader": ("",),
    "signal": (
        "USR1 to all", "TERM to one", "INT to all", "USR1 to one", "TERM to all", "INT to one",
        "launcher killed",
    ),
    "stopped rank": ("continued", "killed"),
    "full disk": ("freed", "killed", "asked to stop", FULL_FROM_THE_START),
    "damaged checkpoint": ("cut", "flipped bit", "lost file"),
    "torn row": ("cut", "zeros"),
    "start-up": ("killed run", "USR1 to all", "killed rank"),
}  # fmt: skip
NEEDS_TWO_RANKS = ("killed rank", "stopped rank")
NEEDS_LAUNCHER = (("signal", "launcher killed"), ("start-up", "killed rank"))
MAY_HAVE_LAUNCHER = ("killed rank", "killed run", "signal")


@dataclass(frozen=True)
class Fault:
    """A fault in one session of a run.

    ranks: of the session
    is_launched: by `accelerate launch`; otherwise its ranks are started one by one, as under srun
    victim: the rank that is hit, if it is only one
    after_images: images that the session has trained by then
    moment: 0 to 1, a position in the time after that, or in a file
    """

    kind: str
    variant: str
    ranks: int
    is_launched: bool
    victim: int
    after_images: int
    moment: float

    @property
    def name(self) -> str:
        """For messages."""
        variant = f", {self.variant}" if self.variant else ""
        ranks = "2 ranks" if self.ranks > 1 else "1 rank"
        if self.kind in (*NEEDS_TWO_RANKS, "killed loader") or self.variant.endswith(
            ("to one", "killed rank")
        ):
            ranks = f"rank {self.victim} of {ranks}"
        launcher = " under a launcher" if self.is_launched else ""
        return f"{self.kind}{variant} ({ranks}{launcher})"


def planned(
    count: int, seed: int, worlds: Sequence[Sequence[int]], kinds: Sequence[str] = tuple(KINDS)
) -> list[list[Fault]]:
    """The faults of each campaign, `count` in all, as evenly from all kinds as possible.

    worlds: for each campaign, the numbers of ranks that its sessions may have
    """
    draws = random.Random(seed)
    turns = {kind: _turns(KINDS[kind], draws) for kind in kinds}
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += draws.sample(kinds, len(kinds))
    shares = [len(drawn[:count][i :: len(worlds)]) for i in range(len(worlds))]
    plans: list[list[Fault]] = []
    for share, world in zip(shares, worlds, strict=True):
        plans.append([])
        for _ in range(share):
            variant = next(turns[kind := drawn.pop(0)])
            if variant == FULL_FROM_THE_START and not plans[-1]:  # there is no run to continue yet
                variant = next(turns[kind])
            plans[-1].append(_fault(kind, variant, world, draws))
    return plans


def _turns(variants: Sequence[str], draws: random.Random) -> Iterator[str]:
    """All of them in a random order, repeated."""
    order = draws.sample(variants, len(variants))
    while True:
        yield from order


def _fault(kind: str, variant: str, world: Sequence[int], draws: random.Random) -> Fault:
    has_launcher = (kind, variant) in NEEDS_LAUNCHER
    ranks = draws.choice(world)
    if kind in NEEDS_TWO_RANKS or has_launcher:
        ranks = 2
    if kind in MAY_HAVE_LAUNCHER and ranks > 1:
        has_launcher |= draws.random() < 0.3
    is_at_start = kind == "start-up" or variant == FULL_FROM_THE_START
    checkpoints = draws.choice((1, 1, 2))
    return Fault(
        kind,
        variant,
        ranks,
        has_launcher,
        victim=draws.randrange(ranks),
        after_images=0 if is_at_start else int((checkpoints + draws.random()) * CHECKPOINT),
        moment=draws.random(),
    )


def images_needed(faults: Sequence[Fault]) -> int:
    """The length of a run that lasts beyond its last fault, and long enough after it to replace the
    checkpoints of stops. Images that faults lose leave room for their moments."""
    more = {"full disk": 3, "start-up": 2}  # checkpoints written until the session ends
    images = sum(fault.after_images + more.get(fault.kind, 0) * CHECKPOINT for fault in faults)
    return (images // KEPT + 1) * KEPT + (KEEP_LAST + 1) * CHECKPOINT
