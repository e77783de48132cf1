"""Waits between tries."""

import random

from ganscale.data.backoff import Backoff


def test_a_wait_leaves_pythons_default_generator_alone() -> None:
    """A network that draws from it is refused, and the wait may be in another thread meanwhile."""
    before = random.getstate()
    Backoff(seconds=0.01).wait(OSError("gone"), "the disk cannot be read")
    assert random.getstate() == before
