"""Fixtures for all tests: real digits as shards, and real training processes."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from beartype._check.code import codemain

from tests.helpers.preloaded import stop_server
from tests.helpers.runs import Runs

if TYPE_CHECKING:
    from ganscale.runtime import Runtime

# A shell's background job ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tensors of tests are so small that threads would only wait for each other, the more so while
# ranks share the cores: read when torch is imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# The type checker draws which item of a container it checks, from Python's default generator. A
# run refuses networks that do so, and hypothesis blames its strategies.
codemain.getrandbits = random.Random().getrandbits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled digits as five shards with their manifest."""
    from ganscale.shards.writing import write_shards

    folder = tmp_path_factory.mktemp("digits")
    write_shards("bundled:mnist", folder, shard_samples=1000)
    return folder


@pytest.fixture(scope="session")
def runtime() -> "Runtime":
    """This process as a run's only rank."""
    from ganscale.runtime import Runtime

    return Runtime.start()


@pytest.fixture(scope="session", autouse=True)
def preloaded_server() -> Iterator[None]:
    """Ends the server of preloaded processes, if a test has started it."""
    yield
    stop_server()


@pytest.fixture
def runs(tmp_path: Path, digits: Path) -> Runs:
    return Runs(tmp_path / "runs", digits)
