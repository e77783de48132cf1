"""When the uploader tries again, and what it logs; with a client that fails on demand."""

import fcntl
import logging
from collections.abc import Callable
from typing import Any

import pytest

from ganscale.errors import UnavailableError
from ganscale.run_folder import RunFolder
from ganscale.tracking import uploader
from ganscale.tracking.record import Record
from ganscale.tracking.uploader_messages import SessionEnd, UploadJob, WandbIdentity
from ganscale.tracking.wandb_run import WandbRun

FIRST_PAUSE = 60.0


class Clock:
    """Time that passes only where it is waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Session(uploader.SessionWatcher):
    """Ends after a given time."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.end = SessionEnd(exit_code=0)
        self.waits: list[float] = []
        self._clock, self._end_time = clock, seconds

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self._clock.now += seconds
        return self._clock.now >= self._end_time


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(uploader, "time", clock)
    monkeypatch.setattr(uploader, "resolve_mode", lambda mode: "online")
    monkeypatch.setattr(uploader, "_tear_down_client", lambda: None)
    monkeypatch.setattr(uploader, "_POLL_SECONDS", 20.0)
    return clock


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "ganscale")
    return caplog


def follow(
    clock: Clock, run_folder, monkeypatch, seconds: float, health: Callable[[float], str]
) -> Session:
    """A session with a server that is "well", "away" or "refuses" rows, by the time."""
    record = Record(run_folder / "metrics.jsonl")

    class Client(WandbRun):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.location, self.next_step = "there", arrived[0]
            if health(clock.now) == "away":
                raise UnavailableError("away")

        def send(self, rows) -> int:
            record.append({"progress/images_seen": int(clock.now)})
            for step, _ in rows:
                self.next_step = step + 1
            if health(clock.now) == "well":
                arrived[0] = self.next_step
            return 0

        def has_arrived(self, next_step: int, answer_seconds: int) -> bool:
            return arrived[0] >= next_step

        def finish(self, summary, exit_code) -> None:
            if not self.has_arrived(self.next_step, 0):
                raise UnavailableError("the server has not taken all rows")

    arrived = [0]
    monkeypatch.setattr(uploader, "WandbRun", Client)
    session = Session(clock, seconds)
    job = UploadJob(str(run_folder), "online", WandbIdentity("id", "n", {}), 1, FIRST_PAUSE, 1.0)
    uploader.Uploader(job, session, lambda **content: None).run()
    return session


def test_each_outage_is_logged_once_and_its_end_once(clock, run_folder, monkeypatch, log):
    def health(now: float) -> str:
        return "away" if now < 100 else "refuses" if 5000 < now < 7000 else "well"

    session = follow(clock, run_folder, monkeypatch, 12_000, health)
    texts = [record.message.split(",")[0] for record in log.records]
    assert texts == ["W&B gets no rows", "W&B is back"] * 2
    pauses = [seconds for seconds in session.waits if seconds > 20]
    # 0 s, 60 s; then the rows of 5000 s on: with short pauses again, which grow.
    assert pauses[:3] == [60, 120, 60]
    assert pauses[2:] == sorted(pauses[2:])


def test_a_server_that_answers_and_refuses_rows_is_not_back(clock, run_folder, monkeypatch, log):
    with pytest.raises(UnavailableError):
        follow(clock, run_folder, monkeypatch, 5000, lambda now: "refuses")
    assert [record.message.split(",")[0] for record in log.records] == ["W&B gets no rows"]


def test_an_earlier_uploader_that_does_not_end_is_logged_once(clock, run_folder, log):
    (run_folder / "wandb").mkdir()
    session = Session(clock, 300)
    with (run_folder / "wandb" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        upload = uploader.exclusive_upload(RunFolder(run_folder), session.wait)
        with pytest.raises(UnavailableError), upload:
            pytest.fail("two at once")
    (record,) = log.records
    assert "uploader of an earlier session" in record.message
