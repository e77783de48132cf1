"""A disk that is full for a while costs a run only time."""

from ganscale.errors import EXIT_REQUEUE
from tests.helpers.disks import small_disk
from tests.helpers.runs import Runs, checkpoint_bits

SETTINGS = ("training.total_images=320", "checkpoint.every_images=64")


def test_a_disk_that_is_full_for_a_while_costs_only_time(runs: Runs) -> None:
    runs.finish("whole", *SETTINGS)
    expected = checkpoint_bits(runs.checkpoints("whole")[-1])

    checkpoints = runs.folder / "run" / "checkpoints"
    with small_disk(checkpoints, "32k"):  # no room for a checkpoint
        output = runs.finish("run", *SETTINGS, exit_code=EXIT_REQUEUE)
        assert list(checkpoints.iterdir()) == []
    assert output.count("no checkpoint could be written at") == 6  # five, and the final error
    for images_seen in (64, 128, 192, 256, 320):
        assert f"no checkpoint could be written at {images_seen} images" in output
    assert "No space left on device" in output
    assert "Traceback" not in output

    with small_disk(checkpoints, "32k"):  # no room for a checkpoint
        stop = (*SETTINGS, "checkpoint.on_failure=stop")
        output = runs.finish("run", *stop, exit_code=EXIT_REQUEUE)
    assert "no checkpoint could be written at 64 images" in output
    assert "no checkpoint could be written at 320 images" not in output

    runs.finish("run", *SETTINGS)
    assert checkpoint_bits(runs.checkpoints("run")[-1]) == expected
    assert [row["loss/critic"] for row in runs.rows("run")] == [
        row["loss/critic"] for row in runs.rows("whole")
    ]
