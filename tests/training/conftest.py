"""What tests of the training share: this process as a run's only rank."""

import pytest

from ganscale.runtime import Runtime


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime.start()
