"""Layers with which a run would depend on its cluster are refused by their names."""

import pytest
from torch import nn

from ganscale.errors import UserError
from ganscale.training.exactness import refuse_what_breaks_exactness


def nested(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))


def test_a_batch_norm_deep_in_the_critic_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"the critic's layer `1\.0` is a batch norm"):
        refuse_what_breaks_exactness(nn.Linear(2, 2), nested(nn.BatchNorm1d(2)))
    with pytest.raises(UserError, match="is a batch norm"):
        refuse_what_breaks_exactness(nn.Linear(2, 2), nested(nn.SyncBatchNorm(2)))


def test_dropout_is_refused_in_either_network_unless_it_drops_nothing():
    with pytest.raises(UserError, match=r"the generator's layer `1\.0` is a dropout"):
        refuse_what_breaks_exactness(nested(nn.Dropout(0.1)), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"the critic's layer `1\.0` is a dropout"):
        refuse_what_breaks_exactness(nn.Linear(2, 2), nested(nn.Dropout2d(0.5)))
    refuse_what_breaks_exactness(nested(nn.Dropout(0.0)), nested(nn.Dropout(0.0)))


def test_what_keeps_samples_apart_is_fine():
    critic = nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2))
    refuse_what_breaks_exactness(nested(nn.BatchNorm1d(2)), critic)
