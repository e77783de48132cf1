"""A SLURM cluster for the tests of this folder."""

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest
from cluster import Cluster, what_is_missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One node with two CPUs, and two devices that SLURM takes for GPUs."""
    if reason := what_is_missing():
        _skip_or_fail(reason)
    with Cluster(nodes=1, cpus=2, gpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shellcheck() -> str:
    """The program's path."""
    if (path := shutil.which("shellcheck")) is None:
        _skip_or_fail("shellcheck is not installed")
    return path


def _skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("GANSCALE_REQUIRE_ALL_TESTS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
