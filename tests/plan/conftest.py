"""What the tests of plans share."""

from pathlib import Path

from ganscale.config import resolve
from ganscale.schema import Config
from tests.helpers.runs import TINY


def config_of(data: Path, *settings: str) -> Config:
    """The tiny run on a data set, with other settings."""
    return resolve([*TINY, f"data.path={data}", *settings]).config


def config_of_mlps(data: Path, *settings: str) -> Config:
    """With the networks that are planned fastest, where it does not matter which."""
    return config_of(data, "generator.target=mlp", "critic.target=mlp", *settings)
