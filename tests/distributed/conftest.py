"""Ranks that end with their test."""

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import Ranks


@pytest.fixture
def started() -> Iterator[list[Ranks]]:
    """Whatever is appended here is ended after the test."""
    ranks: list[Ranks] = []
    yield ranks
    for each in ranks:
        each.end()
