"""A disk that is full for a while costs a run only time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ganscale.errors import EXIT_REQUEUE
from tests.checkpoints.helpers import mounted
from tests.conftest import Runs

SETTINGS = ("training.total_images=320", "checkpoint.every_images=64")


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The bits of every tensor of a checkpoint."""
    return {
        f"{file.stem}.{name}": tensor.numpy().tobytes()
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Mounts a file system over `folder` that is too small for a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with mounted(folder, "size=32k"):
        yield


@pytest.mark.timeout(300)
def test_a_disk_that_is_full_for_a_while_costs_only_time(runs: Runs) -> None:
    runs.finish("whole", *SETTINGS)
    expected = weights(runs.checkpoints("whole")[-1])

    checkpoints = runs.folder / "run" / "checkpoints"
    with full_disk(checkpoints):
        output = runs.finish("run", *SETTINGS, exit_code=EXIT_REQUEUE)
        assert list(checkpoints.iterdir()) == []
    assert output.count("no checkpoint could be written at") == 6  # five, and the final error
    for images_seen in (64, 128, 192, 256, 320):
        assert f"no checkpoint could be written at {images_seen} images" in output
    assert "No space left on device" in output
    assert "Traceback" not in output

    with full_disk(checkpoints):
        stop = (*SETTINGS, "checkpoint.on_failure=stop")
        output = runs.finish("run", *stop, exit_code=EXIT_REQUEUE)
    assert "no checkpoint could be written at 64 images" in output
    assert "no checkpoint could be written at 320 images" not in output

    runs.finish("run", *SETTINGS)
    assert weights(runs.checkpoints("run")[-1]) == expected
    assert [row["loss/critic"] for row in runs.rows("run")] == [
        row["loss/critic"] for row in runs.rows("whole")
    ]
