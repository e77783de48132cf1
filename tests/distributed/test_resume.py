"""A run that is killed at any moment continues the same curve when it is started again."""

import os
import signal

import pytest

from tests.distributed.test_promise import curve
from tests.helpers.processes import HANG_SECONDS, REPOSITORY, Process, end_tree, wait_until
from tests.helpers.runs import SCHEDULED, SCHEDULES, Runs, checkpoint_bits

_CHECKPOINT_EVERY = 160
_SETTINGS = (
    "training.total_images=1600",
    f"checkpoint.every_images={_CHECKPOINT_EVERY}",
    "log.every_images=80",
    *SCHEDULES,
)


def wait_for_checkpoints(
    runs: Runs, name: str, count: int, process: Process, every_images: int = 320
) -> None:
    """Until that many checkpoints were written: the newest's name shows it, old ones are pruned."""

    def are_written() -> bool:
        written = runs.checkpoints(name)
        return (
            bool(written) and int(written[-1].name.removeprefix("images-")) >= count * every_images
        )

    wait_until(are_written, process=process)


_FRESH = ("objective.loss.name=relativistic", "training.generator_real=fresh")

_DRAWS = tuple(
    f"{role}.{setting}"
    for role in ("generator", "critic")
    for setting in (
        f"target=benchmarks.tiny_networks:Tiny{role.capitalize()}",
        "options={draws: true, checkpoints: true}",
    )
)

_PATHS = (
    "generator.target=benchmarks.tiny_networks:TinyStyleGenerator",
    "generator.options={width: 4}",
    "objective.generator_penalties.path_length={weight: {from: 4, to: 1}, interval: 4}",
)


_STYLEGAN2 = (
    str(REPOSITORY / "configs" / "objective" / "non_saturating.yaml"),
    "objective.penalties.r1={weight: {from: 1, to: 0.1}, interval: 4}",
    "objective.generator_penalties.path_length={weight: {from: 4, to: 1}, interval: 4}",
    "optimizer.generator.betas=[{from: 0.5, to: 0, over_images: 1k}, 0.99]",
    "augmentation={pipeline: ada, adaptive: {target: 0.1, every_images: 32, full_images: 1k}}",
)


@pytest.mark.parametrize(
    ("ranks", "more"), [(1, ()), (2, ()), (2, _FRESH), (2, _DRAWS), (2, _PATHS), (2, _STYLEGAN2)]
)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    runs: Runs, ranks: int, more: tuple[str, ...]
) -> None:
    settings, scheduled = (*_SETTINGS, *more), SCHEDULED
    if more == _STYLEGAN2:
        runs.networks = "stylegan2"
        settings = (*_SETTINGS[:3], *more)  # without the schedule of another penalty
        scheduled = {"penalty/r1_weight", "optim/generator_beta1", "augment/probability"}
    if more in (_PATHS, _STYLEGAN2):
        scheduled = {*scheduled, "penalty/path_length_weight"}
    runs.finish("whole", *settings, ranks=ranks)
    for checkpoints_before_the_kill in (2, 5):
        process = runs.start("killed", *settings, "data.workers=2", ranks=ranks)
        try:
            wait_for_checkpoints(
                runs, "killed", checkpoints_before_the_kill, process, _CHECKPOINT_EVERY
            )
            assert process.poll() is None
        finally:
            end_tree(process)  # kill -9 to the launcher and to every rank
            process.communicate()
    output = runs.finish("killed", *settings, "data.workers=2", ranks=ranks)
    assert "continues at" in output
    assert len(runs.summary("killed")["sessions"]) > 1
    assert checkpoint_bits(runs.checkpoints("killed")[-1]) == checkpoint_bits(
        runs.checkpoints("whole")[-1]
    )
    # On two ranks, means that were saved in between are summed in another order.
    whole, killed = curve(runs.rows("whole")), curve(runs.rows("killed"))
    assert [row["progress/images_seen"] for row in killed] == [
        row["progress/images_seen"] for row in whole
    ]
    # Lazy penalties are not in every row.
    moving = {name for name in whole[0] if len({row.get(name) for row in whole}) > 3}
    assert moving >= scheduled
    for row_of_whole, row_of_killed in zip(whole, killed, strict=True):
        assert row_of_killed == pytest.approx(row_of_whole, rel=1e-12)


def test_a_signal_stops_at_a_step_and_the_run_continues_on_another_world_size(runs: Runs) -> None:
    settings = (*_SETTINGS, "training.precision=float64")
    runs.finish("whole", *settings)
    process = runs.start("elastic", *settings)
    try:
        wait_for_checkpoints(runs, "elastic", 2, process, _CHECKPOINT_EVERY)
        os.kill(process.pid, signal.SIGUSR1)
        output, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        end_tree(process)
    assert process.returncode == 75, output
    assert "stopped on request" in output
    runs.finish("elastic", *settings, ranks=2)
    sessions = runs.summary("elastic")["sessions"]
    assert [session["world_size"] for session in sessions] == [1, 2]
    for row_of_whole, row in zip(
        curve(runs.rows("whole")), curve(runs.rows("elastic")), strict=True
    ):
        assert row == pytest.approx(row_of_whole, rel=1e-6)


def test_stylegan2_is_killed_and_continues_on_more_ranks_with_other_micro_batches(
    runs: Runs,
) -> None:
    """Noise, style mixing, groups, path length and the adaptive controller among them."""
    runs.networks = "stylegan2"
    settings = (*_SETTINGS[:3], *_STYLEGAN2, "training.precision=float64")
    runs.finish("whole", *settings)
    allowed = "resume.allow=[training.accumulate]"
    for checkpoints, ranks, accumulate in ((1, 1, 1), (3, 2, 2)):
        changed = f"training.accumulate={accumulate}", allowed
        process = runs.start("elastic", *settings, *changed, ranks=ranks)
        try:
            wait_for_checkpoints(runs, "elastic", checkpoints, process, _CHECKPOINT_EVERY)
        finally:
            end_tree(process)
            process.communicate()
    runs.finish("elastic", *settings, allowed, ranks=4)
    sessions = runs.summary("elastic")["sessions"]
    assert [session["world_size"] for session in sessions] == [1, 2, 4]
    whole, elastic = curve(runs.rows("whole")), curve(runs.rows("elastic"))
    for row_of_whole, row in zip(whole, elastic, strict=True):
        assert row == pytest.approx(row_of_whole, rel=1e-6)
    assert len({row["augment/probability"] for row in whole}) > 3


def test_a_finished_run_does_not_train_again(runs: Runs) -> None:
    runs.finish("done", "training.total_images=64")
    before = checkpoint_bits(runs.checkpoints("done")[-1])
    assert "finished already" in runs.finish("done", "training.total_images=64")
    assert checkpoint_bits(runs.checkpoints("done")[-1]) == before
    runs.finish("done", "training.total_images=128")  # and goes on when more is asked for
    assert runs.summary("done")["images_seen"] == 128
