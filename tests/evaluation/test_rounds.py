"""How often ranks vote within an evaluation, and what becomes of a stop or a failure between."""

from collections.abc import Callable

import pytest

from ganscale.errors import UserError
from ganscale.evaluation.rounds import Interrupted, Rounds
from ganscale.runtime import Runtime


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("ganscale.evaluation.rounds.time.monotonic", clock)
    return clock


class Votes:
    """Counts the votes of a single rank, to which `others` adds what another rank votes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Runtime, others: int = 0) -> None:
        self.count, self.others = 0, others

        def start_max(flag: int) -> Callable[[], int]:
            self.count += 1
            return lambda: max(flag, self.others)

        monkeypatch.setattr(runtime, "start_max", start_max)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.start()


def run(rounds: int, seconds: float, clock: Clock, voter: Rounds) -> None:
    for _ in voter.share().rounds(rounds, 1):
        clock.now += seconds


@pytest.mark.parametrize(
    ("seconds", "slowest", "least", "most"),
    [
        (0.01, 0.0, 10, 10 + 8),  # 1,000 rounds of 10 ms: one a second, more often at first
        (0.01, 0.1, 100, 100 + 8),  # another rank needs ten times as long
        (3.0, 0.0, 1000, 1000),  # slow rounds: a vote before each
        (0.0, 0.0, 9, 11),  # faster than the clock: 1, 2, 4, ...
    ],
)
def test_ranks_vote_about_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    clock: Clock,
    seconds: float,
    slowest: float,
    least: int,
    most: int,
) -> None:
    votes, seen = Votes(monkeypatch, runtime, round(1e6 * slowest)), []
    voter = Rounds(runtime, lambda: False, lambda *progress: seen.append(progress))
    voter.enter("samples", 1000, 1)
    run(1000, seconds, clock, voter)
    assert least <= votes.count <= most
    assert seen == [("samples", begun, 1000) for begun in range(1000)]


def test_a_stop_is_heard_within_a_second_or_a_round(runtime: Runtime, clock: Clock) -> None:
    for seconds in (0.01, 0.3, 3.0):
        asked = clock.now + 100.0
        voter = Rounds(runtime, lambda asked=asked: clock.now >= asked, lambda *_: None)
        voter.enter("samples")
        with pytest.raises(Interrupted):
            run(100_000, seconds, clock, voter)
        assert clock.now - asked <= max(1.0, seconds) + seconds


def test_a_failure_waits_for_the_vote_and_is_raised_there(runtime: Runtime, clock: Clock) -> None:
    voter, failed_at, made = Rounds(runtime, lambda: False, lambda *_: None), 50, []

    def make(rounds: int) -> None:
        for number, _ in enumerate(voter.share().rounds(rounds, 1)):
            clock.now += 0.01
            with voter.attempt():
                if voter.has_failed:
                    continue
                made.append(number)
                if number == failed_at:
                    raise UserError("the reason")

    voter.enter("samples")
    with pytest.raises(UserError, match="the reason"):
        make(1000)
    assert made == [*range(failed_at + 1)]


def test_a_failure_of_the_last_round_is_raised_by_the_vote_after_it(runtime: Runtime) -> None:
    voter = Rounds(runtime, lambda: False, lambda *_: None)
    for _ in voter.share().rounds(10, 1):
        pass
    with voter.attempt():
        raise UserError("the reason")
    with pytest.raises(UserError, match="the reason"):
        voter.check()
    voter.check()  # once
