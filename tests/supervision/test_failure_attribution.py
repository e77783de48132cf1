"""Who is to blame, from what is known of every rank."""

import pytest
import torch

from ganscale.errors import UserError
from ganscale.supervision.failure_attribution import (
    Failure,
    FailureCause,
    Member,
    ProgressMark,
    attribute_failure,
)
from ganscale.supervision.watchdog import exit_code_of

LIMIT, SILENCE = 600.0, 60.0


def ranks(count: int, now: float = 1000.0) -> list[Member]:
    """That many ranks in the same step, all well."""
    mark = ProgressMark(50, "critic")
    return [Member(f"rank {rank} on node{rank // 2}", now, now, mark) for rank in range(count)]


def judge(members: list[Member], now: float) -> FailureCause | None:
    return attribute_failure(members, now, LIMIT, SILENCE)


def heard(members: list[Member], now: float) -> list[Member]:
    for member in members:
        member.heard_at = now
    return members


def test_ranks_that_are_well_are_left_alone() -> None:
    assert judge(ranks(4), 1000.0) is None
    assert judge(heard(ranks(4), 1500.0), 1500.0) is None


def test_a_process_that_died_is_named_with_what_it_was_doing() -> None:
    members = ranks(4)
    members[3].gone_at = 1000.0
    assert judge(members, 1000.5) is None  # another one may have died before it
    verdict = judge(members, 1001.1)
    assert verdict == FailureCause(76, "rank 3 on node1 was lost: the process died in `critic`")


def test_a_death_comes_before_the_errors_that_it_causes() -> None:
    members = ranks(4)
    members[0].failure, members[0].failed_at = Failure(1, "Connection closed by peer", True), 1000.0
    members[2].gone_at = 1000.4
    verdict = judge(members, 1001.1)
    assert verdict is not None
    assert verdict.exit_code == 76
    assert "rank 2 on node1 was lost" in verdict.sentence


def test_an_error_comes_before_its_echoes_and_ends_with_its_own_code() -> None:
    members = ranks(4)
    members[0].failure, members[0].failed_at = Failure(1, "Connection closed by peer", True), 1000.0
    members[1].failure, members[1].failed_at = Failure(2, "a shard is missing", False), 1000.2
    assert judge(members, 1001.1) == FailureCause(2, "rank 1 on node0: a shard is missing")


def test_a_network_that_fails_between_ranks_that_live_asks_for_another_attempt() -> None:
    error = RuntimeError("[pair.cc:534] Read error [10.0.0.7]:21: Connection reset by peer")
    members = ranks(2)
    for member in members:
        member.failure, member.failed_at = Failure(exit_code_of(error), str(error), True), 1000.0
    verdict = judge(members, 1000.0)
    assert verdict is not None
    assert verdict.exit_code == 76


def test_an_error_ends_with_the_code_that_says_whether_to_try_again() -> None:
    assert exit_code_of(UserError("a mistake")) == 2
    assert exit_code_of(RuntimeError("a bug")) == 1
    assert exit_code_of(torch.AcceleratorError("CUDA error: uncorrectable ECC error")) == 76
    assert exit_code_of(torch.OutOfMemoryError("would happen again")) == 1


def test_an_error_of_all_ranks_is_told_at_once_and_without_a_name() -> None:
    members = ranks(2)
    for member in members:
        member.failure, member.failed_at = Failure(2, "no data set at nowhere", False), 1000.0
    assert judge(members, 1000.0) == FailureCause(2, "no data set at nowhere")


def test_a_rank_without_a_sign_of_life_is_named_before_the_patience_with_a_step_is_over() -> None:
    members = heard(ranks(4), 1070.0)
    members[2].heard_at = 1005.0
    verdict = judge(members, 1070.0)
    assert verdict is not None
    assert verdict.is_hang
    assert verdict.sentence.startswith("rank 2 on node1 was lost: no sign of life for 65 s")


@pytest.mark.parametrize(("patience", "gives_up_after"), [(0.0, 600.0), (300.0, 900.0)])
def test_without_progress_anywhere_the_rank_that_is_behind_hangs(
    patience: float, gives_up_after: float
) -> None:
    members = ranks(3)
    members[1].mark = ProgressMark(49, "data", patience)  # the others wait for it one part further
    now = 1000.0 + gives_up_after
    assert judge(heard(members, now), now - 1) is None
    verdict = judge(heard(members, now + 1), now + 1)
    assert verdict is not None
    assert verdict.sentence == f"rank 1 on node0 hangs: in `data` for {gives_up_after + 1:.0f} s"


def test_one_rank_that_still_moves_is_reason_to_wait() -> None:
    members = heard(ranks(3), 2000.0)
    members[2].moved_at = 1500.0
    assert judge(members, 2000.0) is None


def test_ranks_that_all_hang_in_one_place_are_not_told_apart() -> None:
    members = heard(ranks(2), 1700.0)
    verdict = judge(members, 1700.0)
    assert verdict is not None
    assert verdict.sentence == "every rank hangs: in `critic` for 700 s"


def test_a_rank_that_is_not_waiting_for_others_is_the_one_that_hangs() -> None:
    members = heard(ranks(3), 1700.0)
    members[0].is_waiting = members[1].is_waiting = True
    verdict = judge(members, 1700.0)
    assert verdict is not None
    assert verdict.sentence == "rank 2 on node1 hangs: in `critic` for 700 s"


def test_a_rank_that_left_in_order_is_not_missed() -> None:
    members = ranks(2)
    members[1].has_left = True
    members[1].gone_at = 1000.0
    assert judge(members, 1010.0) is None
