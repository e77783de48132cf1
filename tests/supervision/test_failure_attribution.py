"""Who is to blame, from what is known of every rank."""

import pytest
import torch

from ganscale.errors import DeviceError, UserError
from ganscale.supervision.failure_attribution import (
    Failure,
    FailureCause,
    RankStatus,
    attribute_failure,
)
from ganscale.supervision.progress import ProgressMark

LIMIT, SILENCE = 600.0, 60.0


def healthy_ranks(count: int, now: float = 1000.0) -> list[RankStatus]:
    """That many ranks in the same step, all well."""
    mark = ProgressMark(50, "critic")
    return [RankStatus(rank, f"node{rank // 2}", now, now, mark) for rank in range(count)]


def attribute(ranks: list[RankStatus], now: float) -> FailureCause | None:
    return attribute_failure(ranks, now, LIMIT, SILENCE)


def heard_at(ranks: list[RankStatus], now: float) -> list[RankStatus]:
    for rank in ranks:
        rank.heard_at = now
    return ranks


def test_ranks_that_are_well_are_left_alone() -> None:
    assert attribute(healthy_ranks(4), 1000.0) is None
    assert attribute(heard_at(healthy_ranks(4), 1500.0), 1500.0) is None


def test_a_process_that_died_is_named_with_what_it_was_doing() -> None:
    ranks = healthy_ranks(4)
    ranks[3].disconnected_at = 1000.0
    assert attribute(ranks, 1000.5) is None  # another rank may have died earlier
    cause = attribute(ranks, 1001.1)
    assert cause == FailureCause(76, "rank 3 on node1 was lost: the process died in `critic`")


def test_a_death_comes_before_the_errors_that_it_causes() -> None:
    ranks = healthy_ranks(4)
    ranks[0].failure, ranks[0].failed_at = Failure(1, "Connection closed by peer", True), 1000.0
    ranks[2].disconnected_at = 1000.4
    cause = attribute(ranks, 1001.1)
    assert cause is not None
    assert cause.exit_code == 76
    assert "rank 2 on node1 was lost" in cause.message


def test_an_error_comes_before_its_consequences_and_ends_with_its_own_code() -> None:
    ranks = healthy_ranks(4)
    ranks[0].failure, ranks[0].failed_at = Failure(1, "Connection closed by peer", True), 1000.0
    ranks[1].failure, ranks[1].failed_at = Failure(2, "a shard is missing", False), 1000.2
    assert attribute(ranks, 1001.1) == FailureCause(2, "rank 1 on node0: a shard is missing")


def test_a_network_that_fails_between_ranks_that_live_asks_for_another_attempt() -> None:
    error = RuntimeError("[pair.cc:534] Read error [10.0.0.7]:21: Connection reset by peer")
    ranks = healthy_ranks(2)
    for rank in ranks:
        rank.failure, rank.failed_at = Failure.from_error(error), 1000.0
    cause = attribute(ranks, 1000.0)
    assert cause is not None
    assert cause.exit_code == 76


def exit_code(error: BaseException) -> int:
    return Failure.from_error(error).exit_code


def test_an_error_ends_with_the_code_that_says_whether_to_try_again() -> None:
    assert exit_code(UserError("a mistake")) == 2
    assert exit_code(RuntimeError("a bug")) == 1
    assert exit_code(torch.AcceleratorError("CUDA error: uncorrectable ECC error")) == 76
    assert exit_code(torch.OutOfMemoryError("would happen again")) == 1
    assert exit_code(torch.AcceleratorError("CUDA error: out of memory")) == 1


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: uncorrectable ECC error"), DeviceError("wrong")]
)
def test_the_machine_of_a_device_that_fails_is_suspect(error: Exception) -> None:
    ranks = healthy_ranks(4)
    ranks[3].failure, ranks[3].failed_at = Failure.from_error(error), 1000.0
    cause = attribute(ranks, 1001.1)
    assert cause is not None
    assert (cause.exit_code, cause.suspect_host) == (76, "node1")


def test_machines_of_ranks_that_hang_or_are_silent_are_suspect_unless_all_are() -> None:
    ranks = heard_at(healthy_ranks(4), 1700.0)
    cause = attribute(ranks, 1700.0)
    assert cause is not None
    assert cause.suspect_host == ""
    ranks[0].is_waiting = ranks[1].is_waiting = True
    cause = attribute(ranks, 1700.0)
    assert cause is not None
    assert cause.suspect_host == "node1"
    ranks[1].heard_at = 1600.0
    cause = attribute(ranks, 1700.0)
    assert cause is not None
    assert cause.suspect_host == "node0"


def test_an_error_of_all_ranks_is_reported_at_once_and_without_a_name() -> None:
    ranks = healthy_ranks(2)
    for rank in ranks:
        rank.failure, rank.failed_at = Failure(2, "no data set at nowhere", False), 1000.0
    assert attribute(ranks, 1000.0) == FailureCause(2, "no data set at nowhere")


def test_a_rank_without_a_sign_of_life_is_named_before_the_limit_for_progress() -> None:
    ranks = heard_at(healthy_ranks(4), 1070.0)
    ranks[2].heard_at = 1005.0
    cause = attribute(ranks, 1070.0)
    assert cause is not None
    assert cause.is_hang
    assert cause.message.startswith("rank 2 on node1 was lost: no sign of life for 65 s")


@pytest.mark.parametrize(("extra_seconds", "gives_up_after"), [(0.0, 600.0), (300.0, 900.0)])
def test_without_progress_anywhere_the_rank_that_is_behind_hangs(
    extra_seconds: float, gives_up_after: float
) -> None:
    ranks = healthy_ranks(3)
    ranks[1].mark = ProgressMark(49, "data", extra_seconds)  # others wait one stage further
    now = 1000.0 + gives_up_after
    assert attribute(heard_at(ranks, now), now - 1) is None
    cause = attribute(heard_at(ranks, now + 1), now + 1)
    assert cause is not None
    assert cause.message == f"rank 1 on node0 hangs: in `data` for {gives_up_after + 1:.0f} s"


def test_one_rank_that_still_moves_is_reason_to_wait() -> None:
    ranks = heard_at(healthy_ranks(3), 2000.0)
    ranks[2].progressed_at = 1500.0
    assert attribute(ranks, 2000.0) is None


def test_ranks_that_all_hang_in_one_place_are_not_told_apart() -> None:
    ranks = heard_at(healthy_ranks(2), 1700.0)
    cause = attribute(ranks, 1700.0)
    assert cause is not None
    assert cause.message == "every rank hangs: in `critic` for 700 s"


def test_a_rank_that_is_not_waiting_for_others_is_the_one_that_hangs() -> None:
    ranks = heard_at(healthy_ranks(3), 1700.0)
    ranks[0].is_waiting = ranks[1].is_waiting = True
    cause = attribute(ranks, 1700.0)
    assert cause is not None
    assert cause.message == "rank 2 on node1 hangs: in `critic` for 700 s"


def test_a_rank_that_left_in_order_is_not_missed() -> None:
    ranks = healthy_ranks(2)
    ranks[1].has_left = True
    ranks[1].disconnected_at = 1000.0
    assert attribute(ranks, 1010.0) is None
