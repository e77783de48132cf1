"""What ranks do together, on two real ones that are started once for all of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ranks import run_ranks
from tests.distributed import rank_cases
from tests.helpers.runs import TINY

DEADLINE_SECONDS = 300
RANKS = 2

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Found:
    """What each rank found, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    where = [f"run.folder={folder}", "run.name=disturbed", f"data.path={digits}"]
    often = ["training.total_images=1600", "audit.every_images=1M", "checkpoint.every_images=64"]
    (folder / "arguments.txt").write_text("\n".join([*TINY, *where, *often]))
    run_ranks("tests.distributed.rank_cases:run", folder, RANKS, DEADLINE_SECONDS)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("objective", ["/".join(names) for names in rank_cases.COUNTED])
def test_an_update_averages_all_gradients_once_after_its_last_micro_batch(
    found: Found, objective: str, accumulate: int
) -> None:
    for rank in found:
        seen = rank["reductions"][f"{objective}/accumulate{accumulate}"]
        for player in ("critic", "generator"):
            count = seen["parameters"][player]
            forwards = [f"{player} forward"] * accumulate
            assert seen[player] == [*forwards, f"{player} reduce {count}"]
            # A loss over the global batch gathers logits besides: once, in all micro-batches.
            gathers = 2 if objective.startswith("relativistic_average") else 0
            collectives = seen[f"{player} collectives"]
            assert collectives.pop("c10d::allreduce_") == 1
            assert collectives.pop("c10d::allgather_", 0) == gathers
            assert not collectives


def test_compressed_gradients_are_the_mean_of_rounded_ones(found: Found) -> None:
    local = [part.float().mean(0) / RANKS for part in rank_cases.draw(8, 64, seed=4).chunk(RANKS)]
    rounded = sum((part.bfloat16() for part in local), torch.zeros(64, dtype=torch.bfloat16))
    for rank in found:
        compressed = rank["compressed"]
        assert torch.equal(compressed["bfloat16"][0], rounded.float())
        assert not torch.equal(compressed["none"], compressed["bfloat16"])
        torch.testing.assert_close(compressed["none"][0], sum(local))


def test_buffers_start_as_those_of_rank_0_and_are_then_left_to_each_rank(found: Found) -> None:
    batches = [rank_cases.draw(rank_cases.GLOBAL_BATCH, 3, seed=seed) for seed in (5, 6)]
    for number, rank in enumerate(found):
        assert torch.equal(rank["buffers"]["prepared"], torch.ones(3).double())
        mean = torch.ones(3).double()
        for batch in batches:
            mean = 0.9 * mean + 0.1 * batch.chunk(RANKS)[number].mean(0)
        torch.testing.assert_close(rank["buffers"]["trained"], mean)


def test_a_generator_update_leaves_the_critic_without_gradients(found: Found) -> None:
    for rank in found:
        for seen in rank["reductions"].values():
            assert seen["critic gradients after the generator's update"] == []
            assert not [event for event in seen["generator"] if event.startswith("critic")]


def test_an_audit_of_equal_replicas_says_nothing(found: Found) -> None:
    for rank in found:
        assert rank["audits"]["nothing"] == rank["audits"]["afterwards"] == ""


@pytest.mark.parametrize(
    "tensor",
    [
        "critic.middle.weight",
        "generator.norm.running_var",
        "ema.input.bias",
        "critic_optimizer.0.exp_avg",
        "generator_optimizer.1.exp_avg_sq",
        "generator_optimizer.step",
    ],
)
def test_one_unit_in_the_last_place_of_one_element_is_reported_on_every_rank(
    found: Found, tensor: str
) -> None:
    for rank in found:
        said = rank["audits"][tensor]
        assert f"`{tensor}` on rank 1 of 2" in said
        assert "(1 of " in said


def test_networks_that_compute_something_else_on_another_rank_are_refused(found: Found) -> None:
    for rank in found:
        assert (
            "the critic of rank 1 computes something else than that of rank 0" in rank["other code"]
        )


def test_a_run_whose_replicas_part_ends_and_leaves_its_checkpoints_alone(found: Found) -> None:
    for rank in found:
        run = rank["disturbed"]
        # The first to part is what was disturbed or what was computed from it before the audit.
        assert "replicas differ" in run["error"]
        assert "on rank 1 of 2" in run["error"]
        assert run["images seen"] == 128
        assert {name.partition("/")[0] for name in run["checkpoints before"]} == {
            "images-000000064"
        }
        assert run["checkpoints after"] == run["checkpoints before"]


def test_a_mistake_that_the_main_rank_finds_is_raised_on_every_rank(found: Found) -> None:
    for rank in found:
        assert rank["runtime"]["error"] == "`data.path` is wrong"
        assert rank["runtime"]["run_on_main"] == ["made on 0"]


def test_a_vote_is_the_largest_flag_and_votes_do_not_mix(found: Found) -> None:
    for rank in found:
        assert rank["runtime"]["votes"] == [1, 1, 0]


def test_values_are_gathered_in_rank_order(found: Found) -> None:
    for rank in found:
        assert rank["runtime"]["gathered"] == ["of rank 0", "of rank 1"]


def test_numbers_are_compared_to_the_last_bit_of_64(found: Found) -> None:
    for rank in found:
        assert rank["runtime"]["equal"] is True
        assert rank["runtime"]["one unit apart"] is False


def test_the_global_batch_comes_in_slot_order_and_its_deviation_is_numpys(found: Found) -> None:
    images = 3 + 2 * rank_cases.draw(rank_cases.GLOBAL_BATCH, 2, 3, 3, seed=3)
    for rank in found:
        assert torch.equal(rank["runtime"]["batch"], images.transpose(1, 3))
        deviation = rank["runtime"]["deviation"].item()
        assert deviation == pytest.approx(np.std(images.numpy()), rel=1e-12)


def test_a_sum_over_ranks_is_differentiated_twice_exactly(found: Found) -> None:
    weights = rank_cases.draw(5, seed=1).requires_grad_()
    images = rank_cases.draw(rank_cases.GLOBAL_BATCH, 5, seed=2)
    loss = rank_cases.statistic_loss(weights, images, torch.mean)
    (expected,) = torch.autograd.grad(loss, weights)
    for rank in found:
        torch.testing.assert_close(rank["sums"], expected, rtol=1e-13, atol=1e-15)


def test_replaced_batch_norms_on_two_ranks_are_torchs_on_the_whole_batch(found: Found) -> None:
    network = rank_cases.network_with_batch_norms()
    images = rank_cases.draw(rank_cases.GLOBAL_BATCH, 2, 5, 5, seed=4)
    expected = rank_cases.trained_norms(network, network, images)
    assert len(expected) == 8 + 4
    for rank in found:
        assert rank["norms"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                rank["norms"][name],
                tensor,
                rtol=1e-12,
                atol=1e-13,
                msg=lambda m, n=name: f"{n} {m}",
            )
