"""A plan that is not possible is refused with the nearest that is; one that is fits on a page."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ganscale.cli.main import main
from ganscale.plan.planning import make_plan
from ganscale.shards.writing import write_shards
from tests.helpers.runs import TINY
from tests.plan.conftest import config_of, config_of_mlps


def refusal(capsys, data: Path, *arguments: str) -> str:
    assert main(["plan", *TINY, f"data.path={data}", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    return said.err


def test_a_batch_that_ranks_do_not_divide_is_refused_with_all_that_would_do(capsys, digits):
    said = refusal(
        capsys, digits, "training.global_batch_size=48", "--nodes", "5", "--gpus-per-node", "2"
    )
    assert said == (
        "error: `training.global_batch_size` of 48 cannot be divided evenly among 10 ranks of 1 "
        "micro-batch: choose 40 or 50; or, with this batch, 4 or 6 nodes of 2\n"
    )
    said = refusal(
        capsys, digits, "training.global_batch_size=48", "training.accumulate=16", "--nodes", "2"
    )
    assert "choose 32 or 64; or, with this batch, 1 or 3 nodes of 1; or" in said
    assert "training.accumulate=12 or 24" in said
    said = refusal(capsys, digits, "--nodes", "4", "--gpus-per-node", "8")
    assert "choose 32; or, with this batch, 2 nodes of 8" in said


def test_more_ranks_than_samples_are_refused(capsys, tmp_path, digits):
    said = refusal(
        capsys, digits, "training.global_batch_size=12000", "--nodes", "750", "--gpus-per-node", "8"
    )
    assert "6,000 ranks are more than the 5,000 samples" in said
    assert "at most 4,000 ranks" in said


REMOTE = ["data.shards=https://example.org/shards", "data.lanes=8", "training.global_batch_size=16"]


def test_a_cache_below_the_working_set_is_refused_and_what_is_offered_instead_will_do(
    capsys, digits
):
    settings = [*REMOTE, "data.block_samples=25", "data.window_blocks=2"]
    small = [*settings, "data.cache_gib=0.004"]  # two shards of five
    said = refusal(capsys, digits, *small, "--nodes", "8")
    assert "`data.cache_gib` of 0.004 is smaller than the shards that a node reads from" in said
    offered = re.findall(r"data\.\w+=[0-9.]+", said)
    assert offered
    for setting in offered:
        assert make_plan(config_of_mlps(digits, *small, setting), 8, 1).cache is not None


def test_shards_fetched_often_are_advised_to_be_read_in_larger_blocks(tmp_path):
    write_shards("bundled:mnist", tmp_path, shard_samples=100)
    room_for_20 = ["data.block_samples=5", "data.window_blocks=1", "data.cache_gib=0.004"]
    settings = [*REMOTE, *room_for_20]
    plan = make_plan(config_of_mlps(tmp_path, *settings), 2, 1)
    assert plan.cache is not None
    (remark,) = plan.remarks
    advised = re.findall(r"data\.\w+=\d+", remark)
    assert [setting.partition("=")[0] for setting in advised] == [
        "data.block_samples",
        "data.window_blocks",
    ]
    better = make_plan(config_of_mlps(tmp_path, *settings, *advised), 2, 1)
    assert better.cache is not None
    assert better.cache.fetches_per_shard < plan.cache.fetches_per_shard / 4
    assert f"it would be {better.cache.fetches_per_shard:.1f} times" in remark


def test_shared_lanes_are_told_with_the_nearest_number_that_none_share(digits):
    settings = [*REMOTE, "training.global_batch_size=48", "data.lanes=10"]
    plan = make_plan(config_of_mlps(digits, *settings), 3, 2)
    assert plan.lanes is not None
    assert plan.lanes.lanes_shared_by_nodes > 0
    (remark,) = (remark for remark in plan.remarks if "are shared by ranks" in remark)
    assert "data.lanes=6 or 12" in remark
    for lanes in (6, 12):
        plan = make_plan(config_of_mlps(digits, *settings, f"data.lanes={lanes}"), 3, 2)
        assert not [remark for remark in plan.remarks if "are shared by ranks" in remark]


def test_streamed_shards_are_planned_but_for_what_needs_a_manifest(digits):
    plan = make_plan(config_of_mlps(digits, f"data.path={digits}/*.tar"), 2, 2)
    assert plan.epochs is plan.lanes is plan.reading is plan.cache is None
    assert "are unknown" in plan.remarks[0]
    assert plan.networks == make_plan(config_of_mlps(digits), 2, 2).networks


def test_a_single_rank_has_no_communication(digits):
    assert "communication" not in make_plan(config_of_mlps(digits), 1, 1).table()
    assert "communication" in make_plan(config_of_mlps(digits), 2, 1).table()


def test_the_json_file_holds_the_numbers_of_the_table(capsys, tmp_path, digits):
    file = tmp_path / "plan.json"
    arguments = [*TINY, f"data.path={digits}", "--nodes", "2", "--json", str(file)]
    assert main(["plan", *arguments]) == 0
    table = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(asdict(make_plan(config_of(digits), 2, 1))))
    for section, rows in written.items():
        if isinstance(rows, dict):
            assert f"\n{section.replace('_', ' ')}\n" in f"\n{table}"
            for name in rows:
                assert f"\n  {name.replace('_', ' ')} " in table
    assert max(map(len, table.splitlines())) <= 120


def test_epochs_are_counted_over_all_images_that_are_read(digits):
    """Also those of the generator's own real batches."""
    settings = ("objective.loss.name=relativistic", "objective.n_critic=2")
    shared, fresh = (
        make_plan(config_of_mlps(digits, *settings, f"training.generator_real={choice}"), 1, 1)
        for choice in ("critic", "fresh")
    )
    assert shared.run == fresh.run
    assert shared.epochs is not None
    assert fresh.epochs is not None
    assert fresh.epochs.epochs == pytest.approx(3 / 2 * shared.epochs.epochs, rel=1e-3)
    for count in ("critic_steps_per_epoch", "generator_steps_per_epoch"):
        of_shared, of_fresh = (getattr(each.epochs, count) for each in (shared, fresh))
        assert of_fresh == pytest.approx(2 / 3 * of_shared)
    assert fresh.host_memory.batches == shared.host_memory.batches + 3
