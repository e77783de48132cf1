import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from ganscale.tracking.console import Console, setup_logging
from tests.helpers.processes import run_python

REPOSITORY = Path(__file__).parents[2]
DATED = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "

TRAINING = """
import logging, sys
from pathlib import Path
from ganscale.tracking.console import Console, setup_logging
log_path = Path(sys.argv[1])
setup_logging(log_path, rank=0)
console = Console(1000, log_path)
console.update(400, 100.0, {"loss/critic": 0.25, "loss/generator": float("nan")})
logging.getLogger("ganscale.training").warning("a shard is damaged")
console.update(800, 100.0, {"loss/critic": 0.125, "loss/generator": 2.0})
logging.getLogger("ganscale.training").info("saved a checkpoint")
console.close()
"""


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


@pytest.fixture
def ganscale_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("ganscale")
    before = logger.handlers[:], logger.propagate, logger.level
    yield logger
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


def run_on_terminal(command: list[str], columns: int = 120) -> str:
    """What `command` draws on a terminal that is so many columns wide."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    drawn = b""
    try:
        # Linux reports as an error that the last process left the terminal.
        with contextlib.suppress(OSError):
            while chunk := os.read(controller, 4096):
                drawn += chunk
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        os.close(controller)
    return drawn.decode()


LINES = [
    "400 of 1,000 images, critic 0.2500, generator nan, 100 img/s, 0:00:06 left",
    "WARNING: a shard is damaged",
    "800 of 1,000 images, critic 0.1250, generator 2.0000, 100 img/s, 0:00:02 left",
    "saved a checkpoint",
]


def test_without_a_terminal_each_interval_is_one_plain_line(log_path):
    done = run_python("-c", TRAINING, str(log_path))
    assert done.stdout.splitlines() == LINES
    assert done.stderr == ""
    assert [re.sub(DATED, "", line) for line in log_path.read_text().splitlines()] == LINES


def test_on_a_terminal_a_bar_is_drawn_with_messages_above_it(log_path):
    drawn = run_on_terminal([sys.executable, "-c", TRAINING, str(log_path)])
    assert re.search(r"40%\|.*400/1\.00k img, critic 0\.2500", drawn)
    assert re.search(r"80%\|.*800/1\.00k img, critic 0\.1250", drawn)
    assert "of 1,000 images" not in drawn
    assert re.search(r"[\r\n]WARNING: a shard is damaged\r\n", drawn)
    assert re.search(r"[\r\n]saved a checkpoint\r\n", drawn)
    assert [re.sub(DATED, "", line) for line in log_path.read_text().splitlines()] == LINES


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (82, "critic 0.1250, generator 2.0000, 100 img/s, 0:00:02 left"),
        (70, "generator 2.0000, 100 img/s, 0:00:02 left"),
        (60, "100 img/s, 0:00:02 left"),
        (40, "0:00:02 left"),
    ],
)
def test_on_a_narrow_terminal_the_time_left_stays_and_the_rest_goes(log_path, columns, shown):
    drawn = run_on_terminal([sys.executable, "-c", TRAINING, str(log_path)], columns)
    last = [line for line in re.split("[\r\n]", drawn) if "80%" in line][-1]
    assert last.endswith(f"800/1.00k img, {shown}")
    assert len(last) <= columns


ADVANCING = """
import sys, time
from pathlib import Path
from ganscale.tracking import console as module
console = module.Console(1000, Path(sys.argv[1]))
for images_seen in range(100, 500, 100):
    console.advance(images_seen)  # too soon after the first one
module._BAR_SECONDS = 0.0
console.advance(700)
console.close()
"""


def test_the_bar_moves_between_rows_but_not_at_every_cycle(log_path):
    drawn = run_on_terminal([sys.executable, "-c", ADVANCING, str(log_path)])
    shown = [int(match) for match in re.findall(r"(\d+)/1\.00k img", drawn)]
    assert {100, 700} <= {*shown} <= {0, 100, 700}
    assert not log_path.exists()


def test_every_line_of_the_log_file_is_dated(log_path, capsys, ganscale_logger):
    setup_logging(log_path, rank=0)
    console = Console(1000, log_path)
    console.update(400, 0.0, {})
    ganscale_logger.info("done")
    lines = log_path.read_text().splitlines()
    assert len(lines) == 2
    assert all(re.match(DATED, line) for line in lines)
    assert "unknown time left" in lines[0]


def test_a_full_disk_under_stdout_and_log_file_does_not_stop_training(monkeypatch, ganscale_logger):
    full = Path("/dev/full")
    setup_logging(full, rank=0)
    stdout = full.open("w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        console = Console(1000, full)
        console.update(400, 100.0, {"loss/critic": 0.5})
        ganscale_logger.info("saved a checkpoint")
        ganscale_logger.warning("a shard is damaged")
    with pytest.raises(OSError, match="No space left"):  # the lines were really refused
        stdout.close()


def test_other_ranks_log_only_warnings_with_their_rank(log_path, capsys, ganscale_logger):
    setup_logging(log_path, rank=3)
    logging.getLogger("ganscale.data").info("opened a shard")
    logging.getLogger("ganscale.data").warning("a shard is damaged")
    assert capsys.readouterr() == ("", "rank 3: WARNING: a shard is damaged\n")
    assert not log_path.exists()


def test_logging_set_up_twice_logs_everything_once(log_path, capsys, ganscale_logger):
    setup_logging(log_path, rank=0)
    setup_logging(log_path, rank=0)
    logging.getLogger("ganscale.data").info("opened a shard")
    assert capsys.readouterr().out == "opened a shard\n"
    assert len(log_path.read_text().splitlines()) == 1
