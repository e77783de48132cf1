"""A SLURM cluster for the tests of this folder, and jobs on it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.slurm.cluster import Cluster, what_is_missing
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, each with two CPUs and two devices that SLURM takes for GPUs."""
    if reason := what_is_missing():
        _skip_or_fail(reason)
    with Cluster(nodes=2, cpus=2, gpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shellcheck() -> str:
    """The program's path."""
    if (path := shutil.which("shellcheck")) is None:
        _skip_or_fail("shellcheck is not installed")
    return path


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, digits: Path) -> Iterator[Jobs]:
    jobs = Jobs(cluster, tmp_path, digits)
    yield jobs
    cluster.run("scancel", "--user=root")


def _skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("GANSCALE_REQUIRE_ALL_TESTS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
