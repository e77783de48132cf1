"""Networks with which a run would depend on its cluster are refused, by name."""

import pytest
from torch import nn

from ganscale.errors import UserError
from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.training.invariance_checks import check_layers


def nested(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))


def test_a_batch_norm_deep_in_the_critic_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"the critic's layer `1\.0` is a batch norm"):
        check_layers(nn.Linear(2, 2), nested(nn.BatchNorm1d(2)))
    with pytest.raises(UserError, match="is a batch norm"):
        check_layers(nn.Linear(2, 2), nested(nn.SyncBatchNorm(2)))


def test_dropout_is_refused_in_either_network_unless_it_drops_nothing():
    with pytest.raises(
        UserError, match=r"the generator's layer `1\.0` is a dropout.*random_layers"
    ):
        check_layers(nested(nn.Dropout(0.1)), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"the critic's layer `1\.0` is a dropout"):
        check_layers(nn.Linear(2, 2), nested(nn.Dropout2d(0.5)))
    check_layers(nested(nn.Dropout(0.0)), nested(nn.Dropout(0.0)))


def test_what_keeps_samples_apart_is_fine():
    critic = nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2))
    check_layers(nested(nn.BatchNorm1d(2)), critic)


def test_the_batch_norm_over_all_ranks_is_refused_in_a_critic_too():
    with pytest.raises(UserError, match="is a batch norm"):
        check_layers(nn.Linear(2, 2), nested(GlobalBatchNorm(2)))


def test_the_older_spectral_norm_is_refused_with_the_newer_one_named():
    with pytest.raises(UserError, match=r"use torch\.nn\.utils\.parametrizations"):
        check_layers(nn.Linear(2, 2), nested(nn.utils.spectral_norm(nn.Linear(2, 2))))


def test_a_layer_without_a_shape_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"the critic's `1\.0\.weight` has no shape"):
        check_layers(nn.Linear(2, 2), nested(nn.LazyLinear(2)))


def test_hooks_on_gradients_are_refused_whenever_they_run():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        layer = nn.Linear(2, 2)
        getattr(layer.weight, register)(lambda gradient: None)
        with pytest.raises(UserError, match=r"the critic's `1\.0\.weight` has a gradient hook"):
            check_layers(nn.Linear(2, 2), nested(layer))


def test_state_that_checkpoints_do_not_hold_is_refused():
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"forwards": 3}

    with pytest.raises(UserError, match=r"the generator's layer `1\.0` has extra state"):
        check_layers(nested(Counting(2, 2)), nn.Linear(2, 2))
