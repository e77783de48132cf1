"""A server that speaks W&B's protocol, and users with and without an account there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking import sessions
from tests.tracking.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    yield
    for process in sessions.started:
        with process:
            process.kill()
    sessions.started.clear()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user without any W&B account, on a machine that reports to nobody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = tmp_path / "home"
    home.mkdir()
    return {
        **kept,
        "HOME": str(home),
        "NETRC": str(home / ".netrc"),
        "PYTHONPATH": str(sessions.REPOSITORY),
        "WANDB_ERROR_REPORTING": "false",
        # Without this, a test that should stay offline would ask the internet.
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }


@pytest.fixture
def with_account(environment: dict[str, str], server: WandbServer) -> dict[str, str]:
    return {**environment, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": sessions.API_KEY}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder
