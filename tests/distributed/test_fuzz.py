"""Random networks are refused for a reason, or train as plain autograd does on one rank and two."""

from collections import Counter

import pytest

from benchmarks.fuzz import Outcome, try_pairs, verdict

FIRST, COUNT = 300, 60
DEADLINE_SECONDS = 600


def test_random_networks_are_refused_for_a_reason_or_train_alike_on_any_cluster() -> None:
    outcomes = try_pairs(FIRST, COUNT, seconds=DEADLINE_SECONDS)
    counts = Counter(verdict(*pair) for pair in outcomes)
    wrong = [what for what in counts if what.startswith("FAILED")]
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) == COUNT
    assert counts["agrees"] > COUNT // 3
    assert len([what for what in counts if what.startswith("refused")]) > 5


@pytest.mark.parametrize("number", [1462, 3418])
def test_a_rank_with_one_image_has_the_gradient_of_grouped_convolutions(number: int) -> None:
    """In channels last, torch returns another one on a CPU."""
    ((alone, two),) = try_pairs(number, 1, seconds=DEADLINE_SECONDS)
    assert verdict(alone, two) == "agrees"


def test_ranks_that_disagree_on_a_refusal_are_a_failure() -> None:
    agrees, refused = Outcome(7, "agrees"), Outcome(7, "refused: because")
    assert verdict(agrees, refused).startswith("FAILED: agrees on one rank, refused")
    assert verdict(agrees, Outcome(7, "FAILED: differs", 1.0)) == "FAILED: differs (pair 7)"
    assert verdict(refused, refused) == "refused: because"
