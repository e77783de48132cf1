"""A loader in another process returns the same batches, and ends with the one that started it."""

import contextlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ganscale.data.batch import Batch, allocate_batch
from ganscale.data.dataset import DataSet, open_data
from ganscale.data.loader import Loader
from ganscale.data.loader_process import LoaderProcess, LoaderThread, start_loader
from ganscale.errors import EXIT_FAILED, GanscaleError, UnavailableError, UserError
from ganscale.randomness import Draw, normal, split_draws, uniform
from ganscale.schema import DataConfig
from ganscale.shards.indexing import build_manifest
from tests.helpers.processes import HANG_SECONDS, wait_until

Start = Callable[..., LoaderProcess]


def config_of(path: Path | str, **settings) -> DataConfig:
    return DataConfig(path=str(path), **{"resolution": 28, "channels": 1, "lanes": 8, **settings})


PLACE: dict[str, Any] = {
    "seed": 3,
    "global_batch_size": 24,
    "rank": 0,
    "world_size": 1,
    "position": 0,
}


@pytest.fixture
def start() -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def started(config: DataConfig, data: DataSet | None = None, **place) -> LoaderProcess:
            data = data or open_data(config)
            loader = LoaderProcess(data, allocate_batch, 3, **{**PLACE, **place})
            return stack.enter_context(contextlib.closing(loader))

        yield started


def within(config: DataConfig, count: int, **place) -> list[Batch]:
    """The same batches of a loader in this process."""
    loader = open_data(config).make_loader(**{**PLACE, **place})
    with contextlib.closing(loader):
        return list(itertools.islice(loader, count))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for first, second in zip(found, expected, strict=True):
        for name in ("images", "labels", "slots"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert first.bad_samples == second.bad_samples


@pytest.mark.parametrize(
    ("workers", "place"),
    [(1, {}), (3, {"rank": 1, "world_size": 2, "position": 240})],
)
def test_batches_are_those_of_the_loader_and_stay_as_they_are(
    digits: Path, start: Start, workers: int, place: dict[str, int]
) -> None:
    """More of them, kept, than there are places in the shared memory."""
    config = config_of(digits, workers=workers)
    found = list(itertools.islice(start(config, **place), 30))
    assert_same(found, within(config, 30, **place))


def test_streamed_shards_give_the_same_batches_as_in_this_process(
    digits: Path, start: Start
) -> None:
    config = config_of(f"{digits}/*.tar", workers=2, class_count=10, block_samples=8)
    assert_same(list(itertools.islice(start(config), 20)), within(config, 20))


def test_workers_decide_whether_there_is_another_process(digits: Path) -> None:
    for workers, kind in ((0, LoaderThread), (1, LoaderProcess)):
        config = config_of(digits, workers=workers)
        loader = start_loader(open_data(config), allocate_batch, 3, **PLACE)
        with contextlib.closing(loader):
            assert type(loader) is kind


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_brings_the_random_numbers_of_its_slots(digits: Path, workers: int) -> None:
    draws = Draw("latents", 5, is_normal=True), Draw("share")
    data = open_data(config_of(digits, workers=workers))
    with contextlib.closing(start_loader(data, allocate_batch, 3, draws, **PLACE)) as loader:
        for batch in itertools.islice(loader, 5):
            assert batch.draws is not None
            found = split_draws(draws, batch.draws, len(batch.slots))
            assert torch.equal(found["latents"], normal(3, "latents", batch.slots, 5))
            assert torch.equal(found["share"], uniform(3, "share", batch.slots))


def test_bad_samples_are_logged_here(
    digits: Path, tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "shard-0.tar"
    path.write_bytes(next(digits.glob("*.tar")).read_bytes())
    manifest = build_manifest(tmp_path)
    for row in manifest.samples[:400:40]:
        with path.open("r+b") as tar:
            tar.seek(row["offset"])
            tar.write(b"\0" * 64)
    config = config_of(tmp_path, workers=2, block_samples=32)
    with caplog.at_level(logging.INFO):
        found = list(itertools.islice(start(config), 60))
        here = [
            record for record in caplog.records if "another sample replaces" in record.getMessage()
        ]
        caplog.clear()
        expected = within(config, 60)
    assert_same(found, expected)
    assert sum(len(batch.bad_samples) for batch in found) >= 10
    assert [(record.name, record.getMessage()) for record in here] == [
        (record.name, record.getMessage())
        for record in caplog.records
        if "another sample replaces" in record.getMessage()
    ]


def test_an_error_is_raised_here_and_at_every_further_call(
    digits: Path, tmp_path: Path, start: Start
) -> None:
    for tar in digits.glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    build_manifest(tmp_path)
    config = config_of(tmp_path, workers=1)
    data = open_data(config)
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    loader = start(config, data)
    for _ in range(3):
        with pytest.raises(UserError, match=r"\.tar of the manifest is missing"):
            next(loader)


def test_a_data_set_that_changes_meanwhile_is_refused(
    digits: Path, tmp_path: Path, start: Start
) -> None:
    shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    config = config_of(tmp_path, workers=1)
    data = open_data(config)
    description = tmp_path / "manifest.json"
    description.write_text(description.read_text().replace(data.fingerprint, 64 * "0"))
    with pytest.raises(UserError, match="has just been changed"):
        next(start(config, data))


def take_until_it_raises(loader: LoaderProcess) -> None:
    """Some batches may lie ready, whatever becomes of the process that they are from."""
    for _ in range(20):
        next(loader)


def test_a_process_that_is_killed_asks_for_another_start(digits: Path, start: Start) -> None:
    loader = start(config_of(digits, workers=1))
    next(loader)
    os.kill(loader._process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="killed by signal 9"):
            take_until_it_raises(loader)


def test_a_process_that_stays_stopped_asks_for_another_start(
    digits: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganscale.data.loader_process._STOPPED_SECONDS", 0.5)
    loader = start(config_of(digits, workers=1))
    next(loader)
    os.kill(loader._process.pid, signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"was stopped \(SIGSTOP\)"):
            take_until_it_raises(loader)


def test_a_process_that_is_stopped_and_continued_goes_on(digits: Path, start: Start) -> None:
    loader = start(config_of(digits, workers=1))
    os.kill(loader._process.pid, signal.SIGSTOP)
    assert not loader.wait(2)
    os.kill(loader._process.pid, signal.SIGCONT)
    assert loader.wait(HANG_SECONDS)
    next(loader)


def test_a_stopped_process_ends_when_it_is_closed(digits: Path, start: Start) -> None:
    loader = start(config_of(digits, workers=1))
    next(loader)
    os.kill(loader._process.pid, signal.SIGSTOP)
    loader.close()
    assert loader._process.returncode == 0


def test_a_process_that_cannot_start_fails_the_run(
    digits: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganscale.data.loader_process._PROGRAM", "import no_such_module")
    with pytest.raises(GanscaleError, match="ended with code 1") as raised:
        next(start(config_of(digits, workers=1)))
    assert raised.value.exit_code == EXIT_FAILED  # nothing that another start would mend


def test_a_process_that_is_closed_in_the_middle_of_its_work_prints_nothing(
    digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(digits, workers=2)
    data = open_data(config)
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
        with contextlib.closing(LoaderProcess(data, allocate_batch, 200, **PLACE)) as loader:
            next(loader)
            time.sleep(delay)
        assert loader._process.returncode == 0
    assert capfd.readouterr().err == ""


def test_an_unexpected_error_ends_the_process(digits: Path, start: Start) -> None:
    config = config_of(digits, workers=1)
    data = BrokenData(config, "", 0)
    with pytest.raises(GanscaleError, match="ended with code 1"):
        next(start(config, data))


class BrokenData(DataSet):
    def make_loader(self, **_: object) -> Loader:
        raise ZeroDivisionError


def test_signals_to_the_whole_job_do_not_end_it(digits: Path, start: Start) -> None:
    """From its first moment on, since a run blocks them before it starts anything."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        loader = start(config_of(digits, workers=1))
        for _ in range(3):
            for each in signals:
                os.kill(loader._process.pid, each)
            list(itertools.islice(loader, 10))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert loader._process.poll() is None


def test_a_read_that_hangs_does_not_delay_the_end(digits: Path, start: Start) -> None:
    config = config_of("pipe:sleep 1000", workers=1)
    loader = start(config)
    process = psutil.Process(loader._process.pid)
    wait_until(lambda: process.children(recursive=True))
    children = process.children(recursive=True)
    assert not loader.wait(0.1)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 300  # of the 1000 s that the read lasts
    gone, _ = psutil.wait_procs([process, *children], timeout=300)
    assert len(gone) == 1 + len(children)


def test_a_thread_returns_the_same_batches_and_continues_after_a_wait(digits: Path) -> None:
    config = config_of(digits, workers=0)
    with contextlib.closing(start_loader(open_data(config), allocate_batch, 3, **PLACE)) as loader:
        found = []
        for batch in itertools.islice(loader, 10):
            found.append(batch)
            assert loader.wait(30)
    assert_same(found, within(config, 10))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_it_ends_with_the_process_that_started_it(digits: Path, is_stopped: bool) -> None:
    """Which is killed, and can do nothing about it."""
    program = (
        "import sys, time\n"
        "from tests.data.test_loader_process import *\n"
        f"config = config_of({str(digits)!r}, workers=1)\n"
        "loader = start_loader(open_data(config), allocate_batch, 3, **PLACE)\n"
        "next(loader)\n"
        "print(loader._process.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        assert process.is_running()
        if is_stopped:
            process.suspend()
        parent.kill()
    gone, _ = psutil.wait_procs([process], timeout=300)
    assert gone
