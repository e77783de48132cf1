"""The config's objective is built whole, or refused with a sentence."""

import pytest
from torch import nn

from ganscale.errors import UserError
from ganscale.objectives.objective import build_objective, refuse_batch_statistics
from ganscale.schema import ClipConfig, LossConfig, ObjectiveConfig, PenaltyConfig


def test_an_objective_has_its_penalties_and_clipping():
    config = ObjectiveConfig(LossConfig("wgan"), {"wgan_gp": PenaltyConfig(10.0)}, ClipConfig(0.1))
    objective = build_objective(config)
    assert {name: weight for name, (weight, _) in objective.penalties.items()} == {"wgan_gp": 10.0}
    assert objective.clip == ClipConfig(0.1)


def test_a_penalty_of_weight_zero_costs_nothing():
    config = ObjectiveConfig(LossConfig("wgan"), {"wgan_gp": PenaltyConfig(0.0)})
    assert build_objective(config).penalties == {}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("wgan-gp", "did you mean wgan_gp"), ("zzz", "unknown penalty; known: wgan_gp")],
)
def test_an_unknown_penalty_is_named_with_the_nearest(name, sentence):
    config = ObjectiveConfig(LossConfig("wgan"), {name: PenaltyConfig(1.0)})
    with pytest.raises(UserError, match=rf"`objective\.penalties\.{name}`.*{sentence}"):
        build_objective(config)


def test_a_batch_norm_deep_in_the_critic_is_refused_by_its_name():
    critic = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(UserError, match=r"`1\.0` is a batch norm"):
        refuse_batch_statistics(critic)
    refuse_batch_statistics(
        nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2))
    )
