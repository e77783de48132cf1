"""Fixtures of the tests of configs."""

from pathlib import Path

import pytest

from ganscale.config import resolve
from ganscale.schema import Config
from tests.helpers.config_folder import ConfigFolder


@pytest.fixture
def folder(tmp_path: Path) -> ConfigFolder:
    return ConfigFolder(tmp_path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Config:
    """The config of a run that was begun with the base file."""
    return resolve([ConfigFolder(tmp_path_factory.mktemp("stored")).base, "run.name=base"]).config
